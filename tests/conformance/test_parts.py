"""The backward's heads in parts, where a call is long enough: fewer sums are held, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attncompiler.blocks.gpu import Device
from attncompiler.mechanisms.attention.mechanism import MECHANISM
from attncompiler.mechanisms.attention.op import OPERATOR, AttentionOptions, as_pattern
from attncompiler.mechanisms.case import Case, values
from attncompiler.testing.conformance import conforms, kernel_call, prepared, refusals_of

launch = pytest.importorskip("attncompiler.mechanisms.attention.flash.launch")


@given(st.integers(1, 10**7), st.integers(1, 200), st.integers(1, 200))
def test_parts_are_equal_and_each_keeps_the_device_busy(programs: int, heads: int, multiprocessors: int) -> None:
    parts = launch.parts_of(programs, heads, Device(0, multiprocessors))
    assert heads % parts == 0
    busy = launch.PART_WAVES * multiprocessors
    assert parts == 1 or programs // parts >= busy
    more = [each for each in range(parts + 1, heads + 1) if heads % each == 0]
    assert all(programs < each * busy for each in more), "no more parts would do"


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize(
    ("pattern", "segments"),
    [
        ({"kind": "causal"}, False),
        ({"kind": "sliding_window", "window": 100}, False),
        ({"kind": "sliding_window", "window": 100, "global_tokens": 20}, False),
        ({"kind": "sliding_window", "window": 100}, True),
    ],
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_in_parts_gradients_are_what_they_are_at_once(
    pattern: dict[str, Any], segments: bool, deterministic: bool, D: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cpu" or torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("only the kernels for Hopper compute parts")
    from attncompiler.mechanisms.attention.flash import hopper
    from attncompiler.mechanisms.attention.kernels.triton import KERNEL

    T, generator = 384, torch.Generator().manual_seed(0)
    sizes = {"q": (2, T, 8, D), "k": (2, T, 4, D), "v": (2, T, 4, D), "sinks": (8,)}
    tensors = {name: values("normal", size, generator) for name, size in sizes.items()}
    if segments:
        tensors["segment_ids"] = torch.arange(T) // torch.tensor([[90], [250]])
    options = AttentionOptions(pattern=as_pattern(pattern), deterministic=deterministic)
    case = prepared(Case(OPERATOR, tensors, options, causal=True), torch.bfloat16, device)
    assert not refusals_of(MECHANISM.kernel("triton"), case)
    outputs = KERNEL.forward(case.tensors, options)
    grads = {"out": torch.randn_like(outputs["out"])}
    at_once = KERNEL.backward(grads, case.tensors, outputs, options)
    asked: list[int] = []

    def all_apart(programs: int, heads: int, device: Any) -> int:
        asked.append(heads)
        return heads

    monkeypatch.setattr(hopper, "parts_of", all_apart)
    in_parts = KERNEL.backward(grads, case.tensors, outputs, options)
    verdicts = conforms(MECHANISM, kernel_call("triton"), case, torch.bfloat16)
    assert all(verdict.ok for verdict in verdicts), "\n".join(map(str, verdicts))
    uneven = segments or "global_tokens" in pattern
    # by segments, the kernels for every architecture keep an order, and need no sums
    assert bool(asked) == ((deterministic and not segments) or not uneven)
    if not asked:
        return
    assert all(torch.equal(in_parts[name], at_once[name]) for name in ("k", "v"))
    assert not deterministic or torch.equal(in_parts["q"], at_once["q"])
