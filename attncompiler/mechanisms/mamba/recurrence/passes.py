"""The scan forward: the sweep that finds what groups of tokens add, its carrying from group to group, and the reading.

Instructions of a warp's inner loop for each of a channel's numbers and each token, in bf16 with N = 16 and all options
(compiled for Hopper): 14 where states are read and 10 where they are swept, of which the recurrence needs 5 and 4 (a
factor of the exponent, its exponential, what is written, the update and, read, the sum), and 2 unpack B and C. An
exponential takes a multiprocessor as long as eight others.

Where there are fewer blocks of channels than the device has room for, tokens are cut into groups: all but the last are
swept for what they add to a state of 0, Σ exp over their tokens being met twice; the decay of a whole group is one
exponential of the sum of its time steps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attncompiler.mechanisms.mamba.recurrence.tokens import (
    channels,
    is_real,
    numbers,
    over_states,
    per_channel,
    per_state,
    raw_step,
    run_of,
    softplus,
    spread,
)


@triton.jit
def block_of(place, E, G, C: tl.constexpr):
    """The first channel of a block, the end of its group's channels, the group, and what is left of `place`.

    Blocks hold channels of one group alone, which reads one row of B and C.
    """
    width = E // G
    blocks = (width + C - 1) // C
    block, rest = place % blocks, place // blocks
    group = rest % G
    return group * width + block * C, (group + 1) * width, group, rest // G


@triton.jit
def of_channels(ptr, e, inside):
    """Parameters (E) of the block's channels; 0 where there are none."""
    found = tl.zeros(e.shape, tl.float32)
    if ptr is not None:
        found = tl.load(ptr + e, mask=inside, other=0.0)
    return found


@triton.jit(do_not_specialize=["T", "E", "G", "groups", "tokens", "unit"])
def read_kernel(
    scan, initial, states, out, final, T, E, G, groups, tokens, unit,
    SOFTPLUS: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr,
    NO: tl.constexpr, NI: tl.constexpr, CT: tl.constexpr, LN: tl.constexpr, LC: tl.constexpr,
):  # fmt: skip
    """out (B, T, E) of one group of tokens, from the state before it: `initial` (B, E, N) or in `states`
    (B, groups − 1, E, N). The last group writes `final` (B, E, N)."""
    first, end, group, place = block_of(tl.program_id(0), E, G, CT * LC)
    step, b = place % groups, place // groups
    e = channels(first, unit, CT, LC)
    inside = e < end
    n = numbers(unit, NO, NI, LN)
    kept = (n < N) & spread(inside)
    at = spread(e.to(tl.int64) * N) + n
    size = E.to(tl.int64) * N
    a = tl.load(scan.a + at, mask=kept, other=0.0)
    bias, skip = of_channels(scan.bias, e, inside), of_channels(scan.d, e, inside)
    state = tl.zeros([NO, NI, CT, LN, LC], tl.float32)
    if (states is not None) and step > 0:
        state = tl.load(states + (b * (groups - 1) + step - 1) * size + at, mask=kept, other=0.0)
    elif initial is not None:
        state = tl.load(initial + b * size + at, mask=kept, other=0.0)
    start = step * tokens
    before = 0
    if scan.runs is not None:
        before = run_of(scan, b, start - 1, T)

    for t0 in range(start, tl.minimum(start + tokens, T), ROWS):
        found = ()
        for r in tl.static_range(ROWS):
            t = t0 + r
            real = is_real(scan, b, t, T)
            there = inside & real
            raw = raw_step(scan, bias, b, t, e, there)
            u = per_channel(scan.u, b, t, e, there)
            write = per_state(scan.b, b, t, group, real, N, NO, NI, LN, LC)
            read = per_state(scan.c, b, t, group, real, N, NO, NI, LN, LC)
            delta = raw
            if SOFTPLUS:
                delta, _ = softplus(raw)
            delta = tl.where(there, delta, 0.0)
            if scan.runs is not None:
                run = run_of(scan, b, t, T)
                state = tl.where(run == before, state, 0.0)
                before = run
            state = tl.exp2(spread(delta) * a) * state + spread(delta * u) * write
            y = over_states(state * read)
            if scan.d is not None:
                y += skip * u
            if scan.z is not None:
                z = per_channel(scan.z, b, t, e, there)
                y *= z * tl.sigmoid(z)
            found = found + (tl.where(there, y, 0.0),)
        # behind all that is loaded: an assembler moves no load past a store
        for r in tl.static_range(ROWS):
            row = out + (b.to(tl.int64) * T + t0 + r) * E
            tl.store(row + e, found[r].to(out.dtype.element_ty), mask=inside & (t0 + r < T))

    if step == groups - 1:
        tl.store(final + b * size + at, state, mask=kept)


