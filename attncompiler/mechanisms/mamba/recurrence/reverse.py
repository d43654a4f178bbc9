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

from attncompiler.mechanisms.mamba.recurrence.tokens import (
    LN2,
    channels,
    numbers,
    of_channels,
    of_rows,
    of_shared,
    over_channels,
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


class Grads(NamedTuple):
    """Where gradients go, each contiguous and None where nobody asks for it."""

    u: Any
    """(B, T, E), as are dt and z"""
    dt: Any
    z: Any
    b: Any
    """(slots, B, T, G, N) fp32, as is c: of each program's own channels"""
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
    """What a sweep and its carrying left, fp32; None where there is none."""

    initial: Any
    """(B, E, N), the state before the first token"""
    states: Any
    """(B, groups, E, N), the state behind each group"""
    inner: Any
    """(B, groups · (chunks − 1), E, N), what a group's own tokens add before each chunk but the first"""
    upto: Any
    """(B, groups · (chunks − 1), E), the sum of the time steps of a group's tokens before each of them"""
    final: Any
    """(B, E, N), the gradient of the state behind the last token"""
    back: Any
    """(B, groups, E, N), the gradient of the state before each group"""


@triton.jit
def put_state(x, one, r, ROWS: tl.constexpr):
    """States [ROWS, NO, NI, CT, LN, LC] with `one` as that of token r."""
    return tl.where(tl.arange(0, ROWS)[:, None, None, None, None, None] == r, one[None], x)


@triton.jit
def put_shares(x, one, r, ROWS: tl.constexpr):
    """A tile [ROWS, NO, NI, LN] with `one` as its token r."""
    return tl.where(tl.arange(0, ROWS)[:, None, None, None] == r, one[None], x)


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
    n = numbers(NO, NI, LN)
    HELD: tl.constexpr = NO * NI * CT * LN * LC
    # a thread's own numbers, NI of them side by side
    own = tl.arange(0, NO)[:, None, None, None, None] * CT + tl.arange(0, CT)[None, None, :, None, None]
    own = own * LN + tl.arange(0, LN)[None, None, None, :, None]
    own = own * LC + tl.arange(0, LC)[None, None, None, None, :]
    own = own * NI + tl.arange(0, NI)[None, :, None, None, None]
    own = scratch + tl.program_id(0).to(tl.int64) * (chunk // ROWS * HELD) + own
    shares = tl.arange(0, NO)[:, None, None] * (LN * NI) + tl.arange(0, LN)[None, None, :] * NI
    shares = (shares + tl.arange(0, NI)[None, :, None])[None]

    for block in range(slot * many, tl.minimum((slot + 1) * many, blocks)):
        e = channels(group * width + block * (CT * LC), unit, CT, LC)
        inside = e < (group + 1) * width
        kept = (n < N) & spread_one(inside)
        at = spread_one(e.to(tl.int64) * N) + n
        a = tl.load(scan.a + at, mask=kept, other=0.0)
        bias, skip = of_channels(scan.bias, e, inside), of_channels(scan.d, e, inside)
        onward = tl.zeros([NO, NI, CT, LN, LC], tl.float32)
        da = onward
        d_skip, d_bias = tl.zeros([CT, LC], tl.float32), tl.zeros([CT, LC], tl.float32)
        if (around.back is not None) and step < groups - 1:
            onward = tl.load(around.back + (b * groups + step + 1) * (E * N) + at, mask=kept, other=0.0)
        elif around.final is not None and step == groups - 1:
            onward = tl.load(around.final + b * (E * N) + at, mask=kept, other=0.0)

        chunks = (stop - start + chunk - 1) // chunk
        for i in range(chunks):
            number = chunks - 1 - i
            begin = start + number * chunk
            pieces = (tl.minimum(begin + chunk, stop) - begin + ROWS - 1) // ROWS
            place = (b * groups + step) * (length // chunk - 1) + number - 1
            state = tl.load(around.inner + place * (E * N) + at, mask=kept & (number > 0), other=0.0)
            if (around.initial is not None) or (around.states is not None):
                entered = tl.zeros([NO, NI, CT, LN, LC], tl.float32)
                if (around.states is not None) and step > 0:
                    entered = tl.load(around.states + (b * groups + step - 1) * (E * N) + at, mask=kept, other=0.0)
                elif around.initial is not None:
                    entered = tl.load(around.initial + b * (E * N) + at, mask=kept, other=0.0)
                upto = tl.load(around.upto + place * E + e, mask=inside & (number > 0), other=0.0)
                entered *= tl.exp2(spread_one(upto) * a)
                if scan.runs is not None:
                    same = run_of(scan, b, start - 1, T) == run_of(scan, b, begin - 1, T)
                    entered = tl.where(same, entered, 0.0)
                state += entered

            tl.store(own, state)
            for piece in range(1, pieces):
                t0 = begin + (piece - 1) * ROWS
                real = which_real(scan, b, tokens(t0, ROWS), T)
                u, delta, _ = stepped(u_rows, dt_rows, scan, bias, b, t0, e, inside[None] & real, SOFTPLUS, ROWS)
                write = of_shared(b_rows, b, t0, group, real, ROWS, N, NO, NI, LN, LC)
                steps, written = spread(delta, LN), spread(delta * u, LN)
                for r in tl.static_range(ROWS):
                    if scan.runs is not None:
                        state = tl.where(run_of(scan, b, t0 + r, T) == run_of(scan, b, t0 + r - 1, T), state, 0.0)
                    state = tl.exp2(row(steps, r, ROWS) * a) * state + row(written, r, ROWS) * row(write, r, ROWS)
                tl.store(own + piece * HELD, state)
            tl.debug_barrier()

            for j in range(pieces):
                piece = pieces - 1 - j
                t0 = begin + piece * ROWS
                t = tokens(t0, ROWS)
                real = which_real(scan, b, t, T)
                there = inside[None] & real
                u, delta, slope = stepped(u_rows, dt_rows, scan, bias, b, t0, e, there, SOFTPLUS, ROWS)
                write = of_shared(b_rows, b, t0, group, real, ROWS, N, NO, NI, LN, LC)
                read = of_shared(c_rows, b, t0, group, real, ROWS, N, NO, NI, LN, LC)
                d_out = of_rows(dout, b, t0, e, there, ROWS)
                dy = d_out
                if z_rows.ptr is not None:
                    z = of_rows(z_rows, b, t0, e, there, ROWS)
                    gate = sigmoid(z)
                    dy *= z * gate
                steps, written, dys = spread(delta, LN), spread(delta * u, LN), spread(dy, LN)
                state = tl.load(own + piece * HELD)
                before = tl.zeros([ROWS, NO, NI, CT, LN, LC], tl.float32)
                behind = before
                for r in tl.static_range(ROWS):
                    before = put_state(before, state, r, ROWS)
                    if scan.runs is not None:
                        state = tl.where(run_of(scan, b, t0 + r, T) == run_of(scan, b, t0 + r - 1, T), state, 0.0)
                    state = tl.exp2(row(steps, r, ROWS) * a) * state + row(written, r, ROWS) * row(write, r, ROWS)
                    behind = put_state(behind, state, r, ROWS)

                y, d_written = tl.zeros([ROWS, CT, LC], tl.float32), tl.zeros([ROWS, CT, LC], tl.float32)
                d_step = tl.zeros([ROWS, CT, LC], tl.float32)
                db, dc = tl.zeros([ROWS, NO, NI, LN], tl.float32), tl.zeros([ROWS, NO, NI, LN], tl.float32)
                for r in tl.static_range(ROWS - 1, -1, -1):
                    dy_r, delta_r, read_r = row(dys, r, ROWS), row(steps, r, ROWS), row(read, r, ROWS)
                    if z_rows.ptr is not None:
                        y = put(y, over_states(row(behind, r, ROWS) * read_r, CT, LN), r, ROWS)
                    onward += dy_r * read_r
                    dc = put_shares(dc, over_channels(dy_r * row(behind, r, ROWS)), r, ROWS)
                    db = put_shares(db, over_channels(row(written, r, ROWS) * onward), r, ROWS)
                    d_written = put(d_written, over_states(onward * row(write, r, ROWS), CT, LN), r, ROWS)
                    # made again: to keep all tokens' decays there are no registers
                    onward *= tl.exp2(delta_r * a + nothing)
                    if scan.runs is not None:
                        same = run_of(scan, b, t0 + r, T) == run_of(scan, b, t0 + r - 1, T)
                        onward = tl.where(same, onward, 0.0)
                    d_exponent = onward * row(before, r, ROWS)
                    if scan.runs is not None:
                        d_exponent = tl.where(same, d_exponent, 0.0)  # another document's state need not be finite
                    da += d_exponent * delta_r
                    d_step = put(d_step, over_states(d_exponent * a, CT, LN), r, ROWS)

                d_raw = tl.where(there, (d_step * LN2 + d_written * u) * slope, 0.0)
                d_u = d_written * delta
                d_bias += tl.sum(d_raw, 0)
                if scan.d is not None:
                    d_u += dy * skip[None]
                    d_skip += tl.sum(dy * u, 0)
                if z_rows.ptr is not None:
                    if scan.d is not None:
                        y += skip[None] * u
                    d_z = tl.where(there, d_out * y * (gate * (1 + z * (1 - gate))), 0.0)
                at_out = (b * T + t0) * E + e[None] + tokens(0, ROWS) * E
                mask = inside[None] & (t < T)
                tl.store(grads.u + at_out, tl.where(there, d_u, 0.0).to(grads.u.dtype.element_ty), mask=mask)
                tl.store(grads.dt + at_out, d_raw.to(grads.dt.dtype.element_ty), mask=mask)
                if z_rows.ptr is not None:
                    tl.store(grads.z + at_out, d_z.to(grads.z.dtype.element_ty), mask=mask)
                t = t[:, :, :, None]
                at_share = (
                    ((slot * B + b) * T + t0 + tl.arange(0, ROWS)[:, None, None, None]) * G + group
                ) * N + shares
                mask = (shares < N) & (t < T)
                more = mask & (block > slot * many)
                db += tl.load(grads.b + at_share, mask=more, other=0.0)
                dc += tl.load(grads.c + at_share, mask=more, other=0.0)
                if scan.real is not None:
                    real = which_real(scan, b, t, T)
                    db, dc = tl.where(real, db, 0.0), tl.where(real, dc, 0.0)
                tl.store(grads.b + at_share, db, mask=mask)
                tl.store(grads.c + at_share, dc, mask=mask)
            tl.debug_barrier()

        of_group = b * groups + step
        tl.store(grads.a + (b * groups + (step + 1) % groups) * (E * N) + at, da, mask=kept)
        if grads.d is not None:
            tl.store(grads.d + of_group * E + e, d_skip, mask=inside)
        if grads.bias is not None:
            tl.store(grads.bias + of_group * E + e, d_bias, mask=inside)
        if grads.initial is not None and step == 0:
            tl.store(grads.initial + b * (E * N) + at, onward, mask=kept)
