"""The pass over the chunks of a sequence, and the carrying of states from group to group."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attncompiler.blocks.recurrence.weights import is_real, weights_of


class Operand(NamedTuple):
    """x, y or u (B, T, heads, width) by its strides; `share` heads of the call read one of its own.

    `factor` (B, T, H), fp32 and contiguous, is what each token is multiplied by; None where that is 1.
    """

    ptr: Any
    batch: Any
    token: Any
    head: Any
    share: Any
    factor: Any


class Added(NamedTuple):
    """One width more of x and y: a number for each token (B, T, H), fp32; None where it is 1."""

    rows: Any
    columns: Any


class Skip(NamedTuple):
    """What is added to `out` at last: skip · raw."""

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
    """(2, blocks of W, B, H, T): the raw operand's features times what the state gives of out; and times what the chunk
    gives, or, PASSING and not in reverse, the pairs of a chunk that have the token behind them and their row ahead"""
    factor: Any
    """(B, T, H): what a token's numbers are multiplied by in `out`, fp32"""
    final: Any
    """(B, H, M): the state behind the last chunk, flat, and the sums of one width more behind it"""


@triton.jit
def mapped(x, MAP: tl.constexpr):
    """φ(x)."""
    if MAP == "elu":
        x = tl.where(x > 0, x + 1, tl.exp(tl.where(x > 0, 0.0, x)))  # a GPU's minimum and maximum swallow NaN
    elif MAP == "relu":
        x = tl.where(x < 0, 0.0, x)
    return x


@triton.jit
def slope(x, MAP: tl.constexpr):
    """φ'(x)."""
    if MAP == "elu":
        s = tl.where(x > 0, 1.0, tl.exp(tl.where(x > 0, 0.0, x)))
    else:
        s = tl.where(x > 0, 1.0, 0.0)
    return s


@triton.jit
def weighted(x, weight):
    """x times a weight, and 0 where that is 0: what is not seen is not finite somewhere."""
    return tl.where(weight == 0, 0.0, x * weight)


@triton.jit
def per_token(base, b, h, t, T, H, there):
    """Numbers (B, T, H) of tokens t, 0 where there are none."""
    return tl.load(base + (b.to(tl.int64) * T + t) * H + h, mask=there, other=0.0)


