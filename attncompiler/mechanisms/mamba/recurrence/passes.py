"""The scan forward: the sweep that finds what groups of tokens do, its carrying from group to group, and the reading.

Where there are fewer blocks of channels than the device has room for, tokens are cut into groups: all but the last are
swept for what they add to a state of 0, so their exponentials are met twice; the decay of a whole group is one
exponential, of the sum of its time steps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attncompiler.mechanisms.mamba.recurrence.tokens import (
    channels,
    numbers,
    of_channels,
    of_rows,
    of_shared,
    over_states,
    put,
    row,
    run_of,
    sigmoid,
    spread,
    spread_one,
    stepped,
    tokens,
    which_real,
)


@triton.jit
def block_of(place, E: tl.constexpr, G: tl.constexpr, C: tl.constexpr):
    """The first channel of a block, the end of its group's channels, the group, and what is left of `place`.

    Blocks hold channels of one group alone, which reads one row of B and C.
    """
    width: tl.constexpr = E // G
    blocks: tl.constexpr = (width + C - 1) // C
    block, rest = place % blocks, place // blocks
    group = rest % G
    return group * width + block * C, (group + 1) * width, group, rest // G


@triton.jit(do_not_specialize=["T", "groups", "length", "unit"])
def read_kernel(
    u_rows, dt_rows, z_rows, b_rows, c_rows, scan, initial, states, out, final, T, groups, length, unit,
    SOFTPLUS: tl.constexpr, ROWS: tl.constexpr, E: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
    NO: tl.constexpr, NI: tl.constexpr, CT: tl.constexpr, LN: tl.constexpr, LC: tl.constexpr,
):  # fmt: skip
    """out (B, T, E) of one group of `length` tokens, from the state before it: `initial` (B, E, N) or in `states`
    (B, groups − 1, E, N). The last group writes `final` (B, E, N)."""
    first, end, group, place = block_of(tl.program_id(0), E, G, CT * LC)
    step, b = place % groups, (place // groups).to(tl.int64)
    e = channels(first, unit, CT, LC)
    inside = e < end
    n = numbers(NO, NI, LN)
    kept = (n < N) & spread_one(inside)
    at = spread_one(e.to(tl.int64) * N) + n
    a = tl.load(scan.a + at, mask=kept, other=0.0)
    bias, skip = of_channels(scan.bias, e, inside), of_channels(scan.d, e, inside)
    state = tl.zeros([NO, NI, CT, LN, LC], tl.float32)
    if (states is not None) and step > 0:
        state = tl.load(states + (b * (groups - 1) + step - 1) * (E * N) + at, mask=kept, other=0.0)
    elif initial is not None:
        state = tl.load(initial + b * (E * N) + at, mask=kept, other=0.0)

    start = step * length
    for i in range(tl.cdiv(tl.minimum(start + length, T) - start, ROWS)):
        t0 = start + i * ROWS
        t = tokens(t0, ROWS)
        real = which_real(scan, b, t, T)
        there = inside[None] & real
        u, delta, _ = stepped(u_rows, dt_rows, scan, bias, b, t0, e, there, SOFTPLUS, ROWS)
        write = of_shared(b_rows, b, t0, group, real, ROWS, N, NO, NI, LN, LC)
        read = of_shared(c_rows, b, t0, group, real, ROWS, N, NO, NI, LN, LC)
        steps, written = spread(delta, LN), spread(delta * u, LN)
        y = tl.zeros([ROWS, CT, LC], tl.float32)
        for r in tl.static_range(ROWS):
            if scan.runs is not None:
                state = tl.where(run_of(scan, b, t0 + r, T) == run_of(scan, b, t0 + r - 1, T), state, 0.0)
            state = tl.exp2(row(steps, r, ROWS) * a) * state + row(written, r, ROWS) * row(write, r, ROWS)
            y = put(y, over_states(state * row(read, r, ROWS), CT, LN), r, ROWS)
        if scan.d is not None:
            y += skip[None] * u
        if z_rows.ptr is not None:
            z = of_rows(z_rows, b, t0, e, there, ROWS)
            y *= z * sigmoid(z)
        at_out = out + (b * T + t0) * E + e[None] + tokens(0, ROWS) * E
        tl.store(at_out, tl.where(there, y, 0.0).to(out.dtype.element_ty), mask=inside[None] & (t < T))

    if step == groups - 1:
        tl.store(final + b * (E * N) + at, state, mask=kept)


@triton.jit(do_not_specialize=["T", "groups", "length", "chunk", "unit"])
def sweep_kernel(
    u_rows, dt_rows, z_rows, b_rows, c_rows, scan, dout, added, lengths, back, inner, upto,
    T, groups, length, chunk, unit,
    SOFTPLUS: tl.constexpr, ROWS: tl.constexpr, E: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
    NO: tl.constexpr, NI: tl.constexpr, CT: tl.constexpr, LN: tl.constexpr, LC: tl.constexpr,
):  # fmt: skip
    """What one group of `length` tokens does to states that pass it, each of these where it is asked for:

    `added` (B, groups, E, N), the state behind it that its tokens make of 0; `lengths` (B, groups, E), the sum of its
    time steps; `back` (B, groups, E, N), the gradient of the state before it that comes from its outputs' gradients
    `dout`; and for every chunk of so many tokens but a group's first, `inner` (B, groups · (chunks − 1), E, N) and
    `upto` (B, groups · (chunks − 1), E), what `added` and `lengths` are before it.

    `back` is a sum over tokens of what the decays up to each of them leave: it is found on the way forward, from the
    same exponentials.
    """
    first, end, group, place = block_of(tl.program_id(0), E, G, CT * LC)
    step, b = place % groups, (place // groups).to(tl.int64)
    e = channels(first, unit, CT, LC)
    inside = e < end
    n = numbers(NO, NI, LN)
    kept = (n < N) & spread_one(inside)
    at = spread_one(e.to(tl.int64) * N) + n
    a = tl.load(scan.a + at, mask=kept, other=0.0)
    bias = of_channels(scan.bias, e, inside)
    state = tl.zeros([NO, NI, CT, LN, LC], tl.float32)
    total = tl.zeros([CT, LC], tl.float32)
    onward, left = state, state + 1.0
    start = step * length
    entered = 0
    if scan.runs is not None:
        entered = run_of(scan, b, start - 1, T)

    for i in range(tl.cdiv(tl.minimum(start + length, T) - start, ROWS)):
        t0 = start + i * ROWS
        if inner is not None and (t0 > start) & ((t0 - start) % chunk == 0):
            number = (b * groups + step) * (length // chunk - 1) + (t0 - start) // chunk - 1
            tl.store(inner + number * (E * N) + at, state, mask=kept)
            tl.store(upto + number * E + e, total, mask=inside)
        t = tokens(t0, ROWS)
        real = which_real(scan, b, t, T)
        there = inside[None] & real
        u, delta, _ = stepped(u_rows, dt_rows, scan, bias, b, t0, e, there, SOFTPLUS, ROWS)
        write = of_shared(b_rows, b, t0, group, real, ROWS, N, NO, NI, LN, LC)
        steps, written = spread(delta, LN), spread(delta * u, LN)
        total += tl.sum(delta, 0)
        if back is not None:
            seen = real
            if scan.runs is not None:
                # of a later document nothing reaches the state before, not even what is not finite
                seen = seen & (run_of(scan, b, t, T) == entered)
            dy = of_rows(dout, b, t0, e, inside[None] & seen, ROWS)
            if z_rows.ptr is not None:
                z = of_rows(z_rows, b, t0, e, inside[None] & seen, ROWS)
                dy *= z * sigmoid(z)
            dy = spread(dy, LN)
            read = of_shared(c_rows, b, t0, group, seen, ROWS, N, NO, NI, LN, LC)
        for r in tl.static_range(ROWS):
            decay = tl.exp2(row(steps, r, ROWS) * a)
            if scan.runs is not None:
                now = run_of(scan, b, t0 + r, T)
                state = tl.where(now == run_of(scan, b, t0 + r - 1, T), state, 0.0)
            state = decay * state + row(written, r, ROWS) * row(write, r, ROWS)
            if back is not None:
                left *= decay
                if scan.runs is not None:
                    left = tl.where(now == entered, left, 0.0)
                onward += left * (row(dy, r, ROWS) * row(read, r, ROWS))

    of_group = b * groups + step
    if added is not None:
        tl.store(added + of_group * (E * N) + at, state, mask=kept)
    if lengths is not None:
        tl.store(lengths + of_group * E + e, total, mask=inside)
    if back is not None:
        tl.store(back + of_group * (E * N) + at, onward, mask=kept)


@triton.jit
def line(x, r, ROWS: tl.constexpr):
    """Row r of [ROWS, BLOCK], as `row` takes it."""
    bits = tl.where(tl.arange(0, ROWS)[:, None] == r, x.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, 0).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["T", "groups", "length"])
def carry_kernel(
    scan, states, lengths, initial, T, groups, length,
    E: tl.constexpr, N: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """From what each group adds, the state behind it: states (B, groups, E, N), in place, from `initial` (B, E, N) on.
    In reverse, from the last group to the first, the gradient of the state before it."""
    b = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = m < E * N
    a = tl.load(scan.a + m, mask=there, other=0.0)
    state = tl.zeros([BLOCK], tl.float32)
    if initial is not None:
        state = tl.load(initial + b * (E * N) + m, mask=there, other=0.0)
    for i in range(tl.cdiv(groups, TOGETHER)):
        steps = i * TOGETHER + tl.arange(0, TOGETHER)[:, None]
        group = groups - 1 - steps if REVERSE else steps
        at = (b * groups + group) * (E * N) + m[None]
        mask = (steps < groups) & there[None]
        added = tl.load(states + at, mask=mask, other=0.0)
        total = tl.load(lengths + (b * groups + group) * E + m[None] // N, mask=mask, other=0.0)
        kept = tl.exp2(total * a[None])
        behind = added
        for k in tl.static_range(TOGETHER):
            state = line(kept, k, TOGETHER) * state
            if scan.runs is not None:
                step = i * TOGETHER + k
                one = groups - 1 - step if REVERSE else step
                same = run_of(scan, b, one * length - 1, T) == run_of(scan, b, (one + 1) * length - 1, T)
                state = tl.where(same, state, 0.0)
            state += line(added, k, TOGETHER)
            behind = tl.where(tl.arange(0, TOGETHER)[:, None] == k, state[None], behind)
        tl.store(states + at, behind, mask=mask)