@triton.jit(do_not_specialize=["T", "E", "G", "groups", "tokens", "chunk", "unit"])
def sweep_kernel(
    scan, dout, added, lengths, back, inner, upto, T, E, G, groups, tokens, chunk, unit,
    SOFTPLUS: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr,
    NO: tl.constexpr, NI: tl.constexpr, CT: tl.constexpr, LN: tl.constexpr, LC: tl.constexpr,
):  # fmt: skip
    """What one group of tokens does to states that pass it, each of these where it is asked for:

    `added` (B, groups, E, N), the state behind it that its tokens make of 0; `lengths` (B, groups, E), the sum of its
    time steps; `back` (B, groups, E, N), the gradient of the state before it that comes from its outputs' gradients
    `dout`; and for every chunk of so many tokens, `inner` (B, groups · chunks, E, N) and `upto` (B, groups · chunks, E),
    what `added` and `lengths` are before it.

    `back` is a sum over tokens of what the decays up to each of them leave: it is found on the way forward, from the
    same exponentials.
    """
    first, end, group, place = block_of(tl.program_id(0), E, G, CT * LC)
    step, b = place % groups, place // groups
    e = channels(first, unit, CT, LC)
    inside = e < end
    n = numbers(unit, NO, NI, LN)
    kept = (n < N) & spread(inside)
    at = spread(e.to(tl.int64) * N) + n
    size = E.to(tl.int64) * N
    a = tl.load(scan.a + at, mask=kept, other=0.0)
    bias = of_channels(scan.bias, e, inside)
    state = tl.zeros([NO, NI, CT, LN, LC], tl.float32)
    length = tl.zeros([CT, LC], tl.float32)
    left, onward = state, state
    if back is not None:
        left += 1.0
    start = step * tokens
    run = 0
    if scan.runs is not None:
        run = run_of(scan, b, start - 1, T)
    entered = run

    for t0 in range(start, tl.minimum(start + tokens, T), ROWS):
        if inner is not None:
            if (t0 - start) % chunk == 0:
                number = b.to(tl.int64) * (groups * (tokens // chunk)) + t0 // chunk
                tl.store(inner + number * size + at, state, mask=kept)
                tl.store(upto + number * E + e, length, mask=inside)
        for r in tl.static_range(ROWS):
            t = t0 + r
            real = is_real(scan, b, t, T)
            there = inside & real
            raw = raw_step(scan, bias, b, t, e, there)
            u = per_channel(scan.u, b, t, e, there)
            write = per_state(scan.b, b, t, group, real, N, NO, NI, LN, LC)
            delta = raw
            if SOFTPLUS:
                delta, _ = softplus(raw)
            delta = tl.where(there, delta, 0.0)
            length += delta
            decay = tl.exp2(spread(delta) * a)
            seen = real
            if scan.runs is not None:
                now = run_of(scan, b, t, T)
                state = tl.where(now == run, state, 0.0)
                run = now
                seen = seen & (now == entered)
            state = decay * state + spread(delta * u) * write
            if back is not None:
                # of a later document nothing reaches the state before, not even what is not finite
                dy = per_channel(dout, b, t, e, inside & seen)
                read = per_state(scan.c, b, t, group, seen, N, NO, NI, LN, LC)
                if scan.z is not None:
                    z = per_channel(scan.z, b, t, e, inside & seen)
                    dy *= z * tl.sigmoid(z)
                left *= decay
                if scan.runs is not None:
                    left = tl.where(run == entered, left, 0.0)
                onward += left * (spread(dy) * read)

    of_group = b.to(tl.int64) * groups + step
    if added is not None:
        tl.store(added + of_group * size + at, state, mask=kept)
    if lengths is not None:
        tl.store(lengths + of_group * E + e, length, mask=inside)
    if back is not None:
        tl.store(back + of_group * size + at, onward, mask=kept)


@triton.jit(do_not_specialize=["T", "E", "groups", "tokens"])
def carry_kernel(
    scan, states, lengths, initial, T, E, groups, tokens,
    N: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From what each group adds, the state behind it: states (B, groups, E, N), in place, from `initial` (B, E, N) on.
    In reverse, from the last group to the first, the gradient of the state before it."""
    b = tl.program_id(0).to(tl.int64)
    size = E.to(tl.int64) * N
    m = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = m < size
    a = tl.load(scan.a + m, mask=there, other=0.0)
    state = tl.zeros([BLOCK], tl.float32)
    if initial is not None:
        state = tl.load(initial + b * size + m, mask=there, other=0.0)
    for i in range(groups):
        group = groups - 1 - i if REVERSE else i
        at = states + (b * groups + group) * size + m
        length = tl.load(lengths + (b * groups + group) * E + m // N, mask=there, other=0.0)
        kept = tl.exp2(length * a) * state
        if scan.runs is not None:
            same = run_of(scan, b, group * tokens - 1, T) == run_of(scan, b, (group + 1) * tokens - 1, T)
            kept = tl.where(same, kept, 0.0)
        state = kept + tl.load(at, mask=there, other=0.0)
        tl.store(at, state, mask=there)