@triton.jit
def raw_tile(operand, b, h, t, first, there, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    c = first + tl.arange(0, BLOCK)
    at = operand.ptr + b.to(tl.int64) * operand.batch + (h // operand.share).to(tl.int64) * operand.head
    at = at + t.to(tl.int64)[:, None] * operand.token + c[None, :]
    return tl.load(at, mask=there[:, None] & (c < WIDTH)[None, :], other=0.0)


@triton.jit
def tile(
    operand, b, h, t, first, there, T, H,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, MAP: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """φ of an operand's tokens t times their factor, columns from `first` on; 0 where there is nothing."""
    found = raw_tile(operand, b, h, t, first, there, WIDTH, BLOCK)
    if MAP != "none":
        found = mapped(found.to(tl.float32), MAP)
        inside = there[:, None] & (first + tl.arange(0, BLOCK) < WIDTH)[None, :]
        found = tl.where(inside, found, 0.0)
    if operand.factor is not None:
        found = found.to(tl.float32) * per_token(operand.factor, b, h, t, T, H, there)[:, None]
    return found.to(DTYPE)


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


SIZES = ("T", "H", "groups", "chunks", "behind", "eps", "scale")
"""Arguments of which no value has code of its own."""


@triton.jit(do_not_specialize=SIZES)
def pass_kernel(
    x, y, u, raw, gate, added, times, skip, initial, states, through_of, result, T, H, groups, chunks, behind, eps, scale,
    MAP_X: tl.constexpr, MAP_Y: tl.constexpr, MAP_U: tl.constexpr, SLOPE: tl.constexpr, EXTRA: tl.constexpr,
    NORMALIZE: tl.constexpr, REVERSE: tl.constexpr, STRICT: tl.constexpr, PASSING: tl.constexpr, ROWS: tl.constexpr,
    C: tl.constexpr, K: tl.constexpr, W: tl.constexpr, M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program takes one group of chunks of one head, and a block of W.

    With ROWS it begins from the state before its group, which is `initial` or in `states`, and finds `out`; without it
    begins from nothing and leaves what its group adds in `states`, and what it keeps of the state before it in
    `through_of`. In reverse it goes from chunk `behind` − 1, the last or one of those without tokens that fill the last
    group, to the first. EXTRA is one width more: of u, whose numbers are 1 and whose
    sums are `total`; or of x and y, `added`. `out` is multiplied by silu of `gate` at last, an operand (B, T, H, W).
    """
    # programs that read the same x and y are beside each other
    BLOCKS: tl.constexpr = (W + BLOCK_W - 1) // BLOCK_W
    block, place = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    step, both = place % groups, place // groups
    b, h = both // H, both % H
    first = block * BLOCK_W
    WEIGHTED: tl.constexpr = (times.decay is not None) or (times.runs is not None)

    state = tl.zeros([BLOCK_K, BLOCK_W], tl.float32)
    if EXTRA == "total":
        more = tl.zeros([BLOCK_K], tl.float32)
    elif EXTRA == "added":
        more = tl.zeros([BLOCK_W], tl.float32)
    else:
        more = tl.zeros([1], tl.float32)
    if ROWS:
        if initial is not None and step == 0:
            state, more = read_state(initial, both, first, K, W, M, BLOCK_K, BLOCK_W, EXTRA)
        if states is not None:
            if step > 0:
                at = both * (groups - 1) + step - 1
                state, more = read_state(states, at, first, K, W, M, BLOCK_K, BLOCK_W, EXTRA)

    kept = 1.0
    for i in range(step * chunks, tl.minimum((step + 1) * chunks, behind)):
        start = (behind - 1 - i if REVERSE else i) * C
        t = start + tl.arange(0, C)
        real = is_real(times, b, t, T)
        weights, enters, leaves, through = weights_of(times, b, h, t, start, T, real, C, REVERSE, STRICT)
        column = tile(y, b, h, t, 0, real, T, H, K, BLOCK_K, MAP_Y, DTYPE)
        summed = tile(u, b, h, t, first, real, T, H, W, BLOCK_W, MAP_U, DTYPE)
        count = tl.where(real, 1.0, 0.0)
        if EXTRA == "added" and added.columns is not None:
            count = per_token(added.columns, b, h, t, T, H, real)

        if ROWS:
            row = tile(x, b, h, t, 0, real, T, H, K, BLOCK_K, MAP_X, DTYPE)
            pairs = tl.dot(row, tl.trans(column), input_precision=PRECISION)
            found = tl.dot(row, state.to(DTYPE), input_precision=PRECISION)
            if EXTRA == "added":
                one = tl.full([C], 1.0, tl.float32)
                if added.rows is not None:
                    one = per_token(added.rows, b, h, t, T, H, real)
                pairs += one[:, None] * count[None, :]
                found += one[:, None] * more[None, :]
            pairs = weighted(pairs, weights)
            if WEIGHTED:
                found = weighted(found, enters[:, None])
            if EXTRA == "total":
                total = tl.sum(pairs, 1) + weighted(tl.sum(row.to(tl.float32) * more[None, :], 1), enters)
            if result.dots is not None:
                features = mapped(raw_tile(raw, b, h, t, first, real, W, BLOCK_W).to(tl.float32), SLOPE)
                inside = real[:, None] & (first + tl.arange(0, BLOCK_W) < W)[None, :]
                features = tl.where(inside, features, 0.0)
                heads = tl.num_programs(0) // (groups * BLOCKS)
                at = result.dots + (block * heads + both).to(tl.int64) * T + t
                tl.store(at, tl.sum(features * found, 1), mask=t < T)
                at += heads.to(tl.int64) * BLOCKS * T
                if PASSING and not REVERSE:
                    # summed as they are, and not by row less by column: those two are large where they nearly cancel
                    products = tl.dot(features.to(DTYPE), tl.trans(summed), input_precision=PRECISION)
                    upto = tl.cumsum(pairs * products, 1)
                    tl.store(at, tl.sum(tl.where(t[:, None] > t[None, :], upto, 0.0), 0), mask=t < T)
                elif not PASSING:
                    given = tl.dot(pairs.to(DTYPE), summed, input_precision=PRECISION)
                    tl.store(at, tl.sum(features * given, 1), mask=t < T)
            found = tl.dot(pairs.to(DTYPE), summed, found, input_precision=PRECISION)
            if SLOPE == "elu" or SLOPE == "relu":
                found *= slope(raw_tile(raw, b, h, t, first, real, W, BLOCK_W).to(tl.float32), SLOPE)
            if EXTRA == "total":
                if NORMALIZE:
                    total = tl.where(real, total + eps, 1.0)
                    found /= total[:, None]
                if first == 0:
                    tl.store(result.total + (b.to(tl.int64) * T + t) * H + h, total, mask=t < T)
            w = first + tl.arange(0, BLOCK_W)
            if skip.ptr is not None:
                share = tl.load(skip.ptr + h * skip.head + w * skip.width, mask=w < W, other=0.0)
                found += share[None, :] * raw_tile(raw, b, h, t, first, real, W, BLOCK_W).to(tl.float32)
            if gate.ptr is not None:
                z = raw_tile(gate, b, h, t, first, real, W, BLOCK_W).to(tl.float32)
                found *= z * tl.sigmoid(z)
            found = tl.where(real[:, None], found * scale, 0.0)
            if result.factor is not None:
                found *= per_token(result.factor, b, h, t, T, H, real)[:, None]
            at = result.out + ((b.to(tl.int64) * T + t) * H + h)[:, None] * W + w[None, :]
            tl.store(at, found.to(result.out.dtype.element_ty), mask=(t < T)[:, None] & (w < W)[None, :])

        if WEIGHTED:
            column = (column.to(tl.float32) * leaves[:, None]).to(DTYPE)
            state, more = weighted(state, through), weighted(more, through)
            kept *= through
        state = tl.dot(tl.trans(column), summed, state, input_precision=PRECISION)
        if EXTRA == "total":
            more += tl.sum(column.to(tl.float32), 0)
        elif EXTRA == "added":
            more += tl.sum((count * leaves)[:, None] * summed.to(tl.float32), 0)

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
        kept = weighted(state, tl.load(through_of + both * groups + group))
        state = kept + tl.load(at, mask=m < M, other=0.0)
        tl.store(at, state, mask=m < M)


@triton.jit(do_not_specialize=["T", "H"])
def products_kernel(x, y, factor, out, T, H, C: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr):
    """out (B, T, H) = factor · x·y of each token and head, x and y being Operands (B, T, H, W)."""
    tiles = tl.cdiv(T, C)  # on one axis with the heads: a second has 65535 programs at most
    both = tl.program_id(0) // tiles
    b, h = both // H, both % H
    t = tl.program_id(0) % tiles * C + tl.arange(0, C)
    there = t < T
    left = raw_tile(x, b, h, t, 0, there, W, BLOCK_W).to(tl.float32)
    right = raw_tile(y, b, h, t, 0, there, W, BLOCK_W).to(tl.float32)
    found = tl.sum(left * right, 1) * per_token(factor, b, h, t, T, H, there)
    tl.store(out + (b.to(tl.int64) * T + t) * H + h, found, mask=there)
