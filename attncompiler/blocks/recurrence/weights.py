"""By how much tokens and states count for one another, in Triton.

Exponents are of base 2. A sum of decays up to a token is kept as a whole number and a remainder of at most 1/2, so that
the difference of two long sums still holds what lies between two tokens that are near: the sum is taken in fp64, of the
few numbers of a chunk, once for all programs of a head.

Where sums are kept as multiples of the exponential of a running maximum there are marks in the place of decays: a
column with mark m counts for a row whose maximum is M by 2^(m − M), and a state by that of the last token that it has.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(-8192.0)
"""an exponent by which anything becomes 0, and of which a chunk's sum is exact"""
LOWEST = tl.constexpr(-3.4028234663852886e38)
"""fp32's least number, a maximum of nothing: −∞ less it is −∞, where less itself that is NaN"""


class Times(NamedTuple):
    """What says how tokens count for later ones; each None where there is nothing of it."""

    sums: Any
    """(2, B, H, T): of decays, as `sums_kernel` leaves them"""
    marks: Any
    """(2, B, H, T): the running maxima and the tokens' own marks, where there are no decays"""
    first: Any
    """(B, H): the maximum before the first token; None where it is the least there is"""
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


@triton.jit(do_not_specialize=["T", "H", "apart"])
def sums_kernel(
    decay, batch, token, head, real, sums, T, H, apart, C: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Sums of decays (B, T, H), natural logarithms by strides, from the first token of each chunk of C on.

    sums (2, B, H, T), `apart` from one another: those up to and with each token, as whole numbers and remainders.
    Padding, by `real` (B, T), has a decay of 0.
    """
    blocks, chunks = tl.cdiv(H, HEADS), tl.cdiv(T, C)
    place = tl.program_id(0) // blocks
    b, t = place // chunks, place % chunks * C + tl.arange(0, C)
    h = tl.program_id(0) % blocks * HEADS + tl.arange(0, HEADS)
    there = t < T
    if real is not None:
        there &= tl.load(real + b.to(tl.int64) * T + t, mask=there, other=0) != 0
    at = decay + b.to(tl.int64) * batch + t.to(tl.int64)[:, None] * token + h.to(tl.int64)[None, :] * head
    each = tl.load(at, mask=there[:, None] & (h < H)[None, :], other=0.0).to(tl.float64) * LOG2E
    each = tl.where(each < LEAST, LEAST, each)  # a maximum would swallow NaN
    upto = tl.cumsum(each, 0)
    whole = tl.floor(upto + 0.5)
    at = sums + (b.to(tl.int64) * H + h)[None, :] * T + t[:, None]
    inside = (t < T)[:, None] & (h < H)[None, :]
    tl.store(at, whole.to(tl.float32), mask=inside)
    tl.store(at + apart, (upto - whole).to(tl.float32), mask=inside)


@triton.jit
def place_of(both, start, T, C: tl.constexpr, WHOLE: tl.constexpr):
    """Where a chunk begins in (B, H, T): at a multiple of C where chunks are WHOLE, which wide loads must know."""
    place = both.to(tl.int64) * T + start
    return tl.multiple_of(place, C) if WHOLE else place


@triton.jit
def chunk_met(i, stop, behind, T, C: tl.constexpr, REVERSE: tl.constexpr):
    """The number of the chunk met as the i-th of all, or of the last before `stop`; some chunk there is, always."""
    i = tl.minimum(i, stop - 1)
    chunk = behind - 1 - i if REVERSE else i
    return tl.maximum(tl.minimum(chunk, tl.cdiv(T, C) - 1), 0)


@triton.jit
def sums_of(times, both, start, T, apart, C: tl.constexpr, WHOLE: tl.constexpr):
    """Of a chunk of one head: the decays' sums up to its tokens, as whole numbers and remainders; and those of all. Of
    marks: its tokens' maxima and marks; and the last token's maximum, and that of the token before them."""
    held = tl.arange(0, C)
    if WHOLE:
        apart = tl.multiple_of(apart, C)
        end = C - 1
    else:
        end = tl.minimum(C, T - start) - 1
        held = tl.minimum(held, end)  # what lies behind the last token is as far as that
    if times.marks is not None:
        at = times.marks + place_of(both, start, T, C, WHOLE)
        before = tl.where(start > 0, tl.load(at - tl.minimum(start, 1)), LOWEST)
        if times.first is not None:
            before = tl.where(start > 0, before, tl.load(times.first + both))
        return tl.load(at + held), tl.load(at + apart + held), tl.load(at + end), before
    else:
        at = times.sums + place_of(both, start, T, C, WHOLE)
        return tl.load(at + held), tl.load(at + apart + held), tl.load(at + end), tl.load(at + apart + end)


@triton.jit
def weights_by(
    times, whole, part, whole_of_all, part_of_all, b, start, T,
    C: tl.constexpr, REVERSE: tl.constexpr, STRICT: tl.constexpr,
):  # fmt: skip
    """Of a chunk: (C, C) what columns count for rows, and which of them count; (C,) what the state before it (in
    reverse: behind it) counts for rows, and what columns count for the state on the other side; and what that state
    keeps of the first one.

    Without decays the first is 1, and the last three are where there are no documents either.
    """
    i = tl.arange(0, C)
    ahead = i[None, :] - i[:, None] if REVERSE else i[:, None] - i[None, :]
    seen = ahead > 0 if STRICT else ahead >= 0
    enters, leaves = tl.full([C], 1.0, tl.float32), tl.full([C], 1.0, tl.float32)
    weights, through = 1.0, 1.0
    if times.runs is not None:
        at = times.runs + b.to(tl.int64) * T
        run = tl.load(at + start + i, mask=start + i < T, other=-1)
        last = tl.load(at + tl.minimum(start + C, T) - 1)
        before = tl.load(at + start - 1, mask=start > 0, other=0)
        seen &= run[:, None] == run[None, :]
    if times.sums is not None:
        between = (whole[:, None] - whole[None, :]) + (part[:, None] - part[None, :])
        weights = tl.exp2(tl.where(seen, -between if REVERSE else between, 0.0))
        enters = tl.exp2(whole + part)
        leaves = tl.exp2((whole_of_all - whole) + (part_of_all - part))
        through = tl.exp2(whole_of_all + part_of_all)
    if times.marks is not None:
        between = part[:, None] - whole[None, :] if REVERSE else part[None, :] - whole[:, None]
        weights = tl.exp2(tl.where(seen, between, 0.0))
        enters = tl.exp2(part_of_all - whole)
        leaves = tl.exp2(part - whole_of_all)
        through = tl.exp2(part_of_all - whole_of_all)
    if times.runs is not None:
        enters = tl.where(run == before, enters, 0.0)
        leaves = tl.where(run == last, leaves, 0.0)
        through = tl.where(last == before, through, 0.0)
    if REVERSE:
        return weights, seen, leaves, enters, through
    else:
        return weights, seen, enters, leaves, through
