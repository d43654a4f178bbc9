"""The pass over the chunks of a sequence, and the carrying of states from group to group."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attncompiler.blocks.recurrence.weights import chunk_met, is_real, place_of, sums_of, weights_by


class Operand(NamedTuple):
    """x, y or u (B, T, heads, width) by its strides; `share` heads of the call read one of its own."""

    ptr: Any
    batch: Any
    token: Any
    head: Any
    share: Any


class Added(NamedTuple):
    """One width more of x and y: a number for each token (B, H, T), fp32; None where it is 1."""

    rows: Any
    columns: Any


class Skip(NamedTuple):
    """What is added to `out` at last: this share of u."""

    ptr: Any
    """(H, W) by strides, fp32; None where there is none"""
    head: Any
    width: Any


class Result(NamedTuple):
    """Where what is found goes, each contiguous and None where nobody asks for it."""

    out: Any
    """(B, T, H, W)"""
    total: Any
    """(B, T, H): Σ_c w x·y, plus eps and as the divisor of `out` where it is normalised"""
    dots: Any
    """(2, blocks of W, B, H, T): the raw operand times what the state gives of out; and, not in reverse, the pairs of a
    chunk that pass the token: their column is behind it, and their row is not"""
    factor: Any
    """(B, H, T): what a token's numbers are multiplied by in `out`, fp32"""
    levels: Any
    """(B, H, T): the logarithm of what a token's sums are multiples of, fp32; `eps` then is a logarithm, and `total`"""
    final: Any
    """(B, H, M): the state behind the last chunk, flat, and the sums of one width more behind it"""


LEAST_DIVISOR = tl.constexpr(2.0**-126)
"""fp32's least normal number"""


@triton.jit
def mapped(x, MAP: tl.constexpr):
    """φ(x)."""
    if MAP == "elu":
        x = tl.where(x > 0, x + 1, tl.exp(tl.where(x > 0, 0.0, x)))  # a GPU's minimum and maximum swallow NaN
    else:
        x = tl.where(x < 0, 0.0, x)
    return x


@triton.jit
def slope(phi, MAP: tl.constexpr):
    """φ' by φ."""
    if MAP == "elu":
        phi = tl.where(phi > 1, 1.0, phi)
    elif MAP == "relu":
        phi = tl.where(phi == 0, 0.0, 1.0)
    return phi


@triton.jit
def quotient(total, level, eps):
    """What sums that are multiples of exp(level) are multiplied by to be divided by their total and exp(eps), and the
    logarithm of that divisor: both sums are brought to the larger of the two, so that neither overflows."""
    above = level - eps
    larger = tl.where(above > 0, above, 0.0)
    shrink = tl.exp(tl.where(above < 0, above, 0.0))
    divisor = total * shrink + tl.exp(-larger)
    divisor = tl.where(divisor < LEAST_DIVISOR, LEAST_DIVISOR, divisor)
    return shrink / divisor, tl.log(divisor) + larger + eps


@triton.jit
def weighted(x, weight, RUNS: tl.constexpr):
    """x times a weight; with documents, 0 where that is 0: what is not seen is not finite somewhere."""
    if RUNS:
        return tl.where(weight == 0, 0.0, x * weight)
    else:
        return x * weight


@triton.jit
def in_halves(x, DTYPE: tl.constexpr):
    """Numbers (C,) as columns (C, 16) of an operand: eight times rounded, and eight times what that leaves."""
    rounded = x.to(DTYPE)
    left = (x - rounded.to(tl.float32)).to(DTYPE)
    return tl.where(tl.arange(0, 16)[None, :] < 8, rounded[:, None], left[:, None])


@triton.jit
def per_token(base, both, start, T, there, C: tl.constexpr, WHOLE: tl.constexpr):
    """Numbers (B, H, T) of a chunk's tokens, 0 where there are none, all of which there are where WHOLE."""
    at = base + place_of(both, start, T, C, WHOLE) + tl.arange(0, C)
    return tl.load(at) if WHOLE else tl.load(at, mask=there, other=0.0)


