"""Flash attention, forward, for Hopper GPUs: warp-specialised, in Triton's Gluon.

One program a multiprocessor takes (rows, head) tiles from a counter until none is left. One of its warps, the
producer, has the copy engine fetch the queries of a tile and then its keys and values, block by block, into rings in
shared memory. Two or three warpgroups, the consumers, hold 64 of the tile's rows each. What hides what, after
FlashAttention-3 (arXiv 2407.08608):

* the exponentials of block j run under O += P V of block j - 1, issued after S = Q K of block j (two consumers;
  three have no registers to spare, and need it less);
* the softmax of one consumer runs under the products of the others;
* the epilogue of a tile runs under the first product of the next, whose queries have a buffer of their own.

The keys and values of step `count` are in stage `count % stages` of their rings. A step is the pair
S = Q K_count, O += P V_(count - 1): it frees both of its stages at once, through the barrier `released`, also where
O belongs to one tile and S to the next.

Layout: q, out (B, T, H, D); k, v (B, S, K, D); lse (B, H, T) in float32, natural logarithm. Query t stands at
position t + S - T. A row that sees no key gives out 0 and lse -inf.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attncompiler.blocks.launching.launcher import Launcher, known_by
from attncompiler.mechanisms.attention.flash.hopper_tables import Visits, seen, steps, tile_at, walk, whole_steps
from attncompiler.mechanisms.attention.flash.hopper_tensors import LOG2E, describe, mappable, scales_of

_LOG2E: gl.constexpr = gl.constexpr(LOG2E)
_LN2: gl.constexpr = gl.constexpr(math.log(2.0))
# of tanh(x ln(2) / 2)
_SERIES_1: gl.constexpr = gl.constexpr(math.log(2.0) / 2)
_SERIES_3: gl.constexpr = gl.constexpr(-((math.log(2.0) / 2) ** 3) / 3)
_SERIES_5: gl.constexpr = gl.constexpr((math.log(2.0) / 2) ** 5 * 2 / 15)
_UNSEEN: gl.constexpr = gl.constexpr(-math.inf)


@dataclass(frozen=True, eq=False)
class Plan:
    """What the kernel is compiled for: one compilation a plan and a dtype. `_plan` makes each but once: it is looked up
    at every launch, and so known by itself."""

    width: int
    causal: bool = False
    window: bool = False
    globals: bool = False
    softcap: bool = False
    sinks: bool = False
    tabled: bool = False
    listed: bool = False
    classes: bool = False
    half: bool = False
    block: int = 128
    consumers: int = 2
    stages: int = 2
    registers: int = 240
    producer_registers: int = 24

    def __post_init__(self):
        # Constants of the kernel: what it computes from them is constant too.
        for field in fields(self):
            object.__setattr__(self, field.name, gl.constexpr(getattr(self, field.name)))

    @property
    def rows(self):
        return 64 * self.consumers

    @property
    def overlap(self):
        """Whether a consumer's O += P V runs under its own exponentials; three of them hide each other's as well."""
        return self.consumers == 2


# --- which tiles, in which order ---------------------------------------------------------------------------------


@gluon.jit
def _decode(tile, sizes, tables, P: gl.constexpr):
    """Heads section by section, for the L2 cache; within a section the last rows, the longest, first. Listed rows that
    are far longer than others come before all sections."""
    T, S, H, group, row_blocks, heads, section, tiles, window, global_tokens, heavy = sizes
    later = tile - heavy * heads
    light = row_blocks - heavy
    first = later // (section * light) * section
    rest = later % (section * light)
    width = gl.minimum(section, heads - first)
    head = first + rest % width
    if P.listed:
        rank = heavy + rest // width
        if later < 0:
            head = tile % heads
            rank = tile // heads
        row_block = gl.load(tables.order + rank, mask=tile < tiles, other=-1)
    else:
        row_block = gl.where(tile < tiles, row_blocks - 1 - rest // width, -1)
    return row_block, head // H, head % H


@gluon.jit
def _walk(row_block, batch, sizes, tables, P: gl.constexpr):
    """The key tiles of a block of rows, as numbers for `_steps`, `_tile_at` and `_own`.

    By rule: hi, lo, front, for tiles hi - 1 .. lo and then the global ones, front - 1 .. 0.
    """
    T, S, H, group, row_blocks, heads, section, tiles, window, global_tokens, heavy = sizes
    if P.tabled:
        return walk(tables, batch, row_block, row_block >= 0, row_blocks)
    else:
        last = (S + P.block - 1) // P.block
        hi = last
        lo = 0
        front = 0
        if P.causal:
            first = row_block * P.rows + S - T
            hi = gl.minimum(last, gl.maximum(first + P.rows + P.block - 1, 0) // P.block)
            if P.window:
                lo = gl.maximum(first - window + 1, 0) // P.block
                if P.globals:
                    front = gl.minimum(lo, (global_tokens + P.block - 1) // P.block)
            # Rows without a visible key visit one tile past the end, which every mask rejects.
            if hi <= lo:
                hi = last + 1
                lo = last
        return hi, lo, front


@gluon.jit
def _steps(where, tables, P: gl.constexpr):
    if P.tabled:
        count = gl.maximum(steps(tables, where), 1)
    else:
        count = where[0] - where[1] + where[2]
    return count


@gluon.jit
def _tile_at(i, where, sizes, tables, P: gl.constexpr):
    if P.tabled:
        j = tile_at(tables, i, where, (sizes[1] + P.block - 1) // P.block)
    else:
        j = where[0] - 1 - i
        if P.globals:
            j = gl.where(j < where[1], where[2] - 1 - (i - (where[0] - where[1])), j)
    return j


@gluon.jit
def _own(start, where, sizes, tables, P: gl.constexpr):
    """Of these tiles, for the 64 rows from start: how many to skip, the first that needs no mask, and the first after
    it that does."""
    T, S, H, group, row_blocks, heads, section, tiles, window, global_tokens, heavy = sizes
    skip = 0
    if P.tabled:
        unmasked, masked = whole_steps(tables, where)
        unmasked = gl.where(steps(tables, where) == 0, 1, unmasked)
    elif P.causal:
        a, b, c = where
        first = start + S - T
        hi = gl.minimum(a, gl.maximum(b, gl.maximum(first + 64 + P.block - 1, 0) // P.block))
        skip = gl.minimum(a - hi, a - b + c - 1)
        full_hi = gl.minimum(hi, gl.maximum(b, gl.maximum(first + 1, 0) // P.block))
        full_lo = b
        if P.window:
            full_lo = (gl.maximum(first + 64 - window, 0) + P.block - 1) // P.block
            full_lo = gl.minimum(full_hi, gl.maximum(b, full_lo))
        unmasked = a - full_hi
        masked = a - full_lo
    else:
        unmasked = where[0] - S // P.block
        masked = where[0]
    return skip, unmasked, masked


# --- the producer ------------------------------------------------------------------------------------------------


@gluon.jit
def _publish(row_block, batch, head, where, turn, slot, s_full, s_empty, P: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    mbarrier.wait(s_empty, (turn & 1) ^ 1)
    slot.index(0).store(gl.full([1], row_block, gl.int32, layout))
    slot.index(1).store(gl.full([1], batch, gl.int32, layout))
    slot.index(2).store(gl.full([1], head, gl.int32, layout))
    if P.tabled:
        for word in gl.static_range(len(where)):
            slot.index(3 + word).store(gl.full([1], where[word], gl.int32, layout))
    mbarrier.arrive(s_full, count=1)


@gluon.jit
def _fetch(desc, batch, row, head, full, smem, stage, P: gl.constexpr, pred=True):
    mbarrier.expect(full.index(stage), P.block * P.width * 2, pred=pred)
    tma.async_copy_global_to_shared(desc, [batch, row, head, 0], full.index(stage), smem.index(stage), pred=pred)


@gluon.jit
def _producer(q_desc, k_desc, v_desc, counter, memory, barriers, sizes, tables, P: gl.constexpr):
    q_smem, k_smem, v_smem, o_smem, slot = memory
    q_full, q_empty, k_full, v_full, released, s_full, s_empty = barriers
    T, S, H, group, row_blocks, heads, section, tiles, window, global_tokens, heavy = sizes
    CONSUMERS: gl.constexpr = P.consumers
    programs = gl.num_programs(0)
    row_block, batch, head = _decode(gl.program_id(0), sizes, tables, P)
    where = _walk(row_block, batch, sizes, tables, P)
    _publish(row_block, batch, head, where, 0, slot, s_full, s_empty, P)
    turn = 0
    count = 0
    v_batch = 0
    v_head = 0
    v_row = 0
    while row_block >= 0:
        tile = gl.atomic_add(counter, 1, sem="relaxed") + programs
        buffer = turn & 1
        mbarrier.wait(q_empty.index(buffer), ((turn >> 1) & 1) ^ 1)
        mbarrier.expect(q_full.index(buffer), P.rows * P.width * 2)
        for which in gl.static_range(CONSUMERS):
            tma.async_copy_global_to_shared(
                q_desc,
                [batch, row_block * P.rows + which * 64, head, 0],
                q_full.index(buffer),
                q_smem.index(buffer * P.consumers + which),
            )
        kv_head = head // group
        visits = _steps(where, tables, P)
        i = 0
        while i < visits:
            row = _tile_at(i, where, sizes, tables, P) * P.block
            stage = count % P.stages
            mbarrier.wait(released.index(stage), ((count // P.stages) & 1) ^ 1)
            _fetch(k_desc, batch, row, kv_head, k_full, k_smem, stage, P)
            # The values follow one step behind the keys, as the consumers use them.
            _fetch(v_desc, v_batch, v_row, v_head, v_full, v_smem, (count + P.stages - 1) % P.stages, P, count > 0)
            v_batch = batch
            v_head = kv_head
            v_row = row
            count += 1
            i += 1
        row_block, batch, head = _decode(tile, sizes, tables, P)
        where = _walk(row_block, batch, sizes, tables, P)
        turn += 1
        _publish(row_block, batch, head, where, turn, slot, s_full, s_empty, P)
    stage = count % P.stages
    mbarrier.wait(released.index(stage), ((count // P.stages) & 1) ^ 1)
    _fetch(v_desc, v_batch, v_row, v_head, v_full, v_smem, (count + P.stages - 1) % P.stages, P)


# --- the consumers -----------------------------------------------------------------------------------------------


@gluon.jit
def _word(slot, i):
    return gl.max(slot.index(i).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def _words(slot, P: gl.constexpr):
    """What `walk` found."""
    if P.listed:
        return _word(slot, 3), _word(slot, 4), _word(slot, 5), _word(slot, 6)
    else:
        return _word(slot, 3), _word(slot, 4), _word(slot, 5), _word(slot, 6), _word(slot, 7), _word(slot, 8)


@gluon.jit
def _take(turn, slot, s_full, s_empty, sizes, tables, P: gl.constexpr):
    mbarrier.wait(s_full, turn & 1)
    row_block = _word(slot, 0)
    batch = _word(slot, 1)
    head = _word(slot, 2)
    if P.tabled:
        where = _words(slot, P)
    else:
        where = _walk(row_block, batch, sizes, tables, P)
    mbarrier.arrive(s_empty, count=1)
    return row_block, batch, head, where


@gluon.jit
def _await(full, count, P: gl.constexpr, pred=True):
    mbarrier.wait(full.index(count % P.stages), (count // P.stages) & 1, pred=pred)


@gluon.jit
def _scores(q, k_smem, count, N: gl.constexpr, P: gl.constexpr):
    """Issue S = Q K for the first N keys of a stage."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    k = k_smem.index(count % P.stages).reshape([P.block, P.width]).slice(0, N, dim=0)
    zero = gl.zeros([64, N], gl.float32, layout)
    return warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _weigh(o, p, v_smem, count, P: gl.constexpr):
    """Issue O += P V."""
    v = v_smem.index(count % P.stages).reshape([P.block, P.width])
    return warpgroup_mma(p, v, o, is_async=True)


