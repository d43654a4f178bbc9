"""The scan's backward over one group of tokens, from its last to its first.

Chunks of tokens are met from the last one. From the state before a chunk, which a sweep left, its states are made again:
first those before each ROWS tokens, which go to memory that the program has for itself and are read back from the cache;
then, from the last of them, those between. Each number of state takes two exponentials and the sweep's third.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attncompiler.mechanisms.mamba.recurrence.passes import of_channels
from attncompiler.mechanisms.mamba.recurrence.tokens import (
    LN2,
    channels,
    is_real,
    numbers,
    over_channels,
    over_states,
    per_channel,
    per_state,
    raw_step,
    run_of,
    softplus,
    spread,
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
    """(B, groups, E, N) fp32: of each group's tokens"""
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
    """(B, groups · chunks, E, N), what a group's own tokens add before each chunk"""
    upto: Any
    """(B, groups · chunks, E), the sum of the time steps of a group's tokens before each chunk"""
    final: Any
    """(B, E, N), the gradient of the state behind the last token"""
    back: Any
    """(B, groups, E, N), the gradient of the state before each group"""


@triton.jit
def settled(x, CT: tl.constexpr, LN: tl.constexpr):
    """`over_states` with a channel for a thread, and not all of them for each thread that had a part of them."""
    if CT == LN and CT > 1:
        whole = tl.sum(tl.sum(x, 0), 0)
        whole = tl.sum(whole, 1)[:, None, :] + tl.zeros([1, LN, 1], tl.float32)
        own = tl.arange(0, CT)[:, None, None] == tl.arange(0, LN)[None, :, None]
        return tl.sum(tl.where(own, whole, 0.0), 0)
    else:
        return over_states(x)


