"""The gradients of one chunk, for all heads of a group one after the other: what they share is loaded once, and sums
over them stay in registers.

With S the state before the chunk of a head, dS the gradient of the one behind it, L what columns count for rows, and Δ
the time steps,

    M = L ∘ (dy xᵀ) Δ,   Z = Σ_heads M
    dC = Z B + Σ_heads (dy · enters) Sᵀ,   dB = Zᵀ C + Σ_heads (Δ x · leaves) dSᵀ
    d(Δx) = (L ∘ C Bᵀ)ᵀ dy + leaves · B dS

(Dao & Gu 2024, section 6, differentiated by blocks).

Where N is more than a block of it, each block has programs of its own: they share the gradients of B and C by N, and
what else there is by blocks of P, or as parts of sums.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attncompiler.blocks.launching.numbers import empty
from attncompiler.blocks.recurrence.passes import per_token, tile, weighted
from attncompiler.blocks.recurrence.weights import is_real, sums_of, weights_by

SIZES = ("T", "H", "apart", "first", "count", "sets")


class Dots(NamedTuple):
    """What the gradients of time steps, decays and D are made of, each (blocks of N, B, H, T): parts of a sum."""

    starts: Any
    """what from before the chunk reaches its rows"""
    between: Any
    """what of the chunk's pairs passes each token"""
    ends: Any
    """what of its columns reaches behind the chunk"""
    given: Any
    """x·d(Δx)"""
    skipped: Any
    """x·dy; None where there is no D of one number a head"""


@triton.jit
def place_of_program(G, count, sets, BLOCKS_N: tl.constexpr):
    """Of a program: its block of N, its set of heads, group, chunk (counted from `first`) and sequence."""
    block, place = tl.program_id(0) % BLOCKS_N, tl.program_id(0) // BLOCKS_N
    chosen, place = place % sets, place // sets
    g, place = place % G, place // G
    return block, chosen, g, place % count, place // count