@gluon.jit
def _scaled(o, factor):
    return o * gl.convert_layout(factor, gl.SliceLayout(1, o.type.layout))[:, None]


@gluon.jit
def _turn(which, op: gl.constexpr):
    """The products of the consumers take turns: each waits for its own ("sync") and passes it on ("arrive").

    Named barriers of two warpgroups, numbered above those that the compiler uses. Each consumer calls once a step.
    """
    gl.inline_asm_elementwise(
        "bar." + op + " $1, 256; mov.b32 $0, $1;", "=r,r", [which + 8], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _reciprocal(x):
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def capped(s, cap_scale):
    """tanh of a softcap's argument: cap_scale is 2 log2(e) scale / cap, and of the score the cap remains to be
    multiplied.

    tanh(x) = 1 - 2 / (1 + exp(2 x)), and near 0, where that leaves nothing of a score far below its cap, by its series.
    """
    x = s * cap_scale
    far = 1.0 - 2.0 * _reciprocal(1.0 + gl.exp2(x))
    y = x * x
    near = x * (_SERIES_1 + y * (_SERIES_3 + y * _SERIES_5))
    return gl.where(gl.abs(x) < 0.18, near, far)


@gluon.jit
def _capped(s, cap_scale, P: gl.constexpr):
    if P.softcap:
        s = capped(s, cap_scale)
    return s


@gluon.jit
def _limits(start, batch, sizes, tables, P: gl.constexpr):
    """What `_masked` needs of the 64 rows from start."""
    if P.tabled:
        layout: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, P.block, 16]))
        padded = sizes[4] * P.rows
        FIELDS: gl.constexpr = 4 if P.globals or P.classes else 2
        at = tables.rows + start + gl.arange(0, 64, layout=layout)
        if not P.listed:
            at += batch.to(gl.int64) * FIELDS * padded
        low = gl.load(at)
        span = gl.load(at + padded)
        if FIELDS == 4:
            return low, span, gl.load(at + 2 * padded), gl.load(at + 3 * padded)
        else:
            return low, span, low, span
    else:
        return (start,)


