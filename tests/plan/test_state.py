"""Predicted decode state is what the emitted model holds for so many tokens."""

from __future__ import annotations

import pytest
import torch
from small_specs import NAMES, example
from test_flops import FORMS

from attncompiler.mechanisms.base import discover
from attncompiler.planning import plan
from attncompiler.planning.cost import model_cost

STEPPED = [
    name
    for name in NAMES
    if name != "hybrid_13b" and all(discover()[each.kind].causal(each) for each in example(name).policies.values())
]


@pytest.mark.parametrize("name", [*STEPPED, "dynamic"])
def test_decode_state_is_as_large_as_predicted(name: str) -> None:
    from attncompiler.emit import emit

    spec = FORMS[name] if name in FORMS else example(name)
    planned = plan(spec, "cpu", batch=2, seq_len=34)
    model = emit(spec, planned, device="cpu")
    state = model.init_state(2, 34)
    with torch.no_grad():
        _, state = model.step(torch.zeros(2, 33, dtype=torch.int64), state)
        _, state = model.step(torch.zeros(2, 1, dtype=torch.int64), state)
    layers = state["layers"].values()
    held = sum(part.nbytes for layer in layers for part in layer.values() if isinstance(part, torch.Tensor))
    assert model_cost(spec, planned).state_bytes == held
