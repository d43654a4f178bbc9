"""Numbers one by one, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def widened(x):
    """In fp32. bf16 by its bits, one instruction for each: the conversion has two for every second of a pair."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(−x)), by no power of a large number."""
    small = tl.exp2(tl.abs(x) * (-LOG2E))
    return tl.where(x < 0, small, 1.0) / (1 + small)


@triton.jit
def silu_slope(x, gate):
    """The derivative of x·sigmoid(x), whose `gate` is sigmoid(x)."""
    return gate * (1 + x * (1 - gate))
