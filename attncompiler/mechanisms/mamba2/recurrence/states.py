"""The states before each chunk of a sequence, and the gradients of those behind it, kept for the heads to meet."""

from __future__ import annotations

import triton
import triton.language as tl

from attncompiler.blocks.recurrence.passes import per_token, tile, weighted
from attncompiler.blocks.recurrence.weights import chunk_met, is_real, sums_of, weights_by


@triton.jit(do_not_specialize=["T", "H", "apart", "groups", "chunks", "behind", "offset", "some", "first", "count"])
def states_kernel(
    y, u, factor, times, initial, states, through_of, held, passing, final,
    T, H, apart, groups, chunks, behind, offset, some, first, count,
    HELD: tl.constexpr, REVERSE: tl.constexpr, WHOLE: tl.constexpr, C: tl.constexpr, K: tl.constexpr, W: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program takes one group of chunks of one head, of the `some` groups from `offset` on, and a block of K and W.

    It adds up y uᵀ, u's tokens times `factor` (B, H, T), with the chunks met from the first to the last, or in reverse.
    Without HELD it begins from nothing, and leaves what its group adds in `states` (B·H, groups, K·W) and what it keeps
    of the state before it in `through_of`. With HELD it begins from what is carried to its group, and puts the state it
    meets each chunk with into `held` (B, count, H, K, W), of the `count` chunks from `first` on; and behind the last,
    into `final`. In reverse, what `held` had there was the state on the chunk's other side, and the product of the two,
    as much as the chunk keeps of it, goes to `passing` (blocks, B, H, chunks): it is what passes all of the chunk.
    """
    ACROSS: tl.constexpr = (W + BLOCK_W - 1) // BLOCK_W
    BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K * ACROSS
    RUNS: tl.constexpr = times.runs is not None
    block, place = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    step, both = offset + place % some, place // some
    b, h = both // H, both % H
    low, left = block // ACROSS * BLOCK_K, block % ACROSS * BLOCK_W
    k, w = low + tl.arange(0, BLOCK_K), left + tl.arange(0, BLOCK_W)
    place_in = k[:, None] * W + w[None, :]
    inside = (k < K)[:, None] & (w < W)[None, :]
    state = tl.zeros([BLOCK_K, BLOCK_W], tl.float32)
    if HELD:
        if initial is not None and step == 0:
            state = tl.load(initial + both.to(tl.int64) * (K * W) + place_in, mask=inside, other=0.0)
        if states is not None:  # noqa: SIM102 (that is known when this is compiled, and the step is not)
            if step > 0:
                number = (both * (groups - 1) + step - 1).to(tl.int64)
                state = tl.load(states + number * (K * W) + place_in, mask=inside, other=0.0)

    kept = 1.0
    empty = behind - tl.cdiv(T, C) if REVERSE else 0
    lowest, stop = tl.maximum(step * chunks, empty), tl.minimum((step + 1) * chunks, behind)
    chunk = chunk_met(lowest, stop, behind, T, C, REVERSE)
    t = chunk * C + tl.arange(0, C)
    sums = sums_of(times, both, chunk * C, T, apart, C, WHOLE)
    if factor is not None:
        step_of = per_token(factor, both, chunk * C, T, is_real(times, b, t, T), C, WHOLE)
    if HELD:
        at = held + ((b.to(tl.int64) * count + chunk - first) * H + h) * (K * W) + place_in
        if REVERSE:
            other = tl.load(at, mask=inside, other=0.0)
    for i in range(lowest, stop):
        real = is_real(times, b, t, T)
        _, _, _, leaves, through = weights_by(
            times, sums[0], sums[1], sums[2], sums[3], b, chunk * C, T, C, REVERSE, False
        )
        if factor is not None:
            leaves *= step_of
        # what the next chunk has once is on its way while this one is met: nothing else of it would be
        chunk_ahead = chunk_met(i + 1, stop, behind, T, C, REVERSE)
        t_ahead = chunk_ahead * C + tl.arange(0, C)
        sums = sums_of(times, both, chunk_ahead * C, T, apart, C, WHOLE)
        if factor is not None:
            step_of = per_token(factor, both, chunk_ahead * C, T, is_real(times, b, t_ahead, T), C, WHOLE)
        if HELD:
            at_ahead = held + ((b.to(tl.int64) * count + chunk_ahead - first) * H + h) * (K * W) + place_in
            if REVERSE:
                other_ahead = tl.load(at_ahead, mask=inside, other=0.0)

        column = tile(y, b, h, t, low, real, K, BLOCK_K, WHOLE).to(DTYPE)
        summed = tile(u, b, h, t, left, real, W, BLOCK_W, WHOLE)
        summed = weighted(summed.to(tl.float32), leaves[:, None], RUNS).to(DTYPE)
        if HELD:
            if REVERSE:
                # all threads have read `other` before any of them has this sum, and writes
                passed = weighted(tl.sum(other.to(tl.float32) * state), through, RUNS)
                heads = tl.num_programs(0) // (some * BLOCKS)  # B · H
                row = (block * heads + both).to(tl.int64)
                tl.store(passing + row * tl.cdiv(T, C) + chunk, passed)
            tl.store(at, state.to(held.dtype.element_ty), mask=inside)
        state = weighted(state, through, RUNS)
        kept *= through
        state = tl.dot(tl.trans(column), summed, state, input_precision=PRECISION)
        chunk, t = chunk_ahead, t_ahead
        if HELD:
            at = at_ahead
            if REVERSE:
                other = other_ahead

    if not HELD:
        tl.store(states + (both * groups + step).to(tl.int64) * (K * W) + place_in, state, mask=inside)
        if block == 0:
            tl.store(through_of + both * groups + step, kept)
    elif final is not None and step == groups - 1:
        tl.store(final + both.to(tl.int64) * (K * W) + place_in, state, mask=inside)
