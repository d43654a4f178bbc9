"""Weights too small to count: what replaces them, and that no kernel multiplies with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attncompiler.blocks.underflow import LOG2_E, exp2_, flush_, flush_signed_
from attncompiler.mechanisms.attention.kernels import chunkwise as attention
from attncompiler.mechanisms.attention.op import AttentionOptions
from attncompiler.mechanisms.attention.pattern import SlidingWindow
from attncompiler.mechanisms.linear_attention.kernels import chunkwise as linear_attention
from attncompiler.mechanisms.linear_attention.op import LinearAttentionOptions
from attncompiler.mechanisms.linformer.kernels import sdpa as linformer
from attncompiler.mechanisms.linformer.op import LinformerOptions
from attncompiler.mechanisms.mamba2.kernels import chunkwise as mamba2
from attncompiler.mechanisms.mamba2.op import Mamba2Options
from attncompiler.runtime.implementation import Implementation

LEAST = {torch.float32: -100.0, torch.float64: -996.0}


@pytest.mark.parametrize("dtype", LEAST)
def test_powers_of_two_are_exact_or_zero(dtype: torch.dtype) -> None:
    least = LEAST[dtype]
    kept = torch.linspace(least + 0.5, 20, 999, dtype=dtype)
    torch.testing.assert_close(exp2_(kept.clone()), torch.exp2(kept), rtol=0, atol=0)
    gone = torch.tensor([least, least - 1, 2 * least, -torch.inf], dtype=dtype)
    assert torch.equal(exp2_(gone), torch.zeros_like(gone))
    assert exp2_(torch.full((1,), torch.nan, dtype=dtype)).isnan().all(), "a fault upstream must show"
    natural = torch.linspace(-60, 5, 99, dtype=dtype)
    torch.testing.assert_close(exp2_(natural * LOG2_E), natural.exp())


@pytest.mark.parametrize("dtype", LEAST)
def test_weights_are_kept_or_zero(dtype: torch.dtype) -> None:
    least = torch.tensor(2.0 ** LEAST[dtype], dtype=dtype)
    weights = torch.stack([least, least / 2, least * 2**-30, 0 * least, least * 1.01, least / least, least * torch.nan])
    assert torch.equal(
        flush_(weights.clone()).nan_to_num(nan=7),
        torch.where(weights > least, weights, 0).nan_to_num() + 7 * weights.isnan(),
    )
    signed = torch.cat([weights, -weights])
    assert torch.equal(
        flush_signed_(signed.clone()).nan_to_num(nan=7),
        torch.where(signed.abs() > least, signed, 0).nan_to_num() + 7 * signed.isnan(),
    )


class Products(TorchDispatchMode):
    """Collects what the products of tensors read that is subnormal."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.subnormal: list[str] = []

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = op.overloadpacket._qualified_op_name.removeprefix("aten::")
        if name in ("bmm", "mm", "mul", "mul_", "addcmul", "addcmul_"):
            self.count += 1
            for tensor in args:
                if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                    size = tensor.abs()
                    if ((size > 0) & (size < torch.finfo(torch.float32).tiny)).any():
                        self.subnormal.append(name)
        return op(*args, **(kwargs or {}))


def far_apart(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 5


def attention_call() -> tuple[dict[str, Tensor], Any]:
    q, k, v = (far_apart(1, 64, 2, 16) for _ in range(3))
    return {"q": q, "k": k.flip(1), "v": v}, AttentionOptions(pattern=SlidingWindow(window=32))


def linformer_call() -> tuple[dict[str, Tensor], Any]:
    q, k, v = (far_apart(1, 64, 2, 16) for _ in range(3))
    return {
        "q": q,
        "k": k.flip(1),
        "v": v,
        "key_projection": far_apart(8, 64) / 10,
        "value_projection": far_apart(8, 64),
    }, (LinformerOptions())


def favor_call() -> tuple[dict[str, Tensor], Any]:
    q, k, v = (far_apart(1, 128, 2, 16) for _ in range(3))
    decays = torch.linspace(-3, -0.01, 128)[None, :, None].expand(1, 128, 2).contiguous()
    given = {"q": q, "k": k.flip(1), "v": v, "projection": far_apart(24, 16) / 5, "log_decay": decays}
    return given, LinearAttentionOptions(feature_map="favor", eps=1e-30)


def mamba2_call() -> tuple[dict[str, Tensor], Any]:
    x, b, c = far_apart(1, 128, 2, 8), far_apart(1, 128, 1, 8), far_apart(1, 128, 1, 8)
    dt = torch.linspace(0.5, 2, 128)[None, :, None].expand(1, 128, 2).contiguous()
    return {"x": x, "dt": dt, "a": torch.tensor([-1.0, -3.0]), "b": b, "c": c}, Mamba2Options(dt_softplus=False)


@pytest.mark.parametrize(
    ("by", "call"),
    [
        (attention.KERNEL, attention_call),
        (linear_attention.KERNEL, favor_call),
        (linformer.KERNEL, linformer_call),
        (mamba2.KERNEL, mamba2_call),
    ],
    ids=["attention", "favor", "linformer", "mamba2"],
)
def test_no_product_reads_a_subnormal_number(
    by: Implementation, call: Callable[[], tuple[dict[str, Tensor], Any]]
) -> None:
    inputs, options = call()
    with Products() as products:
        outputs = by.forward(inputs, options)
        by.backward({"out": torch.ones_like(outputs["out"])}, inputs, outputs, options)
    assert products.count > 10
    assert not products.subnormal