@triton.jit
def tile(operand, b, h, t, first, there, WIDTH: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """An operand's tokens t, columns from `first` on; 0 where there is nothing. Every token is there where WHOLE."""
    c = first + tl.arange(0, BLOCK)
    at = operand.ptr + b.to(tl.int64) * operand.batch + (h // operand.share).to(tl.int64) * operand.head
    at = at + t.to(tl.int64)[:, None] * operand.token + c[None, :]
    if WIDTH % BLOCK == 0:
        return tl.load(at) if WHOLE else tl.load(at, mask=there[:, None], other=0.0)
    else:
        return tl.load(at, mask=there[:, None] & (c < WIDTH)[None, :], other=0.0)


@triton.jit
def read_state(base, number, first, K: tl.constexpr, W: tl.constexpr, M: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr, EXTRA: tl.constexpr,
):  # fmt: skip
    """A block of a flat state, and its sums of one width more, of K numbers or of W."""
    k, w = tl.arange(0, BLOCK_K), first + tl.arange(0, BLOCK_W)
    at = base + number.to(tl.int64) * M
    state = tl.load(at + k[:, None] * W + w[None, :], mask=(k < K)[:, None] & (w < W)[None, :], other=0.0)
    if EXTRA == "total":
        more = tl.load(at + K * W + k, mask=k < K, other=0.0)
    elif EXTRA == "added":
        more = tl.load(at + K * W + w, mask=w < W, other=0.0)
    else:
        more = tl.zeros([1], tl.float32)
    return state, more


@triton.jit
def write_state(base, number, first, state, more, K: tl.constexpr, W: tl.constexpr, M: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr, EXTRA: tl.constexpr,
):  # fmt: skip
    k, w = tl.arange(0, BLOCK_K), first + tl.arange(0, BLOCK_W)
    at = base + number.to(tl.int64) * M
    tl.store(at + k[:, None] * W + w[None, :], state, mask=(k < K)[:, None] & (w < W)[None, :])
    if EXTRA == "total":
        tl.store(at + K * W + k, more, mask=(k < K) & (first == 0))
    elif EXTRA == "added":
        tl.store(at + K * W + w, more, mask=w < W)


SIZES = ("T", "H", "apart", "groups", "chunks", "behind", "eps", "scale")
"""Arguments of which no value has code of its own."""


@triton.jit(do_not_specialize=SIZES)
def pass_kernel(
    x, y, u, raw, gate, added, scales, times, skip, initial, states, through_of, result,
    T, H, apart, groups, chunks, behind, eps, scale,
    ROWS: tl.constexpr, SLOPE: tl.constexpr, EXTRA: tl.constexpr, NORMALIZE: tl.constexpr, REVERSE: tl.constexpr,
    STRICT: tl.constexpr, WHOLE: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    W: tl.constexpr, M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program takes one group of chunks of one head, and a block of W.

    With ROWS it begins from the state before its group, which is `initial` or in `states`, and finds `out`; without it
    begins from nothing and leaves what its group adds in `states`, and what it keeps of the state before it in
    `through_of`. In reverse it goes from chunk `behind` − 1, the last or one of those without tokens that fill the last
    group and are left out, to the first. y's tokens are multiplied by `scales` (B, H, T), where that is not None. EXTRA
    is one width more: of u, whose numbers are 1 and whose sums are `total`; or of x and y, `added`. `out` is multiplied
    by silu of `gate` at last, an operand (B, T, H, W). WHOLE says that chunks have C tokens and none is padding.

    x, y and u go to the matrix units as they lie in memory: what tokens are multiplied by is in the weights of pairs,
    and where it cannot be, in u's for the state. Sums over tokens of one number each are products of matrices too.
    """
    # programs that read the same x and y are beside each other
    BLOCKS: tl.constexpr = (W + BLOCK_W - 1) // BLOCK_W
    block, place = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    step, both = place % groups, place // groups
    RUNS: tl.constexpr = times.runs is not None
    TIMED: tl.constexpr = (times.sums is not None) or (times.marks is not None)
    PASSED: tl.constexpr = TIMED or RUNS  # whether a state is weighted
    LEFT: tl.constexpr = PASSED or (scales is not None)
    first = block * BLOCK_W
    w, o = first + tl.arange(0, BLOCK_W), tl.arange(0, C)
    b, h = both // H, both % H
    state = tl.zeros([BLOCK_K, BLOCK_W], tl.float32)
    more = tl.zeros([1], tl.float32)
    if EXTRA == "total":
        more = tl.zeros([BLOCK_K], tl.float32)
    elif EXTRA == "added":
        more = tl.zeros([BLOCK_W], tl.float32)
    if ROWS:
        if initial is not None and step == 0:
            state, more = read_state(initial, both, first, K, W, M, BLOCK_K, BLOCK_W, EXTRA)
        if states is not None:  # noqa: SIM102 (that is known when this is compiled, and the step is not)
            if step > 0:
                at = both * (groups - 1) + step - 1
                state, more = read_state(states, at, first, K, W, M, BLOCK_K, BLOCK_W, EXTRA)

    kept = 1.0
    if skip.ptr is not None:
        share = tl.load(skip.ptr + h * skip.head + w * skip.width, mask=w < W, other=0.0)
    empty = behind - tl.cdiv(T, C) if REVERSE else 0
    lowest, stop = tl.maximum(step * chunks, empty), tl.minimum((step + 1) * chunks, behind)
    coming = chunk_met(lowest, stop, behind, T, C, REVERSE) * C
    nothing = tl.full([], 0.0, tl.float32)
    sums = nothing, nothing, nothing, nothing
    if TIMED:
        sums = sums_of(times, both, coming, T, apart, C, WHOLE)
    if scales is not None:
        factor = per_token(scales, both, coming, T, is_real(times, b, coming + o, T), C, WHOLE)
    for i in range(lowest, stop):
        start = (behind - 1 - i if REVERSE else i) * C
        t = start + o
        real = is_real(times, b, t, T)
        weights, seen, enters, leaves, through = weights_by(
            times, sums[0], sums[1], sums[2], sums[3], b, start, T, C, REVERSE, STRICT
        )
        if scales is not None:
            weights *= factor[None, :]
            leaves *= factor
        column = tile(y, b, h, t, 0, real, K, BLOCK_K, WHOLE).to(DTYPE)
        summed = tile(u, b, h, t, first, real, W, BLOCK_W, WHOLE).to(DTYPE)
        count = tl.full([C], 1.0, tl.float32)
        if EXTRA == "added" and added.columns is not None:
            count = per_token(added.columns, both, start, T, real, C, WHOLE)

        if ROWS:
            row = tile(x, b, h, t, 0, real, K, BLOCK_K, WHOLE).to(DTYPE)
            if EXTRA == "total":  # first: behind the others, ptxas 12.8 reads registers that nothing set
                total = tl.sum(tl.dot(row, in_halves(more, DTYPE), input_precision=PRECISION), 1) / 8
            pairs = tl.dot(row, tl.trans(column), input_precision=PRECISION)
            found = tl.dot(row, state.to(DTYPE), input_precision=PRECISION)
            if EXTRA == "added":
                one = tl.full([C], 1.0, tl.float32)
                if added.rows is not None:
                    one = per_token(added.rows, both, start, T, real, C, WHOLE)
                pairs += one[:, None] * count[None, :]
                found += one[:, None] * more[None, :]
            if TIMED or (scales is not None):
                pairs *= weights
            pairs = tl.where(seen, pairs, 0.0)
            if PASSED:
                found = weighted(found, enters[:, None], RUNS)
            if EXTRA == "total":
                if PASSED:
                    total = weighted(total, enters, RUNS)
                total += tl.sum(pairs, 1)
            if result.dots is not None:
                features = tile(raw, b, h, t, first, real, W, BLOCK_W, WHOLE)
                heads = tl.num_programs(0) // (groups * BLOCKS)  # B · H
                at = result.dots + (block * heads + both).to(tl.int64) * T + t
                tl.store(at, tl.sum(features.to(tl.float32) * found, 1), mask=t < T)
                at += heads.to(tl.int64) * BLOCKS * T
                if not REVERSE:
                    # summed as they are, and not by row less by column: those two are large where they nearly cancel
                    products = tl.dot(features.to(DTYPE), tl.trans(summed), input_precision=PRECISION)
                    upto = tl.where(o[:, None] < o[None, :], 1.0, 0.0).to(DTYPE)
                    upto = tl.dot((pairs * products).to(DTYPE), upto, input_precision=PRECISION)
                    tl.store(at, tl.sum(tl.where(o[:, None] >= o[None, :], upto, 0.0), 0), mask=t < T)
            found = tl.dot(pairs.to(DTYPE), summed, found, input_precision=PRECISION)
            if SLOPE != "none":
                found *= slope(tile(raw, b, h, t, first, real, W, BLOCK_W, WHOLE).to(tl.float32), SLOPE)
            if result.levels is not None:
                level = per_token(result.levels, both, start, T, real, C, WHOLE)
                if NORMALIZE:
                    by, total = quotient(total, level, eps)
                    found *= by[:, None]
                    total = tl.where(real, total, 0.0)
                else:
                    half = tl.exp(level / 2)  # of what may leave fp32's range where the product does not
                    found = found * half[:, None] * half[:, None]
            if EXTRA == "total":
                if NORMALIZE and result.levels is None:
                    total = tl.where(real, total + eps, 1.0)
                    found /= total[:, None]
                if first == 0:
                    tl.store(result.total + (b.to(tl.int64) * T + t) * H + h, total, mask=t < T)
            if result.factor is not None:
                found *= per_token(result.factor, both, start, T, real, C, WHOLE)[:, None]
            if skip.ptr is not None:
                found += share[None, :] * tile(u, b, h, t, first, real, W, BLOCK_W, WHOLE).to(tl.float32)
            if gate.ptr is not None:
                z = tile(gate, b, h, t, first, real, W, BLOCK_W, WHOLE).to(tl.float32)
                small = tl.exp(-tl.abs(z))  # no power of a large number
                found *= z * tl.where(z < 0, small, 1.0) / (1 + small)
            found *= scale
            at = result.out + ((b.to(tl.int64) * T + t) * H + h)[:, None] * W + w[None, :]
            inside = (t < T)[:, None] & (w < W)[None, :]
            if WHOLE and W % BLOCK_W == 0:
                tl.store(at, found.to(result.out.dtype.element_ty))
            else:
                found = tl.where(real[:, None], found, 0.0)
                tl.store(at, found.to(result.out.dtype.element_ty), mask=inside)

        if EXTRA == "total":
            counted = tl.dot(tl.trans(column), in_halves(leaves, DTYPE), input_precision=PRECISION)
            more = (weighted(more, through, RUNS) if PASSED else more) + tl.sum(counted, 1) / 8
        elif EXTRA == "added":
            counted = tl.dot(tl.trans(in_halves(count * leaves, DTYPE)), summed, input_precision=PRECISION)
            more = (weighted(more, through, RUNS) if PASSED else more) + tl.sum(counted, 0) / 8
        if LEFT:
            summed = weighted(summed.to(tl.float32), leaves[:, None], RUNS).to(DTYPE)
        if PASSED:
            state = weighted(state, through, RUNS)
            kept *= through
        # what the next chunk has once is on its way while this one is met: nothing else of it would be
        coming = chunk_met(i + 1, stop, behind, T, C, REVERSE) * C
        if TIMED:
            sums = sums_of(times, both, coming, T, apart, C, WHOLE)
        if scales is not None:
            factor = per_token(scales, both, coming, T, is_real(times, b, coming + o, T), C, WHOLE)
        state = tl.dot(tl.trans(column), summed, state, input_precision=PRECISION)

    if not ROWS:
        write_state(states, both * groups + step, first, state, more, K, W, M, BLOCK_K, BLOCK_W, EXTRA)
        if first == 0:
            tl.store(through_of + both * groups + step, kept)
    elif (result.final is not None) and step == groups - 1:
        write_state(result.final, both, first, state, more, K, W, M, BLOCK_K, BLOCK_W, EXTRA)


@triton.jit(do_not_specialize=["groups", "M"])
def carry_kernel(states, through_of, initial, groups, M, BLOCK: tl.constexpr):
    """From what each group adds, the state behind it: states (B·H, groups, M), in place."""
    both = tl.program_id(0)
    m = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    state = tl.zeros([BLOCK], tl.float32)
    if initial is not None:
        state = tl.load(initial + both.to(tl.int64) * M + m, mask=m < M, other=0.0)
    for group in range(groups):
        at = states + (both.to(tl.int64) * groups + group) * M + m
        kept = weighted(state, tl.load(through_of + both * groups + group), True)
        state = kept + tl.load(at, mask=m < M, other=0.0)
        tl.store(at, state, mask=m < M)


@triton.jit(do_not_specialize=["T", "H"])
def features_kernel(
    first, second, of_first, of_second, T, H,
    MAP: tl.constexpr, C: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """φ of two Operands (B, T, H, K), contiguous."""
    tiles = tl.cdiv(T, C)  # on one axis with the heads: a second has 65535 programs at most
    place = tl.program_id(0) // 2
    both, k = place // tiles, tl.arange(0, BLOCK_K)
    b, h = both // H, both % H
    t = place % tiles * C + tl.arange(0, C)
    at = ((b.to(tl.int64) * T + t) * H + h)[:, None] * K + k[None, :]
    inside = (t < T)[:, None] & (k < K)[None, :]
    if tl.program_id(0) % 2 == 0:
        found = mapped(tile(first, b, h, t, 0, t < T, K, BLOCK_K, False).to(tl.float32), MAP)
        tl.store(of_first + at, found.to(of_first.dtype.element_ty), mask=inside)
    else:
        found = mapped(tile(second, b, h, t, 0, t < T, K, BLOCK_K, False).to(tl.float32), MAP)
        tl.store(of_second + at, found.to(of_second.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "H", "scale"])
def divided_kernel(
    dout, out, divisor, levels, real, d_divisor, numerator, T, H, scale,
    C: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """The gradients of the divisor (B, H, T) and of the numerator (B, T, H, W) of out = scale · numerator / divisor.

    out and its gradient are Operands (B, T, H, W), the divisor is (B, T, H). With `levels` (B, H, T) the divisor is a
    logarithm, and what is divided is exp(levels). Where `real` (B, T) is 0, so are both.
    """
    tiles = tl.cdiv(T, C)
    both = tl.program_id(0) // tiles
    b, h = both // H, both % H
    t, w = tl.program_id(0) % tiles * C + tl.arange(0, C), tl.arange(0, BLOCK_W)
    there = t < T
    if real is not None:
        there &= tl.load(real + b.to(tl.int64) * T + t, mask=there, other=0) != 0
    grad = tile(dout, b, h, t, 0, there, W, BLOCK_W, False).to(tl.float32)
    found = tl.sum(grad * tile(out, b, h, t, 0, there, W, BLOCK_W, False).to(tl.float32), 1)
    each = (b.to(tl.int64) * T + t) * H + h
    by = tl.load(divisor + each, mask=there, other=1.0)
    if levels is None:
        found = -found / by
        grad = grad * (scale / by)[:, None]
    else:
        half = tl.exp((tl.load(levels + both.to(tl.int64) * T + t, mask=there, other=0.0) - by) / 2)
        found = -found * half * half
        grad = grad * (scale * half)[:, None] * half[:, None]
    at = numerator + each[:, None] * W + w[None, :]
    tl.store(at, grad.to(numerator.dtype.element_ty), mask=(t < T)[:, None] & (w < W)[None, :])
    tl.store(d_divisor + both.to(tl.int64) * T + t, found, mask=t < T)
