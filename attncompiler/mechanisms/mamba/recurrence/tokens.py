"""What tokens are to the scan, in Triton: where their numbers lie among a warp's threads, and their time steps.

A program is one warp and has a block of CT·LC channels with their N numbers of state, padded to NO·NI·LN. LN threads
share a channel: a thread holds NO·NI numbers of CT channels, so the sum over a channel's numbers takes log LN steps
between threads, and that over the block's channels log LC. States are [NO, NI, CT, LN, LC]: by Triton's own rule the
last two axes are the warp's 32 threads, and the others a thread's registers. What a token has once for each channel is
[CT, LC]: a channel for a thread, where there are CT threads to a channel.

Triton lays out every load and store by itself, by which of its axes memory is contiguous along; among the other axes
some versions give threads to the first ones, some to the last. So no tensor that is loaded or stored has more axes, or
larger ones, than its contiguous numbers and the warp's threads fill: ROWS tokens are loaded together but are a tuple of
tensors, and states are loaded and stored channel by channel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attncompiler.blocks.launching.numbers import empty, softplus, widened

LN2 = tl.constexpr(0.6931471805599453)


class Rows(NamedTuple):
    """A tensor (B, T, E) with a token's numbers side by side. `token`, a constant, makes addresses of constants.

    An operand is no field of another tuple: Triton 3.6 forgets which fields of those are constants. Where a call has
    no such tensor, `ptr` is None.
    """

    ptr: Any
    batch: Any
    token: Any


class Shared(NamedTuple):
    """B or C (B, T, G, N), with each group's numbers side by side; `token` as of Rows."""

    ptr: Any
    batch: Any
    token: Any
    group: Any


class Scan(NamedTuple):
    """What else a call has; None for what there is not."""

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
def which_real(scan, b, t0, T, ROWS: tl.constexpr):
    """Of each of the tokens from t0 on, whether there is one, and it is no padding."""
    found = empty()
    for r in tl.static_range(ROWS):
        there = t0 + r < T
        if scan.real is not None:
            there &= tl.load(scan.real + b.to(tl.int64) * T + t0 + r, mask=there, other=0) != 0
        found += (there,)
    return found


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
def numbers(NO: tl.constexpr, NI: tl.constexpr, LN: tl.constexpr):
    """Which of a channel's numbers lie where, [NO, NI, 1, LN, 1]."""
    n = tl.arange(0, NO)[:, None, None] * (LN * NI) + tl.arange(0, LN)[None, None, :] * NI
    n += tl.arange(0, NI)[None, :, None]
    return n[:, :, None, :, None]


@triton.jit
def channel(x, c, CT: tl.constexpr):
    """Channel c of [NO, NI, CT, LN, LC]. As whole numbers: to add 0 to a number is no instruction only there."""
    bits = tl.where(tl.arange(0, CT)[None, None, :, None, None] == c, x.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, 2)[:, :, None].to(tl.float32, bitcast=True)


@triton.jit
def with_channel(x, one, c, CT: tl.constexpr):
    """[NO, NI, CT, LN, LC] with `one` as its channel c."""
    return tl.where(tl.arange(0, CT)[None, None, :, None, None] == c, one, x)


@triton.jit
def places(first, end, N: tl.constexpr, NO: tl.constexpr, NI: tl.constexpr, LN: tl.constexpr, LC: tl.constexpr):
    """Where the numbers of LC channels from `first` on lie in (E, N), [NO, NI, 1, LN, LC], and which there are."""
    n = numbers(NO, NI, LN)
    e = first + tl.arange(0, LC)[None, None, None, None, :]
    return e.to(tl.int64) * N + n, (n < N) & (e < end)


@triton.jit
def states_of(
    ptr, first, end, there,
    N: tl.constexpr, NO: tl.constexpr, NI: tl.constexpr, CT: tl.constexpr, LN: tl.constexpr, LC: tl.constexpr,
):  # fmt: skip
    """The numbers of (E, N) of a block's channels from `first` on; 0 where there are none, or not `there`."""
    found = tl.zeros([NO, NI, CT, LN, LC], tl.float32)
    for c in tl.static_range(CT):
        at, which = places(first + c * LC, end, N, NO, NI, LN, LC)
        found = with_channel(found, widened(tl.load(ptr + at, mask=which & there, other=0.0)), c, CT)
    return found


