"""Tensors and numbers as both kernels for Hopper are given them: descriptors for the copy engine, scales in base 2."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

LOG2E = math.log2(math.e)
# made once: a layout checks itself for longer than a descriptor takes
_HEADS = gl.NVMMASharedLayout(128, 16, 4)
_NUMBERS = gl.NVMMASharedLayout(0, 32, 2)


def describe(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """Heads (B, T, H, D) of 16 bits, `mappable`, of which a copy brings `rows` tokens of one head."""
    return _descriptor(x, _heads(x.shape, x.stride(), x.dtype, rows))


def describe_numbers(x: torch.Tensor, *block: int) -> TensorDescriptor:
    """A contiguous table (·, ·) of numbers of 32 bits, of which a copy brings a block."""
    return _descriptor(x, _numbers(x.shape, x.dtype, block))


def _descriptor(x: torch.Tensor, facts: dict[str, Any]) -> TensorDescriptor:
    # past its own initializer, whose checks take longer than the launch: `facts` have passed them
    made = object.__new__(TensorDescriptor)
    made.__dict__.update(facts, base=x)
    return made


@lru_cache(maxsize=4096)
def _heads(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, rows: int) -> dict[str, Any]:
    """The fields of a descriptor of such heads but its base, as Triton has checked them."""
    B, T, H, D = shape
    # the copy engine wants strides of whole 16 bytes, also where there is but one element to step over
    b, t, h, _ = stride
    strides = [b if B > 1 else D, t if T > 1 else D, h if H > 1 else D, 1]
    return vars(TensorDescriptor(torch.empty(0, dtype=dtype), [B, T, H, D], strides, [1, rows, 1, D], _HEADS))


@lru_cache(maxsize=4096)
def _numbers(shape: torch.Size, dtype: torch.dtype, block: tuple[int, ...]) -> dict[str, Any]:
    return vars(TensorDescriptor(torch.empty(0, dtype=dtype), list(shape), [shape[1], 1], list(block), _NUMBERS))


def mappable(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where the copy engine cannot read it in place."""
    if x.is_contiguous() and x.shape[-1] % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    steps = [stride for n, stride in zip(x.shape, x.stride(), strict=True) if n > 1]
    aligned = x.data_ptr() % 16 == 0 and all(step > 0 and step % 8 == 0 for step in steps[:-1])
    return x if aligned and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def scales_of(scale: float, softcap: float | None) -> tuple[float, float]:
    """What makes q k a score in base 2; with a softcap what makes it that of its `capped`, and the argument of this.

    A cap beyond 1e±30 acts as one there, and keeps both numbers within float32.
    """
    if softcap is None:
        return scale * LOG2E, 0.0
    softcap = min(max(softcap, 1e-30), 1e30)
    return softcap * LOG2E, 2.0 * LOG2E * scale / softcap
