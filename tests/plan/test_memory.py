"""Predicted memory against what the allocator and autograd report."""

from __future__ import annotations

import pytest
from small_specs import NAMES, example, small
from test_flops import FORMS
from training_step import saved_bytes, training_peak

from attncompiler.planning import plan
from attncompiler.planning.cost import model_cost
from attncompiler.spec.model import ModelSpec


@pytest.mark.parametrize("name", [name for name in NAMES if name != "hybrid_13b"])
def test_peak_memory_of_a_training_step_is_within_a_fifth(name: str) -> None:
    from attncompiler.emit import emit

    spec = example(name)
    planned = plan(spec, "cpu", batch=4, seq_len=512)
    measured = training_peak(spec, emit(spec, planned, device="cpu"), 4, 512)
    predicted = model_cost(spec, planned).memory.peak
    assert abs(predicted / measured - 1) < 0.2, (predicted, measured)


@pytest.mark.parametrize("form", FORMS)
def test_what_autograd_keeps_is_predicted(form: str) -> None:
    from attncompiler.emit import emit

    spec = FORMS[form]
    planned = plan(spec, "cpu", batch=2, seq_len=128)
    measured = saved_bytes(spec, emit(spec, planned, device="cpu"), 2, 128)
    predicted = model_cost(spec, planned).memory.activations
    assert predicted == pytest.approx(measured, rel=0.02)


def test_checkpointing_keeps_less_and_longer_sequences_keep_more() -> None:
    spec = example("llama_tiny")
    costs = [model_cost(spec, plan(spec, "cpu", batch=4, seq_len=length)) for length in (256, 512, 1024)]
    assert all(cost.checkpointed.peak < cost.memory.peak for cost in costs)
    assert all(cost.checkpointed.activations < cost.memory.activations / 3 for cost in costs)
    activations = [cost.memory.activations for cost in costs]
    # linear in the length: no kernel of this plan keeps T × T
    assert activations[2] - activations[1] == pytest.approx(2 * (activations[1] - activations[0]), rel=0.01)


def test_eager_pays_for_the_square_of_the_length() -> None:
    def peak(kernel: str, length: int) -> int:
        spec: ModelSpec = small(f"{{kind: attention, num_attention_heads: 4, kernel: {kernel}}}")
        return model_cost(spec, plan(spec, "cpu", seq_len=length)).memory.peak

    assert peak("eager", 8192) > 10 * peak("sdpa", 8192)