@gluon.jit
def _masked(s, limits, j, sizes, tables, P: gl.constexpr):
    """Columns are counted from the tile's first one, which makes them constants of the code."""
    T, S, H, group, row_blocks, heads, section, tiles, window, global_tokens, heavy = sizes
    layout: gl.constexpr = s.type.layout
    N: gl.constexpr = s.shape[1]
    columns = gl.arange(0, N, layout=gl.SliceLayout(0, layout))
    cols = columns[None, :]
    left = j * P.block
    if P.tabled:
        of_row: gl.constexpr = gl.SliceLayout(1, layout)
        low = gl.convert_layout(limits[0], of_row, assert_trivial=True)[:, None]
        span = gl.convert_layout(limits[1], of_row, assert_trivial=True)[:, None]
        third = gl.convert_layout(limits[2], of_row, assert_trivial=True)[:, None]
        fourth = gl.convert_layout(limits[3], of_row, assert_trivial=True)[:, None]
        classes = cols
        if P.classes:
            classes = gl.load(tables.classes + left + columns, mask=columns < S - left, other=0)[None, :]
        found = seen(cols, left, low, span, third, fourth, classes, P.globals, P.classes)
    elif P.causal:
        rows = (limits[0] + S - T - left + gl.arange(0, 64, layout=gl.SliceLayout(1, layout)))[:, None]
        found = cols <= rows
        if P.window:
            near = cols > rows - window
            if P.globals:
                near = near | (cols < global_tokens - left)
            found = found & near
    else:
        found = cols < S - left
    return gl.where(found, s, _UNSEEN)


