"""Calls that only autograd looks on at: they pass torch's dispatcher by, and differ in nothing else."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from attncompiler.mechanisms.attention.op import attention
from attncompiler.runtime import dispatch, operator


def qkv(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 6, 2, 4, generator=generator, dtype=dtype).requires_grad_() for _ in range(3)]


def run(tensors: list[Tensor], beside: AbstractContextManager[object]) -> tuple[Tensor, ...]:
    with beside:
        out = attention(*tensors, kernel="chunkwise")
    return out, *torch.autograd.grad(out.square().sum(), tensors)


def names(recorded: profile) -> set[str]:
    return {event.name for event in recorded.events()}


def test_both_ways_give_the_same_bits() -> None:
    tensors = qkv()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        through = run(tensors, nullcontext())
    assert {"attncompiler::attention", "attncompiler::attention_backward"} <= names(recorded)
    direct = run(tensors, nullcontext())
    assert type(direct[0].grad_fn).__name__ == "_DirectBackward"
    for one, other in zip(through, direct, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_backward_that_is_looked_on_at_is_seen() -> None:
    tensors = qkv()
    out = attention(*tensors, kernel="chunkwise")
    with FlopCounterMode(display=False) as counted:
        out.sum().backward()
    assert counted.get_total_flops() > 0


def test_what_is_saved_can_be_recomputed() -> None:
    tensors, calls = qkv(), []

    def layer(*given: Tensor) -> Tensor:
        calls.append(1)
        return attention(*given, kernel="chunkwise")

    expected = run(tensors, nullcontext())[1:]
    found = torch.autograd.grad(checkpoint(layer, *tensors, use_reentrant=False).square().sum(), tensors)
    assert len(calls) == 2
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_lse_has_no_gradient_and_a_second_derivative_is_refused() -> None:
    tensors = qkv()
    out, lse = attention(*tensors, kernel="chunkwise", return_lse=True)
    assert not lse.requires_grad
    (grad,) = torch.autograd.grad(out.square().sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="attention_backward"):
        grad.sum().backward()


def test_a_tensor_that_needs_no_gradient_has_none() -> None:
    q, k, v = qkv()
    out = attention(q, k.detach(), v.detach(), kernel="chunkwise")
    out.sum().backward()
    assert q.grad is not None
    assert k.grad is None


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were asked whether they serve a call."""
    found: list[str] = []
    ask: Callable[..., object] = dispatch.refusals
    monkeypatch.setattr(dispatch, "refusals", lambda kernel, *rest: found.append(kernel.name) or ask(kernel, *rest))
    dispatch._decided.clear()
    return found


def test_calls_that_differ_in_values_alone_are_asked_about_once(asked: list[str]) -> None:
    q, k, v = qkv()
    first = attention(q, k, v, kernel="chunkwise")
    second = attention(2 * q, k, v, kernel="chunkwise")
    assert asked == ["chunkwise"]
    assert not torch.equal(first, second)


def test_calls_that_differ_in_anything_else_are_asked_about_again(asked: list[str]) -> None:
    q, k, v = qkv()
    ids = torch.zeros(1, 6, dtype=torch.int64)
    for count, call in enumerate(
        (
            lambda: attention(q, k, v, kernel="chunkwise"),
            lambda: attention(q, k, v, kernel="chunkwise", pattern="full"),
            lambda: attention(q, k, v, kernel="chunkwise", scale=2.0),
            lambda: attention(q, k, v, kernel="chunkwise", deterministic=True),
            lambda: attention(q, k, v, kernel="chunkwise", segment_ids=ids),
            lambda: attention(q[:, :5], k[:, :5], v[:, :5], kernel="chunkwise"),
            lambda: attention(*qkv(torch.float64), kernel="chunkwise"),
        ),
        1,
    ):
        call()
        assert len(asked) == count


def test_what_is_remembered_is_bounded(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "MOST_DECIDED", 2)
    q, k, v = qkv()
    for length in range(1, 7):
        attention(q[:, :length], k[:, :length], v[:, :length], kernel="chunkwise")
        assert len(dispatch._decided) <= 2
    assert len(asked) == 6


def test_nothing_is_passed_by_where_no_gradient_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator._Direct, "apply", lambda *_: pytest.fail("nothing is recorded"))
    with torch.no_grad():
        assert attention(*qkv()).grad_fn is None
