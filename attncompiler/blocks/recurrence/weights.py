"""By how much tokens and states count for one another, in Triton.

Exponents are of base 2. A sum of decays up to a token is kept as a whole number and a remainder of at most 1/2, so that
the difference of two long sums still holds what lies between two tokens that are near: the sum is taken in fp64, of the
few numbers of a chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(-8192.0)
"""an exponent by which anything becomes 0, and of which a chunk's sum is exact"""


class Times(NamedTuple):
    """What says how tokens count for later ones; each None where there is nothing of it."""

    decay: Any
    """natural logarithms (B, T, H), by strides"""
    decay_batch: Any
    decay_token: Any
    decay_head: Any
    runs: Any
    """(B, T) int32: the number of the document a token is of"""
    real: Any
    """(B, T) uint8: 0 on padding"""


@triton.jit
def is_real(times, b, t, T):
    """Which of the tokens t there are, and are no padding."""
    there = t < T
    if times.real is not None:
        there &= tl.load(times.real + b.to(tl.int64) * T + t, mask=there, other=0) != 0
    return there


@triton.jit
def decays(times, b, h, t, real):
    """Sums of a chunk's decays up to and with each token, and of all, each as a whole number and a remainder."""
    at = times.decay + b.to(tl.int64) * times.decay_batch + h.to(tl.int64) * times.decay_head
    each = tl.load(at + t.to(tl.int64) * times.decay_token, mask=real, other=0.0).to(tl.float64) * LOG2E
    each = tl.where(each < LEAST, LEAST, each)  # a maximum would swallow NaN
    upto = tl.cumsum(each, 0)
    every = tl.sum(each, 0)
    whole, whole_of_all = tl.floor(upto + 0.5), tl.floor(every + 0.5)
    return (
        whole.to(tl.float32),
        (upto - whole).to(tl.float32),
        whole_of_all.to(tl.float32),
        (every - whole_of_all).to(tl.float32),
    )


@triton.jit
def weights_of(times, b, h, t, start, T, real, C: tl.constexpr, REVERSE: tl.constexpr, STRICT: tl.constexpr):
    """Of a chunk: (C, C) what columns count for rows; (C,) what the state before it (in reverse: behind it) counts for
    rows, and what columns count for the state on the other side; and what that state keeps of the first one.

    Without decays and documents the last three are 1.
    """
    i = tl.arange(0, C)
    ahead = i[None, :] - i[:, None] if REVERSE else i[:, None] - i[None, :]
    seen = ahead > 0 if STRICT else ahead >= 0
    enters, leaves = tl.full([C], 1.0, tl.float32), tl.full([C], 1.0, tl.float32)
    through = 1.0
    if times.decay is not None:
        whole, part, whole_of_all, part_of_all = decays(times, b, h, t, real)
        between = (whole[:, None] - whole[None, :]) + (part[:, None] - part[None, :])
        if REVERSE:
            between = -between
        weights = tl.exp2(tl.where(seen, between, float("-inf")))
        enters = tl.exp2(whole + part)
        leaves = tl.exp2((whole_of_all - whole) + (part_of_all - part))
        through = tl.exp2(whole_of_all + part_of_all)
    else:
        weights = tl.where(seen, 1.0, 0.0)
    if times.runs is not None:
        at = times.runs + b.to(tl.int64) * T
        run = tl.load(at + t, mask=t < T, other=-1)
        last = tl.load(at + tl.minimum(start + C, T) - 1)
        before = tl.load(at + tl.minimum(start, T) - 1, mask=start > 0, other=0)
        weights = tl.where(run[:, None] == run[None, :], weights, 0.0)
        enters = tl.where(run == before, enters, 0.0)
        leaves = tl.where(run == last, leaves, 0.0)
        through = tl.where(last == before, through, 0.0)
    if REVERSE:
        return weights, leaves, enters, through
    else:
        return weights, enters, leaves, through
