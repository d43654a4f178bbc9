"""The scan's backward over one group of tokens, from its last to its first.

Chunks of tokens are met from the last one. From the state before a chunk, which a sweep left, its states are made
again: first those before each ROWS tokens, which go to memory that the program has for itself and are read back from
the cache; then, from the last of them, those between. An exponential is taken three times, beside the sweep's: on the
way to a chunk's end, among ROWS tokens forward and, since a thread has no registers to keep it, among them backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attncompiler.blocks.launching.numbers import empty, sigmoid
from attncompiler.mechanisms.mamba.recurrence.tokens import (
    LN2,
    all_widened,
    channel,
    channels,
    keep_states,
    loaded_rows,
    of_channels,
    of_shared,
    over_channels,
    over_states,
    run_of,
    spread,
    states_of,
    steps_of,
    which_real,
    with_channel,
)


class Grads(NamedTuple):
    """Where gradients go, each contiguous and None where nobody asks for it."""

    u: Any
    """(B, T, E), as are dt and z"""
    dt: Any
    z: Any
    b: Any
    """(slots, B, T, G, N) fp32, as is c: of each program's own channels, added to what is there"""
    c: Any
    a: Any
    """(B, groups, E, N) fp32: of each group's tokens, at the group behind. It may be what `back` of Around is, which no
    other program reads there."""
    d: Any
    """(B, groups, E) fp32, as is bias"""
    bias: Any
    initial: Any
    """(B, E, N) fp32"""


class Around(NamedTuple):
    """What a sweep and its carrying left, fp32 but for `inner`; None where there is none."""

    initial: Any
    """(B, E, N), the state before the first token"""
    states: Any
    """(B, groups, E, N), the state behind each group"""
    inner: Any
    """(B, groups · (chunks − 1), E, N), what a group's own tokens add before each chunk but the first; bf16 with tokens
    of bf16"""
    upto: Any
    """(B, groups · (chunks − 1), E), the sum of the time steps of a group's tokens before each of them"""
    final: Any
    """(B, E, N), the gradient of the state behind the last token"""
    back: Any
    """(B, groups, E, N), the gradient of the state before each group"""


@triton.jit
def own_places(c, NO: tl.constexpr, NI: tl.constexpr, CT: tl.constexpr, LN: tl.constexpr, LC: tl.constexpr):
    """Where channel c of states lies in a program's own memory, [NO, NI, 1, LN, LC]: a thread's NI side by side."""
    at = tl.arange(0, NO)[:, None, None, None, None] * CT + c
    at = at * LN + tl.arange(0, LN)[None, None, None, :, None]
    at = at * LC + tl.arange(0, LC)[None, None, None, None, :]
    return at * NI + tl.arange(0, NI)[None, :, None, None, None]


@triton.jit
def put_own(ptr, x, NO: tl.constexpr, NI: tl.constexpr, CT: tl.constexpr, LN: tl.constexpr, LC: tl.constexpr):
    """Write states to the program's own memory."""
    for c in tl.static_range(CT):
        tl.store(ptr + own_places(c, NO, NI, CT, LN, LC), channel(x, c, CT))


@triton.jit
def get_own(ptr, NO: tl.constexpr, NI: tl.constexpr, CT: tl.constexpr, LN: tl.constexpr, LC: tl.constexpr):
    """Read what `put_own` wrote."""
    found = tl.zeros([NO, NI, CT, LN, LC], tl.float32)
    for c in tl.static_range(CT):
        found = with_channel(found, tl.load(ptr + own_places(c, NO, NI, CT, LN, LC)), c, CT)
    return found