@triton.jit
def pairs_of(
    left, right, b, h, t, real, N: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr, C: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """left rightᵀ of a chunk, over all of N."""
    found = tl.zeros([C, C], tl.float32)
    for low in tl.static_range(0, N, BLOCK_N):
        x = tile(left, b, h, t, low, real, N, BLOCK_N, WHOLE).to(DTYPE)
        y = tile(right, b, h, t, low, real, N, BLOCK_N, WHOLE).to(DTYPE)
        found = tl.dot(x, tl.trans(y), found, input_precision=PRECISION)
    return found


@triton.jit
def state_of(held, b, i, h, low, first, H, count, N: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A block of rows and columns of what is held of a chunk's head: (N, P)."""
    n, p = low + tl.arange(0, BLOCK_N), first + tl.arange(0, BLOCK_P)
    at = held + ((b.to(tl.int64) * count + i) * H + h) * (N * P) + n[:, None] * P + p[None, :]
    if N % BLOCK_N == 0 and P % BLOCK_P == 0:
        return tl.load(at)
    else:
        return tl.load(at, mask=(n < N)[:, None] & (p < P)[None, :], other=0.0)


@triton.jit
def store_shared(at, chosen, b, g, t, low, found, T, G, B, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """One set's part of a gradient (sets, B, T, G, N), from number `low` of N on."""
    n = low + tl.arange(0, BLOCK_N)
    row = ((chosen * B + b).to(tl.int64) * T + t) * G + g
    tl.store(
        at + row[:, None] * N + n[None, :], found.to(at.dtype.element_ty), mask=(t < T)[:, None] & (n < N)[None, :]
    )


@triton.jit(do_not_specialize=SIZES)
def rows_kernel(
    x, b_, c, dy, times, factor, held, dots, dc, db, T, H, apart, first, count, sets,
    G: tl.constexpr, WHOLE: tl.constexpr, C: tl.constexpr, N: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dC, and what of dB the chunk's own rows give, of one chunk and a set of a group's heads: (sets, B, T, G, N).

    `held` (B, count, H, N, P) are the states before the chunks, the first of which is chunk `first`.
    """
    RUNS: tl.constexpr = times.runs is not None
    BLOCKS: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    BLOCKS_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    of_n, chosen, g, i, b = place_of_program(G, count, sets, BLOCKS_N)
    low = of_n * BLOCK_N
    start = (first + i) * C
    o = tl.arange(0, C)
    t = start + o
    real = is_real(times, b, t, T)
    heads = H // (G * sets)
    begin = (g * sets + chosen) * heads
    columns = tile(b_, b, begin, t, low, real, N, BLOCK_N, WHOLE).to(DTYPE)
    rows = tile(c, b, begin, t, low, real, N, BLOCK_N, WHOLE).to(DTYPE)
    if BLOCKS_N == 1:
        pairs = tl.dot(rows, tl.trans(columns), input_precision=PRECISION).to(DTYPE)
    else:
        pairs = pairs_of(c, b_, b, begin, t, real, N, BLOCK_N, WHOLE, C, DTYPE, PRECISION).to(DTYPE)
    before = tl.where(o[:, None] < o[None, :], 1.0, 0.0).to(DTYPE)
    z = tl.zeros([C, C], tl.float32)
    found = tl.zeros([C, BLOCK_N], tl.float32)
    sums = sums_of(times, b * H + begin, start, T, apart, C, WHOLE)
    step = per_token(factor, b * H + begin, start, T, real, C, WHOLE)
    for h in range(begin, begin + heads):
        both = b * H + h
        products = tl.zeros([C, C], tl.float32)
        starts = tl.zeros([C], tl.float32)
        weights, seen, enters, _, _ = weights_by(
            times, sums[0], sums[1], sums[2], sums[3], b, start, T, C, False, False
        )
        for block in tl.static_range(BLOCKS):
            grad = tile(dy, b, h, t, block * BLOCK_P, real, P, BLOCK_P, WHOLE).to(DTYPE)
            given = tile(x, b, h, t, block * BLOCK_P, real, P, BLOCK_P, WHOLE).to(DTYPE)
            state = state_of(held, b, i, h, low, block * BLOCK_P, H, count, N, P, BLOCK_N, BLOCK_P)
            entering = weighted(grad.to(tl.float32), enters[:, None], RUNS).to(DTYPE)
            found = tl.dot(entering, tl.trans(state), found, input_precision=PRECISION)
            read = tl.dot(rows, state, input_precision=PRECISION)
            starts += tl.sum(grad.to(tl.float32) * read, 1)
            products = tl.dot(grad, tl.trans(given), products, input_precision=PRECISION)
        weights *= step[None, :]
        products = tl.where(seen, products * weights, 0.0)
        z += products
        # summed as they are, and not by row less by column: those two are large where they nearly cancel
        upto = tl.dot(products.to(DTYPE) * pairs, before, input_precision=PRECISION)
        at = both.to(tl.int64) * T + t
        between = tl.sum(tl.where(o[:, None] >= o[None, :], upto, 0.0), 0)
        tl.store(dots.between + at, between, mask=(t < T) & (of_n == 0))
        at += of_n.to(tl.int64) * apart
        tl.store(dots.starts + at, weighted(starts, enters, RUNS), mask=t < T)
        # of the next head, while this one is met: of what waits for memory here, nothing else would be on its way
        after = b * H + tl.minimum(h + 1, begin + heads - 1)
        sums = sums_of(times, after, start, T, apart, C, WHOLE)
        step = per_token(factor, after, start, T, real, C, WHOLE)
    z = z.to(DTYPE)
    found = tl.dot(z, columns, found, input_precision=PRECISION)
    B = tl.num_programs(0) // (count * G * sets * BLOCKS_N)
    store_shared(dc, chosen, b, g, t, low, found, T, G, B, N, BLOCK_N)
    store_shared(db, chosen, b, g, t, low, tl.dot(tl.trans(z), rows, input_precision=PRECISION), T, G, B, N, BLOCK_N)


@triton.jit
def columns_of_head(
    gained, met, grad, wide, leaves, step, dx, share, SKIPPED: tl.constexpr, b, h, t, p, T, H, P: tl.constexpr,
    PRECISION: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """Writes a block of a head's dx, from what the state behind the chunk gives of it; and its parts of sums over P:
    of what reaches that state, of x·d(Δx), and of x·dy."""
    gained = weighted(gained, leaves[:, None], RUNS)
    ends = tl.sum(wide * gained, 1)
    gained = tl.dot(met, grad, gained, input_precision=PRECISION)
    gave = tl.sum(wide * gained, 1)
    gained *= step[:, None]
    if share is not None:
        gained += share[None, :] * grad.to(tl.float32)
    skipped = tl.zeros_like(gave)
    if SKIPPED:
        skipped = tl.sum(wide * grad.to(tl.float32), 1)
    to = dx + ((b.to(tl.int64) * T + t) * H + h)[:, None] * P + p[None, :]
    tl.store(to, gained.to(dx.dtype.element_ty), mask=(t < T)[:, None] & (p < P)[None, :])
    return ends, gave, skipped


@triton.jit(do_not_specialize=SIZES)
def columns_kernel(
    x, b_, c, dy, times, factor, skip, held, dots, dx, db, out,
    T, H, apart, first, count, sets,
    G: tl.constexpr, WHOLE: tl.constexpr, C: tl.constexpr, N: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx (B, T, H, P), and what is left of dB.

    `held` are the gradients of the states behind the chunks; to the part of dB in `db` theirs is added, into `out`.
    """
    RUNS: tl.constexpr = times.runs is not None
    BLOCKS: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    BLOCKS_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    of_n, chosen, g, i, b = place_of_program(G, count, sets, BLOCKS_N)
    low = of_n * BLOCK_N
    start = (first + i) * C
    o = tl.arange(0, C)
    t = start + o
    real = is_real(times, b, t, T)
    heads = H // (G * sets)
    begin = (g * sets + chosen) * heads
    if BLOCKS_N == 1:
        columns = tile(b_, b, begin, t, 0, real, N, BLOCK_N, WHOLE).to(DTYPE)
        rows = tile(c, b, begin, t, 0, real, N, BLOCK_N, WHOLE).to(DTYPE)
        pairs = tl.dot(columns, tl.trans(rows), input_precision=PRECISION).to(DTYPE)
    else:
        pairs = pairs_of(b_, c, b, begin, t, real, N, BLOCK_N, WHOLE, C, DTYPE, PRECISION).to(DTYPE)
    n = low + tl.arange(0, BLOCK_N)
    B = tl.num_programs(0) // (count * G * sets * BLOCKS_N)
    inner = db + (((chosen * B + b).to(tl.int64) * T + t) * G + g)[:, None] * N + n[None, :]
    found = tl.load(inner, mask=(t < T)[:, None] & (n < N)[None, :], other=0.0)
    sums = sums_of(times, b * H + begin, start, T, apart, C, WHOLE)
    step = per_token(factor, b * H + begin, start, T, real, C, WHOLE)
    for h in range(begin, begin + heads):
        both = b * H + h
        weights, seen, leaves, _, _ = weights_by(times, sums[0], sums[1], sums[2], sums[3], b, start, T, C, True, False)
        met = tl.where(seen, pairs * weights.to(DTYPE), 0.0).to(DTYPE)
        ends = tl.zeros([C], tl.float32)
        gave = tl.zeros([C], tl.float32)
        skipped = tl.zeros([C], tl.float32)
        shares = empty()
        if skip.ptr is not None:
            for block in tl.static_range(BLOCKS):
                p = block * BLOCK_P + tl.arange(0, BLOCK_P)
                shares += (tl.load(skip.ptr + h * skip.head + p * skip.width, mask=p < P, other=0.0),)
        for block in tl.static_range(BLOCKS):
            p = block * BLOCK_P + tl.arange(0, BLOCK_P)
            grad = tile(dy, b, h, t, block * BLOCK_P, real, P, BLOCK_P, WHOLE).to(DTYPE)
            given = tile(x, b, h, t, block * BLOCK_P, real, P, BLOCK_P, WHOLE).to(DTYPE)
            state = state_of(held, b, i, h, low, block * BLOCK_P, H, count, N, P, BLOCK_N, BLOCK_P)
            wide = given.to(tl.float32)
            leaving = weighted(wide, (leaves * step)[:, None], RUNS).to(DTYPE)
            found = tl.dot(leaving, tl.trans(state), found, input_precision=PRECISION)
            if BLOCKS_N == 1:
                gained = tl.dot(columns, state, input_precision=PRECISION)
                more = columns_of_head(
                    gained, met, grad, wide, leaves, step, dx, shares[block] if skip.ptr is not None else None,
                    dots.skipped is not None, b, h, t, p, T, H, P, PRECISION, RUNS,
                )  # fmt: skip
                ends += more[0]
                gave += more[1]
                skipped += more[2]
        if BLOCKS_N > 1:
            for turn in tl.static_range((BLOCKS + BLOCKS_N - 1) // BLOCKS_N):
                block = turn * BLOCKS_N + of_n
                mine = block < BLOCKS
                first_p = tl.minimum(block, BLOCKS - 1) * BLOCK_P
                p = tl.where(mine, first_p, P) + tl.arange(0, BLOCK_P)
                grad = tile(dy, b, h, t, first_p, real, P, BLOCK_P, WHOLE).to(DTYPE)
                wide = tile(x, b, h, t, first_p, real, P, BLOCK_P, WHOLE).to(DTYPE).to(tl.float32)
                gained = tl.zeros([C, BLOCK_P], tl.float32)
                for other in tl.static_range(0, N, BLOCK_N):
                    column = tile(b_, b, begin, t, other, real, N, BLOCK_N, WHOLE).to(DTYPE)
                    part = state_of(held, b, i, h, other, first_p, H, count, N, P, BLOCK_N, BLOCK_P)
                    gained = tl.dot(column, part, gained, input_precision=PRECISION)
                share = None
                if skip.ptr is not None:
                    share = tl.load(skip.ptr + h * skip.head + p * skip.width, mask=p < P, other=0.0)
                more = columns_of_head(
                    gained, met, grad, wide, leaves, step, dx, share,
                    dots.skipped is not None, b, h, t, p, T, H, P, PRECISION, RUNS,
                )  # fmt: skip
                ends += tl.where(mine, more[0], 0.0)
                gave += tl.where(mine, more[1], 0.0)
                skipped += tl.where(mine, more[2], 0.0)
        # of the next head, while this one is met: of what waits for memory here, nothing else would be on its way
        after = b * H + tl.minimum(h + 1, begin + heads - 1)
        sums = sums_of(times, after, start, T, apart, C, WHOLE)
        step_after = per_token(factor, after, start, T, real, C, WHOLE)
        at = of_n.to(tl.int64) * apart + both.to(tl.int64) * T + t
        tl.store(dots.ends + at, ends * step, mask=t < T)
        tl.store(dots.given + at, gave, mask=t < T)
        if dots.skipped is not None:
            tl.store(dots.skipped + at, skipped, mask=t < T)
        step = step_after
    store_shared(out, chosen, b, g, t, low, found, T, G, B, N, BLOCK_N)
