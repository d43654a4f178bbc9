"""Attention's operator around its kernels: what it saves, needs and refuses; strides; opcheck and torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attncompiler.errors import KernelError
from attncompiler.mechanisms.attention.kernels import chunkwise, sdpa
from attncompiler.mechanisms.attention.op import AttentionOptions, as_pattern, attention
from attncompiler.runtime.operator import no_site, options_text
from attncompiler.testing.memory import PeakMemory

WINDOW = {"kind": "sliding_window", "window": 256, "global_tokens": 4}
PATTERNS: tuple[Any, ...] = ("causal", "full", WINDOW, {**WINDOW, "window": 3, "causal": False})
KERNELS = ("sdpa", "chunkwise")


def tensors(B: int, T: int, H: int = 2, K: int = 1, D: int = 8, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(T)
    shapes = ((B, T, H, D), (B, T, K, D), (B, T, K, D))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def masks(B: int, T: int) -> dict[str, dict[str, Tensor]]:
    """Every kind of mask, by name."""
    index = torch.arange(T)
    segments = (index >= T // 3).long().expand(B, T).contiguous()
    padding = (index >= 2).expand(B, T).contiguous()
    places = index.flip(0).expand(B, T).contiguous()
    return {
        "none": {},
        "segments": {"segment_ids": segments},
        "padding": {"attention_mask": padding},
        "both": {"segment_ids": segments, "attention_mask": padding},
        "positions": {"q_positions": places, "kv_positions": places},
    }


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("by", "pattern"), [("sdpa", "causal"), ("chunkwise", WINDOW)], ids=["sdpa", "chunkwise"])
def test_a_backward_keeps_at_most_three_times_inputs_and_outputs(by: str, pattern: Any) -> None:
    q, k, v = tensors(1, 32768, H=1)
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out, lse = attention(q, k, v, pattern=pattern, kernel=by, return_lse=True)
    assert 0 < sum(saved.values()) <= 3 * sum(tensor.nbytes for tensor in (q, k, v, out, lse))


def peak(T: int, pattern: Any, **extra: Tensor) -> int:
    """What chunkwise needs at once, forward and backward, results included."""
    q, k, v = (tensor.detach() for tensor in tensors(1, T))
    inputs, options = {"q": q, "k": k, "v": v, **extra}, AttentionOptions(pattern=as_pattern(pattern))
    with PeakMemory() as memory:
        outputs = chunkwise.forward(inputs, options)
        chunkwise.backward({"out": outputs["out"]}, inputs, outputs, options)
    return memory.peak


@pytest.mark.parametrize("pattern", ["causal", WINDOW], ids=["causal", "window"])
@pytest.mark.parametrize("packed", [False, True])
def test_chunkwise_memory_is_linear_in_the_length(pattern: Any, packed: bool) -> None:
    def needed(T: int) -> int:
        extra = {"segment_ids": torch.arange(T)[None] // 1500} if packed else {}
        return peak(T, pattern, **extra)

    assert needed(4096) <= 2.1 * needed(2048)


def test_sdpa_refuses_a_mask_above_64_mib_and_chunkwise_serves_the_call() -> None:
    q, k, v = tensors(1, 4100, H=1)
    padding = torch.ones(1, 4100)
    for extra in ({"pattern": WINDOW}, {"attention_mask": padding}):
        with pytest.raises(KernelError, match=r"E501.*sdpa does not offer mask_bytes = 67240000"):
            attention(q, k, v, **extra, kernel="sdpa")
    assert attention(q, k, v, attention_mask=padding, kernel=["sdpa", "chunkwise"]).isfinite().all()
    assert attention(q, k, v, kernel="sdpa").isfinite().all()  # the causal flag needs no mask


def test_sdpa_refuses_values_of_another_width_and_chunkwise_serves_them() -> None:
    q, k, v = tensors(1, 9)
    with pytest.raises(KernelError, match="sdpa does not offer value_width = 5"):
        attention(q, k, v[..., :5], kernel="sdpa")
    narrow = attention(q, k, v[..., :5], kernel="chunkwise")
    torch.testing.assert_close(narrow, attention(q, k, v, kernel="chunkwise")[..., :5])


# --- strides and directions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", KERNELS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_any_strides_do(by: str, pattern: Any) -> None:
    leaves = tensors(2, 17, dtype=torch.float64)
    packed = torch.cat([leaf.flatten(2) for leaf in leaves], -1)
    views = [part.unflatten(-1, (-1, 8)) for part in packed.split([16, 8, 8], -1)]
    crossed = [leaf.transpose(1, 3).contiguous().transpose(1, 3) for leaf in leaves]
    expected = attention(*leaves, pattern=pattern, kernel=by)
    grads = torch.autograd.grad(expected, leaves, torch.ones_like(expected))
    for inputs in (views, crossed):
        out = attention(*inputs, pattern=pattern, kernel=by)
        assert out.is_contiguous()
        torch.testing.assert_close(out, expected)
        # the gradient of a sum is one number, expanded
        for got, grad in zip(torch.autograd.grad(out.sum(), leaves), grads, strict=True):
            torch.testing.assert_close(got, grad)


@pytest.mark.parametrize("mask", list(masks(1, 1)))
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_backward_may_run_on_another_kernel_than_its_forward(mask: str, pattern: Any) -> None:
    q, k, v = (tensor.detach() for tensor in tensors(2, 21, dtype=torch.float64))
    inputs, options = {"q": q, "k": k, "v": v, **masks(2, 21)[mask]}, AttentionOptions(pattern=as_pattern(pattern))
    dout = torch.ones_like(q)
    expected = sdpa.backward({"out": dout}, inputs, sdpa.forward(inputs, options), options)
    for first, second in ((sdpa, chunkwise), (chunkwise, sdpa)):
        found = second.backward({"out": dout}, inputs, first.forward(inputs, options), options)
        for name, grad in expected.items():
            torch.testing.assert_close(found[name], grad)
            assert found[name].is_contiguous()


# --- torch's machinery ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", KERNELS)
@pytest.mark.parametrize("mask", ["both", "positions"])
def test_opcheck(by: str, mask: str) -> None:
    extra = masks(2, 11)[mask]
    options = AttentionOptions(kernel=(by,), pattern=as_pattern({**WINDOW, "window": 3}))
    names = ",".join(("q", "k", "v", *extra))
    arguments = ([*tensors(2, 11), *extra.values()], f"{names}|{options_text(options)}", no_site())
    torch.library.opcheck(torch.ops.attncompiler.attention.default, arguments)


@pytest.mark.parametrize("by", KERNELS)
@pytest.mark.parametrize("mask", list(masks(1, 1)))
def test_compiles_without_a_break(by: str, mask: str) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Tensor]) -> Tensor:
        window = attention(q, k, v, pattern={**WINDOW, "window": 3}, kernel=by, **extra)
        return window + attention(window, k, v, pattern="causal", kernel=by, **extra)

    leaves = tensors(2, 13)
    extra = masks(2, 13)[mask]
    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves, extra)
    plain = run(*leaves, extra)
    assert torch.equal(compiled, plain)
    found, expected = (torch.autograd.grad(out.square().sum(), leaves) for out in (compiled, plain))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_one_compiled_graph_serves_every_length() -> None:
    counter = torch._dynamo.testing.CompileCounter()
    torch.compiler.reset()
    run = torch.compile(lambda q, k, v: attention(q, k, v), fullgraph=True, backend=counter, dynamic=True)
    for T in (5, 8, 33):
        leaves = tensors(1, T)
        torch.testing.assert_close(run(*leaves), attention(*leaves))
    assert counter.frame_count == 1