@triton.jit
def keep_states(
    ptr, x, first, end,
    N: tl.constexpr, NO: tl.constexpr, NI: tl.constexpr, CT: tl.constexpr, LN: tl.constexpr, LC: tl.constexpr,
):  # fmt: skip
    """Write what `states_of` reads."""
    for c in tl.static_range(CT):
        at, which = places(first + c * LC, end, N, NO, NI, LN, LC)
        tl.store(ptr + at, channel(x, c, CT).to(ptr.dtype.element_ty), mask=which)


@triton.jit
def of_channels(ptr, e, inside):
    """Parameters (E) of the block's channels; 0 where there are none."""
    found = tl.zeros(e.shape, tl.float32)
    if ptr is not None:
        found = tl.load(ptr + e, mask=inside, other=0.0)
    return found


@triton.jit
def all_widened(numbers, ROWS: tl.constexpr):
    """Of several tokens."""
    found = empty()
    for r in tl.static_range(ROWS):
        found += (widened(numbers[r]),)
    return found


@triton.jit
def loaded_rows(rows, b, t0, e, inside, real, ROWS: tl.constexpr):
    """Tokens' numbers [CT, LC] as they are; 0 where there are none, or the token is not `real`."""
    at = rows.ptr + (b.to(tl.int64) * rows.batch + t0.to(tl.int64) * rows.token) + e
    found = empty()
    for r in tl.static_range(ROWS):
        found += (tl.load(at + r * rows.token, mask=inside & real[r], other=0.0),)
    return found


@triton.jit
def loaded_shared(
    shared, b, t0, group, real, ROWS: tl.constexpr, N: tl.constexpr,
    NO: tl.constexpr, NI: tl.constexpr, LN: tl.constexpr, LC: tl.constexpr,
):  # fmt: skip
    """Tokens' numbers of B or C [NO, NI, 1, LN, LC] as they are; 0 where the token is not `real`."""
    at = shared.ptr + (b.to(tl.int64) * shared.batch + t0.to(tl.int64) * shared.token + group * shared.group)
    # each thread loads what it needs, NI numbers at once: all threads together need the same few
    n = numbers(NO, NI, LN) + tl.zeros([1, 1, 1, 1, LC], tl.int32)
    found = empty()
    for r in tl.static_range(ROWS):
        found += (tl.load(at + n + r * shared.token, mask=(n < N) & real[r], other=0.0),)
    return found


@triton.jit
def of_shared(
    shared, b, t0, group, real, ROWS: tl.constexpr, N: tl.constexpr,
    NO: tl.constexpr, NI: tl.constexpr, LN: tl.constexpr, LC: tl.constexpr,
):  # fmt: skip
    """The same in fp32."""
    return all_widened(loaded_shared(shared, b, t0, group, real, ROWS, N, NO, NI, LN, LC), ROWS)


@triton.jit
def spread(x):
    """[CT, LC] to all threads that share its channels: [1, 1, CT, 1, LC]."""
    return x[None, None, :, None, :]


@triton.jit
def over_states(x, CT: tl.constexpr, LN: tl.constexpr):
    """The sum of [NO, NI, CT, LN, LC] over each channel's numbers, [CT, LC]."""
    whole = tl.sum(tl.sum(tl.sum(x, 0), 0), 1)
    if CT == LN and CT > 1:
        # each of the threads that share channels takes one of them on
        mine = tl.arange(0, CT)[:, None, None] == tl.arange(0, LN)[None, :, None]
        whole = tl.sum(tl.where(mine, whole[:, None, :], 0.0), 0)
    return whole


@triton.jit
def over_channels(x):
    """The sum of [NO, NI, CT, LN, LC] over the block's channels, [NO, NI, LN]."""
    return tl.sum(tl.sum(x, 2), 3)


@triton.jit
def steps_of(loaded, scan, bias, inside, real, SOFTPLUS: tl.constexpr, ROWS: tl.constexpr):
    """Of tokens the time steps Δ, and the derivatives of Δ by dt, [CT, LC], all 0 where nothing is, from dt as it was
    loaded."""
    steps = empty()
    slopes = empty()
    for r in tl.static_range(ROWS):
        raw = widened(loaded[r])
        if scan.bias is not None:
            raw += bias
        slope = tl.where(inside & real[r], 1.0, 0.0)
        if SOFTPLUS:
            step, small = softplus(raw)
            slope *= tl.where(raw > 0, 1.0, small) / (1 + small)
        else:
            step = raw
        steps += (tl.where(inside & real[r], step, 0.0),)
        slopes += (slope,)
    return steps, slopes