@gluon.jit
def _exponentials(s, scale, m):
    """exp2(scale (s - m)): the even columns, the odd ones, and the sum of each row."""
    pivot = gl.where(m == _UNSEEN, 0.0, m * scale)
    even, odd = gl.exp2(s * scale - pivot[:, None]).reshape([s.shape[0], s.shape[1] // 2, 2]).split()
    return even, odd, gl.convert_layout(gl.sum(even + odd, 1), m.type.layout)


@gluon.jit
def _packed(even, odd, dtype: gl.constexpr):
    """Neighbouring columns as one word, which a loop carries in one register; two halves would take two."""
    name: gl.constexpr = "bf16x2" if dtype == gl.bfloat16 else "f16x2"
    return gl.inline_asm_elementwise(
        "cvt.rn." + name + ".f32 $0, $2, $1;", "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _operand(p, o, dtype: gl.constexpr):
    """The packed P as the left operand of O += P V; no register moves."""
    even = p.to(gl.int16).to(dtype, bitcast=True)
    odd = (p >> 16).to(gl.int16).to(dtype, bitcast=True)
    both = gl.join(even, odd).reshape([p.shape[0], p.shape[1] * 2])
    return gl.convert_layout(both, gl.DotOperandLayout(0, o.type.layout, 2))


@gluon.jit
def _step(
    q,
    memory,
    barriers,
    o,
    p,
    m,
    l,
    alpha,
    count,
    last,
    mask,
    j,
    limits,
    scale,
    cap_scale,
    sizes,
    tables,
    WHICH: gl.constexpr,
    P: gl.constexpr,
):
    """S = Q K_count and O += P V_(count - 1); returns the O, still to be scaled by alpha, and the P of this S."""
    q_smem, k_smem, v_smem, o_smem, slot = memory
    q_full, q_empty, k_full, v_full, released, s_full, s_empty = barriers
    operand = _operand(p, o, v_smem.dtype)
    if not P.overlap:
        _await(k_full, count, P)
    _turn(WHICH, "sync")
    s = _scores(q, k_smem, count, P.block, P)
    o = _scaled(o, alpha)
    _await(v_full, count - 1, P)
    o = _weigh(o, operand, v_smem, count - 1, P)
    _turn((WHICH + 1) % P.consumers, "arrive")
    # P is named with O so that its registers are not written before the product has read them.
    if P.overlap:
        s = warpgroup_mma_wait(1, deps=[s])
    else:
        s, o, p = warpgroup_mma_wait(0, deps=[s, o, p])
        mbarrier.arrive(released.index(count % P.stages), count=1)
    s = _capped(s, cap_scale, P)
    if mask:
        s = _masked(s, limits, j, sizes, tables, P)
    m_new = gl.maximum(m, gl.max(s, 1))
    even, odd, total = _exponentials(s, scale, m_new)
    alpha = gl.exp2(m * scale - gl.where(m_new == _UNSEEN, 0.0, m_new * scale))
    l = l * alpha + total
    # The wait for the next keys is a branch, over which the assembler moves no instruction. Without it the
    # exponentials would sink below the wait for O += P V, and the tensor cores would idle meanwhile.
    if P.overlap:
        _await(k_full, count + 1, P, pred=not last)
        o, p = warpgroup_mma_wait(0, deps=[o, p])
        mbarrier.arrive(released.index(count % P.stages), count=1)
    return o, _packed(even, odd, v_smem.dtype), m_new, l, alpha


@gluon.jit
def _consumer(
    o_desc, lse_ptr, sinks_ptr, memory, barriers, sizes, tables, scale, cap_scale, WHICH: gl.constexpr, P: gl.constexpr
):
    q_smem, k_smem, v_smem, o_smem, slot = memory
    q_full, q_empty, k_full, v_full, released, s_full, s_empty = barriers
    T, S, H, group, row_blocks, heads, section, tiles, window, global_tokens, heavy = sizes
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, P.block, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, P.width, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    # The upper rows see half of a tile on the diagonal, which is then their first one.
    HALF: gl.constexpr = P.half and WHICH == 0
    FIRST: gl.constexpr = P.block // 2 if HALF else P.block
    if P.consumers - 1 == WHICH:
        _turn(0, "arrive")
    turn = 0
    count = 0
    row_block, batch, head, where = _take(turn, slot, s_full, s_empty, sizes, tables, P)
    start = row_block * P.rows + WHICH * 64
    skip, unmasked, masked = _own(start, where, sizes, tables, P)
    q = q_smem.index(WHICH).reshape([64, P.width])
    mbarrier.wait(q_full.index(0), 0)
    _await(k_full, count + skip, P)
    s_first = _scores(q, k_smem, count + skip, FIRST, P)
    while row_block >= 0:
        limits = _limits(start, batch, sizes, tables, P)
        visits = _steps(where, tables, P)
        q = q_smem.index((turn & 1) * P.consumers + WHICH).reshape([64, P.width])
        s = _capped(warpgroup_mma_wait(0, deps=[s_first]), cap_scale, P)
        mbarrier.arrive(released.index(count % P.stages), count=1)
        if P.causal:
            # A tile that only the other consumers' rows see: given back unread, and its turn passed on.
            if skip > 0:
                count += 1
                mbarrier.arrive(released.index(count % P.stages), count=1)
                _turn(WHICH, "sync")
                _turn((WHICH + 1) % P.consumers, "arrive")
        if (skip < unmasked) | (skip >= masked):
            s = _masked(s, limits, _tile_at(skip, where, sizes, tables, P), sizes, tables, P)
        m = gl.max(s, 1)
        even, odd, l = _exponentials(s, scale, m)
        p = _packed(even, odd, v_smem.dtype)
        if HALF:
            p = gl.join(p, gl.zeros_like(p)).permute((0, 2, 1)).reshape([64, P.block // 2])
            m = gl.convert_layout(m, row_layout)
            l = gl.convert_layout(l, row_layout)
            even, odd = gl.zeros([64, P.block], gl.float32, s_layout).reshape([64, P.block // 2, 2]).split()
            p = gl.convert_layout(p, even.type.layout)
        o = gl.zeros([64, P.width], gl.float32, o_layout)
        alpha = gl.full([64], 1.0, gl.float32, row_layout)
        count += 1
        i = skip + 1
        if P.overlap:
            _await(k_full, count, P, pred=i < visits)
        # One loop with a branch for the mask, not a masked loop and a plain one: where the first of two was skipped,
        # ptxas 12.8 left the second's descriptor of Q unset, and the scores came out wrong.
        while i < visits:
            mask = (i < unmasked) | (i >= masked)
            j = 0
            if mask:
                j = _tile_at(i, where, sizes, tables, P)
            o, p, m, l, alpha = _step(
                q,
                memory,
                barriers,
                o,
                p,
                m,
                l,
                alpha,
                count,
                i + 1 == visits,
                mask,
                j,
                limits,
                scale,
                cap_scale,
                sizes,
                tables,
                WHICH,
                P,
            )
            count += 1
            i += 1

        operand = _operand(p, o, v_smem.dtype)
        o = _scaled(o, alpha)
        _await(v_full, count - 1, P)
        _turn(WHICH, "sync")
        o = _weigh(o, operand, v_smem, count - 1, P)
        _turn((WHICH + 1) % P.consumers, "arrive")
        start_now, batch_now, head_now = start, batch, head
        row_block, batch, head, where = _take(turn + 1, slot, s_full, s_empty, sizes, tables, P)
        start = row_block * P.rows + WHICH * 64
        skip, unmasked, masked = _own(start, where, sizes, tables, P)
        # After the last tile there is none to begin: the product is issued all the same, over what the rings hold,
        # and never read. A branch around it would make the assembler wait for each product in flight.
        more = row_block >= 0
        buffer = (turn + 1) & 1
        mbarrier.wait(q_full.index(buffer), ((turn + 1) >> 1) & 1, pred=more)
        _await(k_full, count + skip, P, pred=more)
        q = q_smem.index(buffer * P.consumers + WHICH).reshape([64, P.width])
        s_first = _scores(q, k_smem, count + skip, FIRST, P)
        o, p = warpgroup_mma_wait(1, deps=[o, p])
        mbarrier.arrive(q_empty.index(turn & 1), count=1)

        empty = l == 0.0
        top = m * scale
        if P.sinks:
            sink = gl.load(sinks_ptr + head_now) * _LOG2E
            joint = gl.maximum(top, sink)
            weight = gl.exp2(top - joint)
            l = l * weight + gl.exp2(sink - joint)
            top = joint
            factor = weight / l
        else:
            factor = 1.0 / l
        o = _scaled(o, gl.where(empty, 0.0, factor))
        out = o_smem.index(WHICH)
        tma.store_wait(0)
        out.reshape([64, P.width]).store(o.to(v_smem.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(o_desc, [batch_now, start_now, head_now, 0], out)
        # After the fence, which would wait for this store.
        lse = gl.where(empty, _UNSEEN, (top + gl.log2(l)) * _LN2)
        t = start_now + gl.arange(0, 64, layout=row_layout)
        gl.store(lse_ptr + (batch_now * H + head_now).to(gl.int64) * T + t, lse, mask=t < T)
        turn += 1
    warpgroup_mma_wait(0, deps=[s_first])
    if WHICH == 0:
        _turn(0, "sync")
    tma.store_wait(0)


# --- the kernel and its launch -----------------------------------------------------------------------------------


@Launcher
@gluon.jit(
    do_not_specialize=[
        "T",
        "S",
        "H",
        "group",
        "row_blocks",
        "heads",
        "section",
        "tiles",
        "window",
        "global_tokens",
        "heavy",
        "scale",
        "cap_scale",
    ]
)
def _attention(
    q_desc,
    k_desc,
    v_desc,
    o_desc,
    lse_ptr,
    sinks_ptr,
    counter,
    tables,
    T,
    S,
    H,
    group,
    row_blocks,
    heads,
    section,
    tiles,
    window,
    global_tokens,
    heavy,
    scale,
    cap_scale,
    P: gl.constexpr,
):
    dtype: gl.constexpr = q_desc.dtype
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    word: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    STAGES: gl.constexpr = P.stages
    q_smem = gl.allocate_shared_memory(dtype, [2 * P.consumers, 1, 64, 1, P.width], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, P.block, 1, P.width], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, P.block, 1, P.width], v_desc.layout)
    o_smem = gl.allocate_shared_memory(dtype, [P.consumers, 1, 64, 1, P.width], o_desc.layout)
    slot = gl.allocate_shared_memory(gl.int32, [9, 1], word)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    released = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    s_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    s_empty = gl.allocate_shared_memory(gl.int64, [1], bar)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=P.consumers)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(released.index(i), count=P.consumers)
    mbarrier.init(s_full, count=1)
    mbarrier.init(s_empty, count=P.consumers)
    fence_async_shared()
    memory = (q_smem, k_smem, v_smem, o_smem, slot)
    barriers = (q_full, q_empty, k_full, v_full, released, s_full, s_empty)
    sizes = (T, S, H, group, row_blocks, heads, section, tiles, window, global_tokens, heavy)
    if P.consumers == 2:
        gl.warp_specialize(
            [
                (_consumer, (o_desc, lse_ptr, sinks_ptr, memory, barriers, sizes, tables, scale, cap_scale, 0, P)),
                (_consumer, (o_desc, lse_ptr, sinks_ptr, memory, barriers, sizes, tables, scale, cap_scale, 1, P)),
                (_producer, (q_desc, k_desc, v_desc, counter, memory, barriers, sizes, tables, P)),
            ],
            [4, 1],
            [P.registers, P.producer_registers],
        )
    else:
        gl.static_assert(P.consumers == 3)
        gl.warp_specialize(
            [
                (_consumer, (o_desc, lse_ptr, sinks_ptr, memory, barriers, sizes, tables, scale, cap_scale, 0, P)),
                (_consumer, (o_desc, lse_ptr, sinks_ptr, memory, barriers, sizes, tables, scale, cap_scale, 1, P)),
                (_consumer, (o_desc, lse_ptr, sinks_ptr, memory, barriers, sizes, tables, scale, cap_scale, 2, P)),
                (_producer, (q_desc, k_desc, v_desc, counter, memory, barriers, sizes, tables, P)),
            ],
            [4, 4, 1],
            [P.registers, P.registers, P.producer_registers],
        )


@functools.cache
def _plan(width: int, **options: bool) -> Plan:
    if width == 64 and not options["tabled"]:
        return Plan(width, consumers=3, stages=3, registers=160, producer_registers=32, **options)
    # The tables speak of 128 rows, so of two consumers.
    return Plan(width, consumers=2, stages=2 if width == 128 else 4, registers=240, producer_registers=24, **options)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    window: int | None = None,
    global_tokens: int = 0,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    visits: Visits | None = None,
    multiprocessors: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and the logarithm of each row's denominator, of bfloat16 or float16 and a D of 64 or 128.

    window and global_tokens need causal: row i then sees key j if j <= i and (i - j < window or j < global_tokens).
    softcap makes a score softcap tanh(scale q k / softcap). sinks (H,), float32, are logits that join the
    denominators of rows that see a key. With visits, the tables alone say what is seen; causal then says that rows
    of segments see nothing that is later, T being S.
    """
    B, T, H, D = q.shape
    S, K = k.shape[1], k.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    if min(q.numel(), k.numel()) == 0:
        return out.zero_(), lse.fill_(-math.inf)
    diagonal = causal and D == 128 and (S - T) % 128 == 0
    tabled = visits is not None
    if visits is None:
        visits = Visits.none()
    else:
        # only ranges begin with the last tile, which in causal order is that on the diagonal
        causal, window, diagonal = False, None, diagonal and visits.ranged
    plan = _plan(
        D,
        causal=causal,
        window=window is not None,
        globals=visits.globals if tabled else window is not None and global_tokens > 0,
        softcap=softcap is not None,
        sinks=sinks is not None,
        tabled=tabled,
        listed=visits.listed,
        classes=visits.classes,
        half=diagonal,
    )
    q, k, v = mappable(q), mappable(k), mappable(v)
    rows, block = int(plan.rows), int(plan.block)
    row_blocks = -(-T // rows)
    tiles = row_blocks * B * H
    group = H // K
    # Heads whose tiles run side by side. Alike tiles of one head share its keys best; tiles of unlike lengths want
    # more heads to fill the gaps with, within what the L2 cache holds.
    section = group
    if (causal and window is None) or tabled:
        section *= max(4, (16 << 20) // (2 * S * D * q.element_size()))
    scale, cap_scale = scales_of(scale, softcap)
    programs = min(tiles, multiprocessors)
    _attention(
        (programs,),
        None if tabled else (known_by(q, k, v, sinks), plan),
        describe(q, 64),
        describe(k, block),
        describe(v, block),
        describe(out, 64),
        lse,
        sinks,
        torch.zeros(1, dtype=torch.int32, device=q.device),
        visits.tables,
        T,
        S,
        H,
        group,
        row_blocks,
        B * H,
        min(section, B * H),
        tiles,
        window or 0,
        global_tokens,
        visits.heavy,
        scale,
        cap_scale,
        plan,
    )
    return out, lse
