"""What one token is to the scan, in Triton: where its numbers lie among a warp's threads, its time step and its step.

A program is one warp and has a block of CT·LC channels with their N numbers of state, padded to NT·LN. LN threads share
a channel: a thread holds NT numbers of CT channels, so the sum over a channel's numbers is NT in the thread and log LN
steps between threads, that over the block's channels CT and log LC steps, and B and C are NT numbers of a thread. States
are [NT, CT, LN, LC]: by Triton's own rule the last two axes are the warp's 32 threads. What a token has once for each
channel is [CT, LC], a channel for a thread.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Rows(NamedTuple):
    """A tensor (B, T, …) of which each token's numbers lie side by side."""

    ptr: Any
    batch: Any
    token: Any


class Shared(NamedTuple):
    """B or C (B, T, G, N), with each group's numbers side by side."""

    ptr: Any
    batch: Any
    token: Any
    group: Any


class Scan(NamedTuple):
    """A call's tensors; None for what there is not."""

    u: Any
    """Rows (B, T, E), as are dt and z"""
    dt: Any
    z: Any
    b: Any
    """Shared (B, T, G, N), as is c"""
    c: Any
    a: Any
    """(E, N) fp32, times log2 e: decays are powers of 2"""
    d: Any
    """(E) fp32, as is bias"""
    bias: Any
    runs: Any
    """(B, T) int32: the number of the document a token is of, from 0"""
    real: Any
    """(B, T) uint8: 0 on padding"""


@triton.jit
def softplus(x):
    """log(1 + exp x), and exp(−|x|).

    log(1 + e) is e times a polynomial, for e from 0 to 1 within 1.5e-7 of itself however small e is: fitted by
    Lawson's iteration. The logarithm of a GPU is as near only to numbers that are not near 1.
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
def is_real(scan, b, t, T):
    """Whether token t is there, and no padding."""
    there = t < T
    if scan.real is not None:
        there = tl.load(scan.real + b.to(tl.int64) * T + t, mask=there, other=0) != 0
    return there


@triton.jit
def run_of(scan, b, t, T):
    """The document of a token; before the first one that of the first, behind the last that of the last."""
    t = tl.where(t < 0, 0, tl.where(t < T, t, T - 1))
    return tl.load(scan.runs + b.to(tl.int64) * T + t)


@triton.jit
def channels(first, unit, CT: tl.constexpr, LC: tl.constexpr):
    """The block's channels [CT, LC] from `first` on.

    `unit` is 1, of which the compiler is not told: it would have a thread load several channels at once, and then
    move them to where they are used.
    """
    return first + (tl.arange(0, CT)[:, None] * LC + tl.arange(0, LC)[None, :]) * unit


@triton.jit
def numbers(unit, NO: tl.constexpr, NI: tl.constexpr, LN: tl.constexpr):
    """Which of a channel's numbers lie where, [NO, NI, 1, LN, 1]."""
    n = tl.arange(0, NO)[:, None, None] * (LN * NI) + tl.arange(0, LN)[None, None, :] * NI
    n += tl.arange(0, NI)[None, :, None] * unit
    return n[:, :, None, :, None]


@triton.jit
def per_channel(rows, b, t, e, there):
    """A token's numbers [CT, LC] in fp32; 0 where there are none."""
    at = rows.ptr + (b.to(tl.int64) * rows.batch + t.to(tl.int64) * rows.token)
    return tl.load(at + e, mask=there, other=0.0).to(tl.float32)


@triton.jit
def per_state(
    shared, b, t, group, there,
    N: tl.constexpr, NO: tl.constexpr, NI: tl.constexpr, LN: tl.constexpr, LC: tl.constexpr,
):  # fmt: skip
    """A token's numbers of B or C, [NO, NI, 1, LN, LC] in fp32; 0 where there are none."""
    at = shared.ptr + (b.to(tl.int64) * shared.batch + t.to(tl.int64) * shared.token + group * shared.group)
    # each thread reads what it needs, NI numbers at once: all threads together need the same few
    n = numbers(1, NO, NI, LN) + tl.zeros([1, 1, 1, 1, LC], tl.int32)
    return tl.load(at + n, mask=there & (n < N), other=0.0).to(tl.float32)


@triton.jit
def raw_step(scan, bias, b, t, e, there):
    """dt + dt_bias [CT, LC]."""
    raw = per_channel(scan.dt, b, t, e, there)
    if scan.bias is not None:
        raw += bias
    return raw


@triton.jit
def over_states(x):
    """The sum of [NO, NI, CT, LN, LC] over each channel's numbers, [CT, LC]."""
    return tl.sum(tl.sum(tl.sum(x, 0), 0), 1)


@triton.jit
def over_channels(x):
    """The sum of [NO, NI, CT, LN, LC] over the block's channels, [NO, NI, LN]."""
    return tl.sum(tl.sum(x, 2), 3)


@triton.jit
def spread(x):
    """[CT, LC] as [1, 1, CT, 1, LC]."""
    return x[None, None, :, None, :]
