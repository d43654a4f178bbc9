"""A test file of your own: what must hold for your configuration, on every batch that it takes.

    pytest examples/fuzz_your_spec.py

Put your spec in the place of `SPEC`. `specs(SPEC)` draws tiny specs near to it, of the same mechanisms with most of
their options; `inputs_for(spec)` draws batches for one: of any length, padded on either side, packed. What fails is
shrunk to the smallest spec and batch for which it does, and printed.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import attncompiler
from attncompiler.spec import ModelSpec, read
from attncompiler.testing.fuzz import examine
from attncompiler.testing.strategies import Inputs, inputs_for, specs

SPEC: ModelSpec = read(Path(__file__).parents[1] / "specs" / "sparse_tiny.yaml")
EXAMPLES = 20

drawn = specs(SPEC).flatmap(inputs_for)
trained = drawn.filter(lambda inputs: inputs.spec.model.head.kind != "none")
relaxed = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@relaxed
@given(drawn)
def test_every_law_holds(inputs: Inputs) -> None:
    """All that `attncompiler fuzz` looks at: kernels within their budgets, packing, padding, decoding, causality."""
    broken, _ = examine(inputs)
    assert broken is None, str(broken)


@relaxed
@given(trained)
def test_a_step_of_training_moves_every_parameter(inputs: Inputs) -> None:
    """A property of one's own: a parameter that no loss can reach is one that was not meant to be there."""
    model = attncompiler.build(inputs.spec, device="cpu", dtype=torch.float32)
    model.loss(**inputs.loss(dtype=torch.float32)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no part in the loss"
        assert parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"


@relaxed
@given(trained)
def test_doubling_the_batch_changes_no_loss(inputs: Inputs) -> None:
    """Another: the mean over a batch given twice is the mean over the batch."""
    model = attncompiler.build(inputs.spec, device="cpu", dtype=torch.float64).eval()
    once = inputs.loss(dtype=torch.float64)
    twice = {name: torch.cat([tensor, tensor]) for name, tensor in once.items()}
    with torch.no_grad():
        torch.testing.assert_close(model.loss(**twice), model.loss(**once))


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, "-q"]))
