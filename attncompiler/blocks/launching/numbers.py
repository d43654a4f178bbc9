"""Numbers one by one, in Triton: how they are widened, what they go through, and how several are held."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def empty():
    """A tuple of no tensors yet, to which they are added one after the other."""
    return ()


@triton.jit
def widened(x):
    """In fp32. bf16 by its bits, one instruction for each: the conversion has two for every second of a pair."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def softplus(x):
    """log(1 + exp x), and exp(−|x|).

    log(1 + e) is e times a polynomial, for e from 0 to 1 within 1.5e-7 of itself however small e is: fitted by
    Lawson's iteration. A GPU's own logarithm is no nearer than that to the logarithm of numbers near 1.
    """
    e = tl.exp2(tl.abs(x) * (-LOG2E))
    p = 0.005232687910573227
    p = p * e - 0.02950521331674659
    p = p * e + 0.07822591041755883
    p = p * e - 0.13663242277822915
    p = p * e + 0.1910600510712983
    p = p * e - 0.24842981791146335
    p = p * e + 0.3331909675446348
    p = p * e - 0.49999493137933254
    p = p * e + 0.9999999698793604
    return tl.where(x > 0, x, 0.0) + e * p, e


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(−x)), by no power of a large number; of 2, which flushes to 0 what takes four instructions more."""
    small = tl.exp2(tl.abs(x) * (-LOG2E))
    return tl.where(x < 0, small, 1.0) / (1 + small)


@triton.jit
def silu_slope(x, gate):
    """The derivative of x·sigmoid(x), whose `gate` is sigmoid(x)."""
    return gate * (1 + x * (1 - gate))
