"""The scan forward: the sweep that finds what groups of tokens do, its carrying from group to group, and the reading.

Where there are fewer blocks of channels than the device has room for, tokens are cut into groups: all but the last are
swept for what they add to a state of 0, so their exponentials are met twice; the decay of a whole group is one
exponential, of the sum of its time steps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attncompiler.blocks.launching.numbers import empty, sigmoid
from attncompiler.mechanisms.mamba.recurrence.tokens import (
    all_widened,
    channels,
    keep_states,
    loaded_rows,
    loaded_shared,
    of_channels,
    over_states,
    run_of,
    spread,
    states_of,
    steps_of,
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
    a = states_of(scan.a, first, end, True, N, NO, NI, CT, LN, LC)
    bias, skip = of_channels(scan.bias, e, inside), of_channels(scan.d, e, inside)
    state = tl.zeros([NO, NI, CT, LN, LC], tl.float32)
    if (states is not None) and step > 0:
        before = states + (b * (groups - 1) + step - 1) * (E * N)
        state = states_of(before, first, end, True, N, NO, NI, CT, LN, LC)
    elif initial is not None:
        state = states_of(initial + b * (E * N), first, end, True, N, NO, NI, CT, LN, LC)

    start = step * length
    # tokens are loaded while those before them are met: with a warp or two for a scheduler nothing else is under way
    real = which_real(scan, b, start, T, ROWS)
    u_coming = loaded_rows(u_rows, b, start, e, inside, real, ROWS)
    dt_coming = loaded_rows(dt_rows, b, start, e, inside, real, ROWS)
    if z_rows.ptr is not None:
        z_coming = loaded_rows(z_rows, b, start, e, inside, real, ROWS)
    b_coming = loaded_shared(b_rows, b, start, group, real, ROWS, N, NO, NI, LN, LC)
    c_coming = loaded_shared(c_rows, b, start, group, real, ROWS, N, NO, NI, LN, LC)
    for i in range(tl.cdiv(tl.minimum(start + length, T) - start, ROWS)):
        t0 = start + i * ROWS
        now = real
        u = all_widened(u_coming, ROWS)
        delta, _ = steps_of(dt_coming, scan, bias, inside, now, SOFTPLUS, ROWS)
        write, read = all_widened(b_coming, ROWS), all_widened(c_coming, ROWS)
        t1 = t0 + ROWS
        real = which_real(scan, b, t1, T, ROWS)
        u_coming = loaded_rows(u_rows, b, t1, e, inside, real, ROWS)
        dt_coming = loaded_rows(dt_rows, b, t1, e, inside, real, ROWS)
        b_coming = loaded_shared(b_rows, b, t1, group, real, ROWS, N, NO, NI, LN, LC)
        c_coming = loaded_shared(c_rows, b, t1, group, real, ROWS, N, NO, NI, LN, LC)
        if z_rows.ptr is not None:
            z = all_widened(z_coming, ROWS)
            z_coming = loaded_rows(z_rows, b, t1, e, inside, real, ROWS)
        ys = empty()
        for r in tl.static_range(ROWS):
            if scan.runs is not None:
                state = tl.where(run_of(scan, b, t0 + r, T) == run_of(scan, b, t0 + r - 1, T), state, 0.0)
            state = tl.exp2(spread(delta[r]) * a) * state + spread(delta[r] * u[r]) * write[r]
            ys += (over_states(state * read[r], CT, LN),)
        for r in tl.static_range(ROWS):
            y = ys[r]
            if scan.d is not None:
                y += skip * u[r]
            if z_rows.ptr is not None:
                y *= z[r] * sigmoid(z[r])
            y = tl.where(inside & now[r], y, 0.0).to(out.dtype.element_ty)
            tl.store(out + (b * T + t0) * E + e + r * E, y, mask=inside & (t0 + r < T))

    if step == groups - 1:
        keep_states(final + b * (E * N), state, first, end, N, NO, NI, CT, LN, LC)


@triton.jit
def which_seen(scan, real, entered, b, t0, T, ROWS: tl.constexpr):
    """Of tokens that are `real`, which the document `entered` has: of a later one nothing reaches the state before, not
    even what is not finite."""
    found = empty()
    for r in tl.static_range(ROWS):
        one = real[r]
        if scan.runs is not None:
            one = one & (run_of(scan, b, t0 + r, T) == entered)
        found += (one,)
    return found


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
    a = states_of(scan.a, first, end, True, N, NO, NI, CT, LN, LC)
    bias = of_channels(scan.bias, e, inside)
    state = tl.zeros([NO, NI, CT, LN, LC], tl.float32)
    total = tl.zeros([CT, LC], tl.float32)
    onward, left = state, state + 1.0
    start = step * length
    entered = 0
    if scan.runs is not None:
        entered = run_of(scan, b, start - 1, T)

    real = which_real(scan, b, start, T, ROWS)
    u_coming = loaded_rows(u_rows, b, start, e, inside, real, ROWS)
    dt_coming = loaded_rows(dt_rows, b, start, e, inside, real, ROWS)
    b_coming = loaded_shared(b_rows, b, start, group, real, ROWS, N, NO, NI, LN, LC)
    if back is not None:
        seen = which_seen(scan, real, entered, b, start, T, ROWS)
        dy_coming = loaded_rows(dout, b, start, e, inside, seen, ROWS)
        c_coming = loaded_shared(c_rows, b, start, group, seen, ROWS, N, NO, NI, LN, LC)
        if z_rows.ptr is not None:
            z_coming = loaded_rows(z_rows, b, start, e, inside, seen, ROWS)
    for i in range(tl.cdiv(tl.minimum(start + length, T) - start, ROWS)):
        t0 = start + i * ROWS
        if inner is not None and (t0 > start) & ((t0 - start) % chunk == 0):
            number = (b * groups + step) * (length // chunk - 1) + (t0 - start) // chunk - 1
            keep_states(inner + number * (E * N), state, first, end, N, NO, NI, CT, LN, LC)
            tl.store(upto + number * E + e, total, mask=inside)
        u = all_widened(u_coming, ROWS)
        delta, _ = steps_of(dt_coming, scan, bias, inside, real, SOFTPLUS, ROWS)
        write = all_widened(b_coming, ROWS)
        t1 = t0 + ROWS
        real = which_real(scan, b, t1, T, ROWS)
        u_coming = loaded_rows(u_rows, b, t1, e, inside, real, ROWS)
        dt_coming = loaded_rows(dt_rows, b, t1, e, inside, real, ROWS)
        b_coming = loaded_shared(b_rows, b, t1, group, real, ROWS, N, NO, NI, LN, LC)
        if back is not None:
            dy, read = all_widened(dy_coming, ROWS), all_widened(c_coming, ROWS)
            seen = which_seen(scan, real, entered, b, t1, T, ROWS)
            dy_coming = loaded_rows(dout, b, t1, e, inside, seen, ROWS)
            c_coming = loaded_shared(c_rows, b, t1, group, seen, ROWS, N, NO, NI, LN, LC)
            if z_rows.ptr is not None:
                z = all_widened(z_coming, ROWS)
                z_coming = loaded_rows(z_rows, b, t1, e, inside, seen, ROWS)
        for r in tl.static_range(ROWS):
            total += delta[r]
            decay = tl.exp2(spread(delta[r]) * a)
            if scan.runs is not None:
                now = run_of(scan, b, t0 + r, T)
                state = tl.where(now == run_of(scan, b, t0 + r - 1, T), state, 0.0)
            state = decay * state + spread(delta[r] * u[r]) * write[r]
            if back is not None:
                left *= decay
                if scan.runs is not None:
                    left = tl.where(now == entered, left, 0.0)
                gated = dy[r]
                if z_rows.ptr is not None:
                    gated *= z[r] * sigmoid(z[r])
                onward += left * (spread(gated) * read[r])

    of_group = b * groups + step
    if added is not None:
        keep_states(added + of_group * (E * N), state, first, end, N, NO, NI, CT, LN, LC)
    if lengths is not None:
        tl.store(lengths + of_group * E + e, total, mask=inside)
    if back is not None:
        keep_states(back + of_group * (E * N), onward, first, end, N, NO, NI, CT, LN, LC)


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
        added = empty()
        kept = empty()
        for k in tl.static_range(TOGETHER):
            step = i * TOGETHER + k
            group = groups - 1 - step if REVERSE else step
            mask = there & (step < groups)
            added += (tl.load(states + (b * groups + group) * (E * N) + m, mask=mask, other=0.0),)
            total = tl.load(lengths + (b * groups + group) * E + m // N, mask=mask, other=0.0)
            kept += (tl.exp2(total * a),)
        for k in tl.static_range(TOGETHER):
            step = i * TOGETHER + k
            group = groups - 1 - step if REVERSE else step
            state = kept[k] * state
            if scan.runs is not None:
                same = run_of(scan, b, group * length - 1, T) == run_of(scan, b, (group + 1) * length - 1, T)
                state = tl.where(same, state, 0.0)
            state += added[k]
            tl.store(states + (b * groups + group) * (E * N) + m, state, mask=there & (step < groups))