@triton.jit(do_not_specialize=["B", "T", "groups", "length", "chunk", "many", "unit", "nothing"])
def backward_kernel(
    u_rows, dt_rows, z_rows, b_rows, c_rows, scan, dout, around, grads, scratch,
    B, T, groups, length, chunk, many, unit, nothing,
    SOFTPLUS: tl.constexpr, ROWS: tl.constexpr,
    E: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
    NO: tl.constexpr, NI: tl.constexpr, CT: tl.constexpr, LN: tl.constexpr, LC: tl.constexpr,
):  # fmt: skip
    """A program takes `many` blocks of channels, one after the other, whose shares of the gradients of B and C it adds.

    `scratch` (programs, chunk / ROWS, NO·NI·CT·LN·LC) fp32 holds a program's states.
    """
    width: tl.constexpr = E // G
    blocks: tl.constexpr = (width + CT * LC - 1) // (CT * LC)
    slots = (blocks + many - 1) // many
    slot, rest = tl.program_id(0) % slots, tl.program_id(0) // slots
    group, rest = rest % G, rest // G
    step, b = rest % groups, (rest // groups).to(tl.int64)
    start = step * length
    stop = tl.minimum(start + length, T)
    HELD: tl.constexpr = NO * NI * CT * LN * LC
    own = scratch + tl.program_id(0).to(tl.int64) * (chunk // ROWS * HELD)
    # all threads of a channel's numbers have their sums, and one of them writes
    lane = tl.arange(0, LC)[None, None, None, :]
    shares = tl.arange(0, NO)[:, None, None] * (LN * NI) + tl.arange(0, LN)[None, None, :] * NI
    shares = (shares + tl.arange(0, NI)[None, :, None])[:, :, :, None] + lane * 0

    for block in range(slot * many, tl.minimum((slot + 1) * many, blocks)):
        first, end = group * width + block * (CT * LC), (group + 1) * width
        e = channels(first, unit, CT, LC)
        inside = e < end
        a = states_of(scan.a, first, end, True, N, NO, NI, CT, LN, LC)
        bias, skip = of_channels(scan.bias, e, inside), of_channels(scan.d, e, inside)
        onward = tl.zeros([NO, NI, CT, LN, LC], tl.float32)
        da = onward
        d_skip, d_bias = tl.zeros([CT, LC], tl.float32), tl.zeros([CT, LC], tl.float32)
        if (around.back is not None) and step < groups - 1:
            behind = around.back + (b * groups + step + 1) * (E * N)
            onward = states_of(behind, first, end, True, N, NO, NI, CT, LN, LC)
        elif around.final is not None and step == groups - 1:
            onward = states_of(around.final + b * (E * N), first, end, True, N, NO, NI, CT, LN, LC)

        chunks = (stop - start + chunk - 1) // chunk
        for i in range(chunks):
            number = chunks - 1 - i
            begin = start + number * chunk
            pieces = (tl.minimum(begin + chunk, stop) - begin + ROWS - 1) // ROWS
            place = (b * groups + step) * (length // chunk - 1) + number - 1
            state = states_of(around.inner + place * (E * N), first, end, number > 0, N, NO, NI, CT, LN, LC)
            if (around.initial is not None) or (around.states is not None):
                entered = tl.zeros([NO, NI, CT, LN, LC], tl.float32)
                if (around.states is not None) and step > 0:
                    before = around.states + (b * groups + step - 1) * (E * N)
                    entered = states_of(before, first, end, True, N, NO, NI, CT, LN, LC)
                elif around.initial is not None:
                    entered = states_of(around.initial + b * (E * N), first, end, True, N, NO, NI, CT, LN, LC)
                upto = tl.load(around.upto + place * E + e, mask=inside & (number > 0), other=0.0)
                entered *= tl.exp2(spread(upto) * a)
                if scan.runs is not None:
                    same = run_of(scan, b, start - 1, T) == run_of(scan, b, begin - 1, T)
                    entered = tl.where(same, entered, 0.0)
                state += entered

            put_own(own, state, NO, NI, CT, LN, LC)
            # tokens are loaded while those before them are met: nothing else would be under way
            real = which_real(scan, b, begin, T, ROWS)
            u_coming = loaded_rows(u_rows, b, begin, e, inside, real, ROWS)
            dt_coming = loaded_rows(dt_rows, b, begin, e, inside, real, ROWS)
            for piece in range(1, pieces):
                t0 = begin + (piece - 1) * ROWS
                u = all_widened(u_coming, ROWS)
                write = of_shared(b_rows, b, t0, group, real, ROWS, N, NO, NI, LN, LC)
                delta, _ = steps_of(dt_coming, scan, bias, inside, real, SOFTPLUS, ROWS)
                t1 = begin + piece * ROWS
                real = which_real(scan, b, t1, T, ROWS)
                u_coming = loaded_rows(u_rows, b, t1, e, inside, real, ROWS)
                dt_coming = loaded_rows(dt_rows, b, t1, e, inside, real, ROWS)
                for r in tl.static_range(ROWS):
                    if scan.runs is not None:
                        state = tl.where(run_of(scan, b, t0 + r, T) == run_of(scan, b, t0 + r - 1, T), state, 0.0)
                    state = tl.exp2(spread(delta[r]) * a) * state + spread(delta[r] * u[r]) * write[r]
                put_own(own + piece * HELD, state, NO, NI, CT, LN, LC)
            tl.debug_barrier()

            t1 = begin + (pieces - 1) * ROWS
            coming = which_real(scan, b, t1, T, ROWS)
            u_coming = loaded_rows(u_rows, b, t1, e, inside, coming, ROWS)
            dt_coming = loaded_rows(dt_rows, b, t1, e, inside, coming, ROWS)
            dy_coming = loaded_rows(dout, b, t1, e, inside, coming, ROWS)
            if z_rows.ptr is not None:
                z_coming = loaded_rows(z_rows, b, t1, e, inside, coming, ROWS)
            for j in range(pieces):
                piece = pieces - 1 - j
                t0 = begin + piece * ROWS
                real = which_real(scan, b, t0, T, ROWS)
                u, d_out = all_widened(u_coming, ROWS), all_widened(dy_coming, ROWS)
                delta, slope = steps_of(dt_coming, scan, bias, inside, real, SOFTPLUS, ROWS)
                write = of_shared(b_rows, b, t0, group, real, ROWS, N, NO, NI, LN, LC)
                read = of_shared(c_rows, b, t0, group, real, ROWS, N, NO, NI, LN, LC)
                t1 = begin + tl.maximum(piece - 1, 0) * ROWS
                coming = which_real(scan, b, t1, T, ROWS)
                u_coming = loaded_rows(u_rows, b, t1, e, inside, coming, ROWS)
                dt_coming = loaded_rows(dt_rows, b, t1, e, inside, coming, ROWS)
                dy_coming = loaded_rows(dout, b, t1, e, inside, coming, ROWS)
                if z_rows.ptr is not None:
                    z = all_widened(z_coming, ROWS)
                    z_coming = loaded_rows(z_rows, b, t1, e, inside, coming, ROWS)
                state = get_own(own + piece * HELD, NO, NI, CT, LN, LC)
                states = empty()
                states += (state,)  # before the first of the tokens, and behind each
                for r in tl.static_range(ROWS):
                    if scan.runs is not None:
                        state = tl.where(run_of(scan, b, t0 + r, T) == run_of(scan, b, t0 + r - 1, T), state, 0.0)
                    state = tl.exp2(spread(delta[r]) * a) * state + spread(delta[r] * u[r]) * write[r]
                    states += (state,)

                at_shares = (((slot * B + b) * T + t0) * G + group) * N + shares
                for r in tl.static_range(ROWS - 1, -1, -1):
                    there = inside & real[r]
                    dy = d_out[r]
                    if z_rows.ptr is not None:
                        gate = sigmoid(z[r])
                        dy *= z[r] * gate
                    onward += spread(dy) * read[r]
                    dc = over_channels(spread(dy) * states[r + 1])
                    db = over_channels(spread(delta[r] * u[r]) * onward)
                    if scan.real is not None:
                        db, dc = tl.where(real[r], db, 0.0), tl.where(real[r], dc, 0.0)
                    # to what blocks before this one have there, all by this thread: in order, and nothing is waited for
                    at_share = at_shares + r * (G * N)
                    shared = (shares < N) & (lane == 0) & (t0 + r < T)
                    tl.atomic_add(grads.b + at_share, db[:, :, :, None] + lane * 0.0, mask=shared, sem="relaxed")
                    tl.atomic_add(grads.c + at_share, dc[:, :, :, None] + lane * 0.0, mask=shared, sem="relaxed")
                    d_written = over_states(onward * write[r], CT, LN)
                    # made again: to keep all tokens' decays there are no registers
                    onward *= tl.exp2(spread(delta[r]) * a + nothing)
                    if scan.runs is not None:
                        same = run_of(scan, b, t0 + r, T) == run_of(scan, b, t0 + r - 1, T)
                        onward = tl.where(same, onward, 0.0)
                    d_exponent = onward * states[r]
                    if scan.runs is not None:
                        d_exponent = tl.where(same, d_exponent, 0.0)  # another document's state need not be finite
                    da += d_exponent * spread(delta[r])
                    d_step = over_states(d_exponent * a, CT, LN)

                    d_raw = tl.where(there, (d_step * LN2 + d_written * u[r]) * slope[r], 0.0)
                    d_u = d_written * delta[r]
                    d_bias += d_raw
                    if scan.d is not None:
                        d_u += dy * skip
                        d_skip += dy * u[r]
                    at_out = (b * T + t0) * E + e + r * E
                    mask = inside & (t0 + r < T)
                    tl.store(grads.u + at_out, tl.where(there, d_u, 0.0).to(grads.u.dtype.element_ty), mask=mask)
                    tl.store(grads.dt + at_out, d_raw.to(grads.dt.dtype.element_ty), mask=mask)
                    if z_rows.ptr is not None:
                        y = over_states(states[r + 1] * read[r], CT, LN)
                        if scan.d is not None:
                            y += skip * u[r]
                        d_z = tl.where(there, d_out[r] * y * (gate * (1 + z[r] * (1 - gate))), 0.0)
                        tl.store(grads.z + at_out, d_z.to(grads.z.dtype.element_ty), mask=mask)
            tl.debug_barrier()

        of_group = b * groups + step
        at_a = grads.a + (b * groups + (step + 1) % groups) * (E * N)
        keep_states(at_a, da, first, end, N, NO, NI, CT, LN, LC)
        if grads.d is not None:
            tl.store(grads.d + of_group * E + e, d_skip, mask=inside)
        if grads.bias is not None:
            tl.store(grads.bias + of_group * E + e, d_bias, mask=inside)
        if grads.initial is not None and step == 0:
            keep_states(grads.initial + b * (E * N), onward, first, end, N, NO, NI, CT, LN, LC)