@triton.jit(do_not_specialize=["B", "T", "E", "G", "groups", "tokens", "chunk", "many", "unit"])
def backward_kernel(
    scan, dout, around, grads, scratch, B, T, E, G, groups, tokens, chunk, many, unit,
    SOFTPLUS: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr,
    NO: tl.constexpr, NI: tl.constexpr, CT: tl.constexpr, LN: tl.constexpr, LC: tl.constexpr,
):  # fmt: skip
    """A program takes `many` blocks of channels, one after the other, whose shares of the gradients of B and C it adds.

    `scratch` (programs, chunk / ROWS, NO·NI·CT·LN·LC) fp32 holds a program's states.
    """
    width = E // G
    blocks = (width + CT * LC - 1) // (CT * LC)
    slots = (blocks + many - 1) // many
    slot, rest = tl.program_id(0) % slots, tl.program_id(0) // slots
    group, rest = rest % G, rest // G
    step, b = rest % groups, (rest // groups).to(tl.int64)
    size = E.to(tl.int64) * N
    start = step * tokens
    stop = tl.minimum(start + tokens, T)
    n = numbers(unit, NO, NI, LN)
    n_row = tl.arange(0, NO)[:, None, None] * (LN * NI) + tl.arange(0, LN)[None, None, :] * NI
    n_row += tl.arange(0, NI)[None, :, None]
    own = tl.arange(0, NO)[:, None, None, None, None] * CT + tl.arange(0, CT)[None, None, :, None, None]
    own = own * LN + tl.arange(0, LN)[None, None, None, :, None]
    own = own * LC + tl.arange(0, LC)[None, None, None, None, :]
    own = own * NI + tl.arange(0, NI)[None, :, None, None, None]
    HELD: tl.constexpr = NO * NI * CT * LN * LC
    own = scratch + (tl.program_id(0).to(tl.int64) * (chunk // ROWS)) * HELD + own

    for block in range(slot * many, tl.minimum((slot + 1) * many, blocks)):
        e = channels(group * width + block * (CT * LC), unit, CT, LC)
        inside = e < (group + 1) * width
        kept = (n < N) & spread(inside)
        at = spread(e.to(tl.int64) * N) + n
        a = tl.load(scan.a + at, mask=kept, other=0.0)
        bias, skip = of_channels(scan.bias, e, inside), of_channels(scan.d, e, inside)
        onward = tl.zeros([NO, NI, CT, LN, LC], tl.float32)
        da = onward
        d_skip, d_bias = tl.zeros([CT, LC], tl.float32), tl.zeros([CT, LC], tl.float32)
        if (around.back is not None) and step < groups - 1:
            onward = tl.load(around.back + (b * groups + step + 1) * size + at, mask=kept, other=0.0)
        elif around.final is not None:
            if step == groups - 1:
                onward = tl.load(around.final + b * size + at, mask=kept, other=0.0)

        chunks = (stop - start + chunk - 1) // chunk
        for i in range(chunks):
            number = chunks - 1 - i
            begin = start + number * chunk
            pieces = (tl.minimum(begin + chunk, stop) - begin + ROWS - 1) // ROWS
            place = b * (groups * (tokens // chunk)) + step * (tokens // chunk) + number
            state = tl.load(around.inner + place * size + at, mask=kept, other=0.0)
            length = tl.load(around.upto + place * E + e, mask=inside, other=0.0)
            if (around.initial is not None) or (around.states is not None):
                entered = tl.zeros([NO, NI, CT, LN, LC], tl.float32)
                if (around.states is not None) and step > 0:
                    entered = tl.load(around.states + (b * groups + step - 1) * size + at, mask=kept, other=0.0)
                elif around.initial is not None:
                    entered = tl.load(around.initial + b * size + at, mask=kept, other=0.0)
                entered *= tl.exp2(spread(length) * a)
                if scan.runs is not None:
                    same = run_of(scan, b, start - 1, T) == run_of(scan, b, begin - 1, T)
                    entered = tl.where(same, entered, 0.0)
                state += entered

            tl.store(own, state)
            for piece in range(1, pieces):
                for r in tl.static_range(ROWS):
                    t = begin + (piece - 1) * ROWS + r
                    real = is_real(scan, b, t, T)
                    there = inside & real
                    delta = raw_step(scan, bias, b, t, e, there)
                    u = per_channel(scan.u, b, t, e, there)
                    write = per_state(scan.b, b, t, group, real, N, NO, NI, LN, LC)
                    if SOFTPLUS:
                        delta, _ = softplus(delta)
                    delta = tl.where(there, delta, 0.0)
                    if scan.runs is not None:
                        state = tl.where(run_of(scan, b, t, T) == run_of(scan, b, t - 1, T), state, 0.0)
                    state = tl.exp2(spread(delta) * a) * state + spread(delta * u) * write
                tl.store(own + piece * HELD, state)
            tl.debug_barrier()

            for j in range(pieces):
                piece = pieces - 1 - j
                t0 = begin + piece * ROWS
                state = tl.load(own + piece * HELD)
                us, steps, slopes, writes, decays = (), (), (), (), ()
                befores, states = (), ()
                for r in tl.static_range(ROWS):
                    t = t0 + r
                    real = is_real(scan, b, t, T)
                    there = inside & real
                    raw = raw_step(scan, bias, b, t, e, there)
                    u = per_channel(scan.u, b, t, e, there)
                    write = per_state(scan.b, b, t, group, real, N, NO, NI, LN, LC)
                    delta = raw
                    slope = tl.where(there, 1.0, 0.0)
                    if SOFTPLUS:
                        delta, small = softplus(raw)
                        slope = tl.where(raw > 0, slope, small * slope) / (1 + small)
                    delta = tl.where(there, delta, 0.0)
                    if scan.runs is not None:
                        state = tl.where(run_of(scan, b, t, T) == run_of(scan, b, t - 1, T), state, 0.0)
                    decay = tl.exp2(spread(delta) * a)
                    befores = befores + (state,)
                    state = decay * state + spread(delta * u) * write
                    us, steps, slopes = us + (u,), steps + (delta,), slopes + (slope,)
                    writes, decays, states = writes + (write,), decays + (decay,), states + (state,)

                dus, dts, dzs, dbs, dcs = (), (), (), (), ()
                for r in tl.static_range(ROWS - 1, -1, -1):
                    t = t0 + r
                    real = is_real(scan, b, t, T)
                    there = inside & real
                    read = per_state(scan.c, b, t, group, real, N, NO, NI, LN, LC)
                    dy = per_channel(dout, b, t, e, there)
                    if scan.z is not None:
                        z = per_channel(scan.z, b, t, e, there)
                        gate = tl.sigmoid(z)
                        y = settled(states[r] * read, CT, LN)
                        if scan.d is not None:
                            y += skip * us[r]
                        dzs = dzs + (tl.where(there, dy * y * (gate * (1 + z * (1 - gate))), 0.0),)
                        dy *= z * gate
                    onward += spread(dy) * read
                    dcs = dcs + (tl.where(real, over_channels(spread(dy) * states[r]), 0.0),)
                    dbs = dbs + (tl.where(real, over_channels(spread(steps[r] * us[r]) * onward), 0.0),)
                    d_written = settled(onward * writes[r], CT, LN)
                    onward *= decays[r]
                    if scan.runs is not None:
                        onward = tl.where(run_of(scan, b, t, T) == run_of(scan, b, t - 1, T), onward, 0.0)
                    d_exponent = onward * befores[r]
                    da += d_exponent * spread(steps[r])
                    d_raw = (settled(d_exponent * a, CT, LN) * LN2 + d_written * us[r]) * slopes[r]
                    d_raw = tl.where(there, d_raw, 0.0)
                    d_bias += d_raw
                    d_skip += dy * us[r]
                    dts = dts + (d_raw,)
                    dus = dus + (tl.where(there, d_written * steps[r] + dy * skip, 0.0),)

                for r in tl.static_range(ROWS - 1, -1, -1):
                    t = t0 + r
                    row = (b * T + t) * E
                    written = inside & (t < T)
                    tl.store(grads.u + row + e, dus[ROWS - 1 - r].to(grads.u.dtype.element_ty), mask=written)
                    tl.store(grads.dt + row + e, dts[ROWS - 1 - r].to(grads.dt.dtype.element_ty), mask=written)
                    if scan.z is not None:
                        tl.store(grads.z + row + e, dzs[ROWS - 1 - r].to(grads.z.dtype.element_ty), mask=written)
                    of = (((slot * B + b) * T + t) * G + group) * N + n_row
                    written = (n_row < N) & (t < T)
                    more = written & (block > slot * many)
                    tl.store(grads.b + of, tl.load(grads.b + of, mask=more, other=0.0) + dbs[ROWS - 1 - r], mask=written)
                    tl.store(grads.c + of, tl.load(grads.c + of, mask=more, other=0.0) + dcs[ROWS - 1 - r], mask=written)
            tl.debug_barrier()

        of_group = b * groups + step
        tl.store(grads.a + of_group * size + at, da, mask=kept)
        if grads.d is not None:
            tl.store(grads.d + of_group * E + e, d_skip, mask=inside)
        if grads.bias is not None:
            tl.store(grads.bias + of_group * E + e, d_bias, mask=inside)
        if grads.initial is not None:
            if step == 0:
                tl.store(grads.initial + b * size + at, onward, mask=kept)
