"""Flash attention, backward, for Hopper GPUs: warp-specialised, in Triton's Gluon.

A program owns 128 keys of one head. Its producer warp has the copy engine fetch the queries that see them, tile by tile
and with the gradients of their outputs, into a ring in shared memory. Two consumer warpgroups hold 64 of the keys each,
and compute scores transposed, keys by queries: so the weights Pᵀ and the gradients of the scores dSᵀ come out of one
product in the registers from which the next takes them (dV += Pᵀ dO, dK += dSᵀ Q). Only dQ = dS K needs the dS of all
128 keys, which the consumers exchange through shared memory. They compute it a step later, under the product of the
next scores: each for 64 of its columns (D 128) or rows (D 64), and add it to what other programs found by atomic
additions of four numbers at once. Those come in any order, so two runs differ in the last bits.

Or in a fixed one, where that is asked: another warp, the keeper, then waits in its program's stead until the programs
before have added to the sums of a tile of queries, and tells those after when its own has. The consumers hardly wait
where programs reach a tile in the order in which they add. In causal order they do when the last keys, whose first
queries come last, add first, as in FlashAttention-3; their programs must start first too, and the longest end last.

Layout: q, out, dout (B, T, H, D); k, v (B, S, K, D); lse (B, H, T) in float32, natural logarithm, −∞ on rows that see
nothing. Query t stands at position t + S − T.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from attncompiler.blocks.launching.launcher import Launcher, known_by
from attncompiler.mechanisms.attention.flash.hopper_forward import capped
from attncompiler.mechanisms.attention.flash.hopper_tables import Visits, seen, steps, tile_at, walk, whole_steps
from attncompiler.mechanisms.attention.flash.hopper_tensors import (
    LOG2E,
    describe,
    describe_numbers,
    mappable,
    scales_of,
)

meet = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
"""The threads of a warpgroup wait for one another; Triton 3.7 renamed it."""
KEYS = 128
STAGES = 2
LAST_FIRST = tl.constexpr(2)
"""As CAUSAL: in causal order, the programs of the last keys first."""
SECTION = tl.constexpr(264)
"""Programs, about, of the heads that are worked on side by side, twice as many as a device runs at once. In causal
order those are the last heads alone, so that their longest programs, of the first keys, do not run on when all others
are done; before, one head at a time keeps what it reads and adds in the L2 cache."""
FRAGMENT = tl.constexpr(64 * 64)
"""Numbers of dQ that a warpgroup adds at once, in the order in which its threads hold them."""
ADD_FOUR = tl.constexpr("red.relaxed.gpu.global.add.v4.f32 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0;")
READ_TURN = tl.constexpr("ld.acquire.gpu.global.b32 $0, [$1];")
PASS_TURN = tl.constexpr("st.release.gpu.global.b32 [$1], $2; mov.b32 $0, 0;")


@Launcher
@triton.jit
def _prepare(
    out, dout, lse, stats, sums, turns, T, T_padded, out_b, out_t, out_h, dout_b, dout_t, dout_h, lse_b, lse_h, H,
    D: tl.constexpr, BM: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    """For each tile of queries the lse in base 2, +∞ where a row sees nothing, then the sums of dout · out; and zeros
    for the sums of dQ and, where an order is kept, for the programs' numbers and for whose turn it is to add.

    That and `_finish` move 14 bytes for each of dQ's numbers, at the speed of a copy.
    """
    both, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = both // H, both % H
    rows, columns = tile * BM + tl.arange(0, BM), tl.arange(0, D)
    there = rows < T
    at = out + b * out_b + rows.to(tl.int64)[:, None] * out_t + h * out_h + columns[None, :]
    o = tl.load(at, mask=there[:, None], other=0.0).to(tl.float32)
    at = dout + b * dout_b + rows.to(tl.int64)[:, None] * dout_t + h * dout_h + columns[None, :]
    g = tl.load(at, mask=there[:, None], other=0.0).to(tl.float32)
    logarithm = tl.load(lse + b * lse_b + h * lse_h + rows, mask=there, other=float("-inf"))
    logarithm = tl.where(logarithm == float("-inf"), float("inf"), logarithm * LOG2E)
    number = both * (T_padded // BM) + tile
    at = stats + number * (2 * BM) + tl.arange(0, BM)
    tl.store(at, logarithm)
    tl.store(at + BM, tl.sum(o * g, 1))
    tl.store(sums + number * (BM * D) + tl.arange(0, BM * D), tl.zeros([BM * D], tl.float32))
    if turns is not None:
        tl.store(turns + 1 + number, 0)
        if number == 0:
            tl.store(turns, 0)


@Launcher
@triton.jit
def _finish(sums, dq, T, T_padded, dq_b, dq_t, dq_h, H, scale, D: tl.constexpr, BM: tl.constexpr):
    """The sums of dQ in their own order, scaled and rounded: one fragment of a tile of queries."""
    both, tile, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    fragment = tl.load(sums + (both * T_padded + tile * BM) * D + part * FRAGMENT + tl.arange(0, FRAGMENT)) * scale
    x = tl.reshape(fragment, [8, 4, 8, 4, 2, 2])  # column octet, warp, row, lane in quad, row half, column of a pair
    x = tl.reshape(tl.permute(x, [1, 4, 2, 0, 3, 5]), [64, 64])
    row = tile * BM
    column = 0
    if D == 128:
        column = part * 64
    else:
        row += part * 64
    rows = row + tl.arange(0, 64)
    at = dq + both // H * dq_b + rows.to(tl.int64)[:, None] * dq_t + both % H * dq_h
    at += column + tl.arange(0, 64)[None, :]
    tl.store(at, x.to(dq.dtype.element_ty), mask=(rows < T)[:, None])


# --- which queries ---------------------------------------------------------------------------------------------------


@gluon.jit
def _place(sizes, tables, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, GLOBALS: gl.constexpr, BM: gl.constexpr):
    """The program's sequence, its head of keys, its first key; and the tiles of queries that see it, for the functions
    below: by index the first and the last one."""
    T, S, H, K, tiles, window, tokens, heavy, heads, program = sizes
    GLOBALS_FIRST: gl.constexpr = WINDOW and GLOBALS and CAUSAL != LAST_FIRST
    if tables.order is not None or GLOBALS_FIRST:
        # the tiles that most queries see come first, of all heads; the others head by head, for the L2 cache
        later = program - heavy * heads
        light = gl.maximum(tiles - heavy, 1)
        both = gl.where(later < 0, program % heads, later // light)
        number = gl.where(later < 0, program // heads, heavy + later % light)
        if tables.order is not None:
            number = gl.load(tables.order + number)
    else:
        section = (SECTION + tiles - 1) // tiles
        if CAUSAL == LAST_FIRST:
            section = 1
        if CAUSAL:
            head = gl.minimum(program // tiles, gl.maximum(heads - section, 0))
            width = gl.where(head < heads - section, 1, heads - head)
        else:
            head = program // (section * tiles) * section
            width = gl.minimum(section, heads - head)
        rest = program - head * tiles
        number = rest // width
        if CAUSAL == LAST_FIRST:
            number = tiles - 1 - number
        both = head + rest % width
    first = number * 128
    if tables.rows is not None:
        where = walk(tables, both // K, number, True, tiles)
    else:
        before = S - T
        low = 0
        high = (T + BM - 1) // BM
        if CAUSAL:
            low = gl.minimum(gl.maximum(first - before, 0) // BM, high)
        if WINDOW:
            near = gl.minimum((gl.maximum(first + 127 + window - before, 0) + BM - 1) // BM, high)
            if GLOBALS:
                near = gl.where(first < tokens, high, near)
            high = gl.maximum(near, low)
        where = (low, high)
    return both // K, both % K, first, where


@gluon.jit
def _count(where, tables):
    """How many tiles of queries see the program's keys."""
    if tables.rows is not None:
        count = steps(tables, where)
    else:
        count = where[1] - where[0]
    return count


@gluon.jit
def _tile(i, where, tables):
    """The i-th of them."""
    if tables.rows is not None:
        tile = tile_at(tables, i, where, 0)
    else:
        tile = where[0] + i
    return tile


@gluon.jit
def _hidden(
    s, keys, classes, first, i, tile, where, rows_sm, stage, sizes, tables,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, GLOBALS: gl.constexpr, BM: gl.constexpr,
):  # fmt: skip
    """Scores of 64 keys and the queries of the i-th tile, −∞ where a query does not see a key."""
    T, S, H, K, tiles, window, tokens, heavy, heads, program = sizes
    if tables.rows is not None:
        unmasked, masked = whole_steps(tables, where)
        if (i < unmasked) | (i >= masked):
            layout: gl.constexpr = gl.SliceLayout(0, s.type.layout)
            CLASSES: gl.constexpr = tables.classes is not None
            FIELDS: gl.constexpr = 4 if GLOBALS or CLASSES else 2
            fields = rows_sm.index(stage)._reinterpret(gl.int32, [FIELDS, BM], gl.SwizzledSharedLayout(1, 1, 1, [0]))
            low = fields.index(0).load(layout)[None, :]
            span = fields.index(1).load(layout)[None, :]
            third = low
            fourth = span
            if FIELDS == 4:
                third = fields.index(2).load(layout)[None, :]
                fourth = fields.index(3).load(layout)[None, :]
            found = seen(keys[:, None], 0, low, span, third, fourth, classes[:, None], GLOBALS, CLASSES)
            s = gl.where(found, s, float("-inf"))
    elif CAUSAL:
        position = tile * BM + S - T
        mixed = position < first + 127
        if WINDOW:
            mixed = mixed | (position + BM - 1 >= first + window)
        if mixed:
            at = (position + gl.arange(0, BM, layout=gl.SliceLayout(0, s.type.layout)))[None, :]
            found = keys[:, None] <= at
            if WINDOW:
                near = at - keys[:, None] < window
                if GLOBALS:
                    near = near | (keys < tokens)[:, None]
                found = found & near
            s = gl.where(found, s, float("-inf"))
    else:
        if first + 128 > S:
            s = gl.where((keys < S)[:, None], s, float("-inf"))
    return s


# --- the producer ----------------------------------------------------------------------------------------------------


@gluon.jit
def _producer(
    descriptors, memory, barriers, sizes, tables,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, GLOBALS: gl.constexpr, BM: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    q_desc, k_desc, v_desc, do_desc, stats_desc, rows_desc = descriptors[:6]
    q_sm, k_sm, v_sm, do_sm, st_sm, rows_sm = memory[:6]
    q_full, q_empty, do_full, do_empty, kv_full, ds_full = barriers
    T, S, H, K, tiles, window, tokens, heavy, heads, program = sizes
    b, kv_head, first, where = _place(sizes, tables, CAUSAL, WINDOW, GLOBALS, BM)
    count = _count(where, tables)
    group = H // K
    query_tiles = (T + BM - 1) // BM
    FIELDS: gl.constexpr = 0 if tables.rows is None else 4 if GLOBALS or tables.classes is not None else 2
    mbarrier.expect(kv_full, 4 * 64 * D * 2)
    for half in gl.static_range(2):
        tma.async_copy_global_to_shared(k_desc, [b, first + half * 64, kv_head, 0], kv_full, k_sm.index(half))
        tma.async_copy_global_to_shared(v_desc, [b, first + half * 64, kv_head, 0], kv_full, v_sm.index(half))
    j = 0
    for member in range(group):
        head = kv_head * group + member
        for i in range(count):
            tile = _tile(i, where, tables)
            stage = j % STAGES
            phase = ((j // STAGES) & 1) ^ 1
            mbarrier.wait(q_empty.index(stage), phase)
            mbarrier.expect(q_full.index(stage), BM * D * 2 + (2 + FIELDS) * BM * 4)
            tma.async_copy_global_to_shared(q_desc, [b, tile * BM, head, 0], q_full.index(stage), q_sm.index(stage))
            number = (b * H + head) * query_tiles + tile
            tma.async_copy_global_to_shared(stats_desc, [number * 2, 0], q_full.index(stage), st_sm.index(stage))
            if FIELDS > 0:
                of_sequence = 0
                if tables.order is None:
                    of_sequence = b * FIELDS
                tma.async_copy_global_to_shared(
                    rows_desc, [of_sequence, tile * BM], q_full.index(stage), rows_sm.index(stage)
                )
            mbarrier.wait(do_empty.index(stage), phase)
            mbarrier.expect(do_full.index(stage), BM * D * 2)
            tma.async_copy_global_to_shared(do_desc, [b, tile * BM, head, 0], do_full.index(stage), do_sm.index(stage))
            j += 1


# --- the order of the sums -------------------------------------------------------------------------------------------


@gluon.jit
def _before(first, i, sizes, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, GLOBALS: gl.constexpr, BM: gl.constexpr):
    """Which 128 keys add to the sums of tile i of the queries right before those at `first`: their number and 1, or 0.

    Without a causal order the 128 before; in causal order the 128 after, or with a window the next after that see the
    tile. Their program has a lower number than this one, and programs are numbered as they start: nobody waits for one
    that the device has no room for.
    """
    T, S, H, K, tiles, window, tokens, heavy, heads, program = sizes
    before = first // 128
    if CAUSAL:
        position = i * BM + S - T
        last = gl.minimum((position + BM - 1) // 128, tiles - 1)
        after = before + 1
        if WINDOW:
            farthest = gl.maximum(position - window + 1, 0) // 128
            if GLOBALS:
                farthest = gl.where(after * 128 < tokens, after, farthest)
            after = gl.maximum(after, farthest)
        before = gl.where(before < last, after + 1, 0)
    return before


@gluon.jit
def _keeper(
    turns, order, sizes, tables, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, GLOBALS: gl.constexpr, BM: gl.constexpr
):
    """Waits for this program's turn at each tile of queries, lets the consumers add to its sums, and passes it on."""
    turn, added = order
    T, S, H, K, tiles, window, tokens, heavy, heads, program = sizes
    b, kv_head, first, where = _place(sizes, tables, CAUSAL, WINDOW, GLOBALS, BM)
    low, high = where
    group = H // K
    query_tiles = (T + BM - 1) // BM
    j = 0
    for member in range(group):
        for i in range(low, high):
            at = turns + 1 + ((b * H + kv_head * group + member) * query_tiles + i)
            at = at.to(gl.int64, bitcast=True)
            before = _before(first, i, sizes, CAUSAL, WINDOW, GLOBALS, BM)
            reached = gl.inline_asm_elementwise(READ_TURN, "=r,l", [at], dtype=gl.int32, is_pure=False, pack=1)
            while reached != before:
                reached = gl.inline_asm_elementwise(READ_TURN, "=r,l", [at], dtype=gl.int32, is_pure=False, pack=1)
            mbarrier.arrive(turn, count=1)
            # acquire and release are cumulative: who sees the turn passed on sees what the consumers have added
            mbarrier.wait(added, j & 1)
            own = first // 128 + 1
            gl.inline_asm_elementwise(PASS_TURN, "=r,l,r", [at, own], dtype=gl.int32, is_pure=False, pack=1)
            j += 1


# --- the consumers ---------------------------------------------------------------------------------------------------


@gluon.jit
def _dq(j, there, k_own, k_other, zero, ds_sm, ds_full, WHICH: gl.constexpr, BM: gl.constexpr):
    """Issue this consumer's part of dQ = dS K of step j, its own 64 keys first; `there` is false where no step was."""
    buffer = j & 1
    ds_own = ds_sm.index(buffer * 2 + WHICH)
    ds_other = ds_sm.index(buffer * 2 + 1 - WHICH)
    if BM == 128:
        ds_own = ds_own.slice(WHICH * 64, 64, dim=1)
        ds_other = ds_other.slice(WHICH * 64, 64, dim=1)
    dq = warpgroup_mma(ds_own.permute([1, 0]), k_own, zero, use_acc=False, is_async=True)
    mbarrier.wait(ds_full.index(buffer * 2 + 1 - WHICH), (j // 2) & 1, pred=there)
    return warpgroup_mma(ds_other.permute([1, 0]), k_other, dq, is_async=True)


@gluon.jit
def _add(dq, sums, number, order, j, ORDERED: gl.constexpr):
    """Add step j's fragment to the sums, each thread the numbers it holds, four by four: in an order of its own, which
    lets the threads of a warp write to neighbouring places."""
    x = dq.reshape([4, 2, 8, 8, 4, 2]).permute([3, 0, 2, 4, 1, 5]).reshape([1024, 2, 2])
    even, odd = gl.split(x)
    x0, x2 = gl.split(even)
    x1, x3 = gl.split(odd)
    at = sums + number.to(gl.int64) * FRAGMENT + gl.arange(0, 1024, layout=x0.type.layout) * 4
    at = at.to(gl.int64, bitcast=True)
    turn, added = order
    if ORDERED:
        mbarrier.wait(turn, j & 1)
    gl.inline_asm_elementwise(ADD_FOUR, "=r,l,f,f,f,f", [at, x0, x1, x2, x3], dtype=gl.int32, is_pure=False, pack=1)
    if ORDERED:
        meet()
        mbarrier.arrive(added, count=1)


@gluon.jit
def _rounded(x):
    """x, of 16 bits, such that the compiler does not know what it was rounded from and lets go of that."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=True, pack=2)


@gluon.jit
def _consumer(
    given, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, GLOBALS: gl.constexpr, SOFTCAP: gl.constexpr,
    ORDERED: gl.constexpr, BM: gl.constexpr, WHICH: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    descriptors, sums, memory, barriers, order, sizes, tables, scales = given
    qk_scale, scale, cap_scale = scales
    dk_desc, dv_desc = descriptors[6:]
    q_sm, k_sm, v_sm, do_sm, st_sm, rows_sm, ds_sm = memory
    q_full, empty, do_full, _, kv_full, ds_full = barriers
    T, S, H, K, tiles, window, tokens, heavy, heads, program = sizes
    dtype: gl.constexpr = q_sm.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    kv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, kv_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(0, s_layout)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])

    b, kv_head, first, where = _place(sizes, tables, CAUSAL, WINDOW, GLOBALS, BM)
    group = H // K
    query_tiles = (T + BM - 1) // BM
    count = _count(where, tables)
    visits = count * group
    keys = first + WHICH * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, s_layout))
    classes = keys
    if tables.classes is not None:
        classes = gl.load(tables.classes + keys)
    dk = gl.zeros([64, D], gl.float32, kv_layout)
    dv = gl.zeros([64, D], gl.float32, kv_layout)
    zero_s = gl.zeros([64, BM], gl.float32, s_layout)
    zero_q = gl.zeros([64, 64], gl.float32, dq_layout)
    k_own = k_sm.index(WHICH).reshape([64, D])
    v_own = v_sm.index(WHICH).reshape([64, D])
    k_other = k_sm.index(1 - WHICH).reshape([64, D])
    if D == 128:
        k_for_own = k_own.slice(WHICH * 64, 64, dim=1)
        k_for_other = k_other.slice(WHICH * 64, 64, dim=1)
    else:
        k_for_own = k_own
        k_for_other = k_other

    mbarrier.wait(kv_full, 0)
    if visits > 0:
        i = 0
        tile = _tile(0, where, tables)
        head = kv_head * group
        number = ((b * H + head) * query_tiles + tile) * 2 + WHICH
        if D == 64:
            dk = warpgroup_mma_init(dk)
        for j in range(visits):
            stage = j % STAGES
            phase = (j // STAGES) & 1
            do = do_sm.index(stage).reshape([BM, D])
            q = q_sm.index(stage).reshape([BM, D])
            mbarrier.wait(q_full.index(stage), phase)
            s = warpgroup_mma(k_own, q.permute([1, 0]), zero_s, use_acc=False, is_async=True)
            # dQ of the step before; the first step's is of what memory held, and goes nowhere
            dq = _dq(j - 1, j > 0, k_for_own, k_for_other, zero_q, ds_sm, ds_full, WHICH, BM)
            stat = st_sm.index(stage)._reinterpret(gl.float32, [2, BM], plain)
            if D == 64:
                s, dk = warpgroup_mma_wait(2, deps=[s, dk])
                mbarrier.arrive(empty.index((j + STAGES - 1) % STAGES), count=1, pred=j > 0)
            else:
                s = warpgroup_mma_wait(2, deps=[s])
            if SOFTCAP:
                # dQ here already: its registers are needed
                dq = warpgroup_mma_wait(0, deps=[dq])
                if j > 0:
                    _add(dq, sums, number, order, j - 1, ORDERED)
                s = capped(s, cap_scale)
                slope = 1.0 - s * s
            s = _hidden(
                s, keys, classes, first, i, tile, where, rows_sm, stage, sizes, tables, CAUSAL, WINDOW, GLOBALS, BM
            )
            lse = stat.index(0).load(row_layout)
            p = gl.exp2(s * qk_scale - lse[None, :])
            p_rounded = p.to(dtype)
            if SOFTCAP:
                p = p * slope
            elif D == 64:
                # a rounding more, and half the registers until dP is there
                p_rounded = _rounded(p_rounded)
            p_operand = gl.convert_layout(p_rounded, operand, assert_trivial=True)
            if not SOFTCAP:
                dq = warpgroup_mma_wait(0, deps=[dq])
                if j > 0:
                    _add(dq, sums, number, order, j - 1, ORDERED)
            number = ((b * H + head) * query_tiles + tile) * 2 + WHICH
            mbarrier.wait(do_full.index(stage), phase)
            dp = warpgroup_mma(v_own, do.permute([1, 0]), zero_s, use_acc=False, is_async=True)
            dv = warpgroup_mma(p_operand, do, dv, is_async=True)
            dp = warpgroup_mma_wait(1, deps=[dp])
            delta = stat.index(1).load(row_layout)
            if D == 64 and not SOFTCAP:
                p = p_rounded.to(gl.float32)
            ds = (p * (dp - delta[None, :])).to(dtype)
            ds_own = ds_sm.index((j % 2) * 2 + WHICH)
            if D == 64:
                # dK runs on into the next step, from shared memory: it needs no registers meanwhile
                ds_own.store(ds)
                fence_async_shared()
                mbarrier.arrive(ds_full.index((j % 2) * 2 + WHICH), count=1)
                dk = warpgroup_mma(ds_own, q, dk, is_async=True)
                dv, p_operand = warpgroup_mma_wait(1, deps=[dv, p_operand])
            else:
                ds_operand = gl.convert_layout(ds, operand, assert_trivial=True)
                dk = warpgroup_mma(ds_operand, q, dk, is_async=True)
                ds_own.store(ds)
                fence_async_shared()
                mbarrier.arrive(ds_full.index((j % 2) * 2 + WHICH), count=1)
                dk, dv, p_operand, ds_operand = warpgroup_mma_wait(0, deps=[dk, dv, p_operand, ds_operand])
                mbarrier.arrive(empty.index(stage), count=1)
            i += 1
            if i == count:
                i = 0
                head += 1
            tile = _tile(i, where, tables)
        dq = _dq(visits - 1, True, k_for_own, k_for_other, zero_q, ds_sm, ds_full, WHICH, BM)
        if D == 64:
            dk, dq = warpgroup_mma_wait(0, deps=[dk, dq])
        else:
            dq = warpgroup_mma_wait(0, deps=[dq])
        _add(dq, sums, number, order, visits - 1, ORDERED)
    # the results leave through this consumer's values, which nobody reads any more
    v_own.store(dv.to(dtype))
    fence_async_shared()
    meet()
    tma.async_copy_shared_to_global(dv_desc, [b, first + WHICH * 64, kv_head, 0], v_sm.index(WHICH))
    tma.store_wait(0)
    meet()
    v_own.store((dk * scale).to(dtype))
    fence_async_shared()
    meet()
    tma.async_copy_shared_to_global(dk_desc, [b, first + WHICH * 64, kv_head, 0], v_sm.index(WHICH))
    tma.store_wait(0)


# --- the kernel and its launch ---------------------------------------------------------------------------------------


@Launcher
@gluon.jit(
    do_not_specialize=["T", "S", "H", "K", "tiles", "window", "tokens", "heavy", "qk_scale", "scale", "cap_scale"]
)
def _backward(
    q_desc, k_desc, v_desc, do_desc, stats_desc, rows_desc, dk_desc, dv_desc, sums, turns, tables, T, S, H, K, tiles,
    window, tokens, heavy, qk_scale, scale, cap_scale, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
    GLOBALS: gl.constexpr, SOFTCAP: gl.constexpr, BM: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_sm = gl.allocate_shared_memory(dtype, [STAGES, 1, BM, 1, D], q_desc.layout)
    do_sm = gl.allocate_shared_memory(dtype, [STAGES, 1, BM, 1, D], do_desc.layout)
    k_sm = gl.allocate_shared_memory(dtype, [2, 1, 64, 1, D], k_desc.layout)
    v_sm = gl.allocate_shared_memory(dtype, [2, 1, 64, 1, D], v_desc.layout)
    st_sm = gl.allocate_shared_memory(gl.float32, [STAGES, 2, BM], stats_desc.layout)
    rows_sm = st_sm  # of no use where there are no tables
    if tables.rows is not None:
        FIELDS: gl.constexpr = 4 if GLOBALS or tables.classes is not None else 2
        rows_sm = gl.allocate_shared_memory(gl.int32, [STAGES, FIELDS, BM], rows_desc.layout)
    ds_sm = gl.allocate_shared_memory(dtype, [4, 64, BM], gl.NVMMASharedLayout(128, 16, 2))
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    ds_full = gl.allocate_shared_memory(gl.int64, [4, 1], bar)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(4):
        mbarrier.init(ds_full.index(i), count=1)
    mbarrier.init(kv_full, count=1)
    descriptors = (q_desc, k_desc, v_desc, do_desc, stats_desc, rows_desc, dk_desc, dv_desc)
    memory = (q_sm, k_sm, v_sm, do_sm, st_sm, rows_sm, ds_sm)
    # a stage's queries and gradients go back together: the consumers have done with both at once
    barriers = (q_full, empty, do_full, empty, kv_full, ds_full)
    ORDERED: gl.constexpr = turns is not None
    program = gl.program_id(0)
    if ORDERED:
        program = gl.atomic_add(turns, 1, sem="relaxed")
    sizes = (T, S, H, K, tiles, window, tokens, heavy, gl.num_programs(0) // tiles, program)
    scales = (qk_scale, scale, cap_scale)
    turn = gl.allocate_shared_memory(gl.int64, [1], bar)
    added = gl.allocate_shared_memory(gl.int64, [1], bar)
    mbarrier.init(turn, count=1)
    mbarrier.init(added, count=2)
    order = (turn, added)
    given = (descriptors, sums, memory, barriers, order, sizes, tables, scales)
    if ORDERED:
        gl.warp_specialize(
            [
                (_consumer, (given, CAUSAL, WINDOW, GLOBALS, SOFTCAP, True, BM, 0, D, STAGES)),
                (_consumer, (given, CAUSAL, WINDOW, GLOBALS, SOFTCAP, True, BM, 1, D, STAGES)),
                (_producer, (descriptors, memory, barriers, sizes, tables, CAUSAL, WINDOW, GLOBALS, BM, D, STAGES)),
                (_keeper, (turns, order, sizes, tables, CAUSAL, WINDOW, GLOBALS, BM)),
            ],
            [4, 1, 1],
            [240, 24, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consumer, (given, CAUSAL, WINDOW, GLOBALS, SOFTCAP, False, BM, 0, D, STAGES)),
                (_consumer, (given, CAUSAL, WINDOW, GLOBALS, SOFTCAP, False, BM, 1, D, STAGES)),
                (_producer, (descriptors, memory, barriers, sizes, tables, CAUSAL, WINDOW, GLOBALS, BM, D, STAGES)),
            ],
            [4, 1],
            [240, 24],
        )


def queries_of(width: int) -> int:
    """Queries of a tile."""
    return 64 if width == 128 else 128


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    window: int | None = None,
    global_tokens: int = 0,
    scale: float,
    softcap: float | None = None,
    deterministic: bool = False,
    visits: Visits | None = None,
    parts: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and the sums of dout · out by tiles of queries (B, H, tiles, `queries_of(D)`), the last perhaps not
    whole; of bfloat16 or float16 and a D of 64 or 128.

    window and global_tokens need causal: row i then sees key j if j <= i and (i - j < window or j < global_tokens).
    softcap makes a score softcap tanh(scale q k / softcap). What is deterministic repeats bit for bit.
    With visits, of tiles of `queries_of(D)` queries, the tables alone say what is seen; that is never deterministic.
    The heads are computed in so many parts, one after the other: beside the gradients it holds dQ of a part in float32.
    """
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    rows = queries_of(D)
    globals_, rows_desc, tabled = window is not None and global_tokens > 0, None, visits is not None
    if visits is None:
        visits = Visits.none()
    else:
        causal, window, globals_ = False, None, visits.globals
        table = visits.tables.rows.flatten(0, 1)
        rows_desc = describe_numbers(table, visits.fields, rows)
    query_tiles, key_tiles = -(-T // rows), -(-S // KEYS)
    padded = query_tiles * rows
    heavy = visits.heavy
    if window is not None and globals_:
        heavy = min(-(-global_tokens // KEYS), key_tiles)
    score_scale, cap_scale = scales_of(scale, softcap)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    q, k, v, dout = mappable(q), mappable(k), mappable(v), mappable(dout)
    by_parts = lse.new_empty(parts, B, H // parts, query_tiles, 2, rows)
    sums = lse.new_empty(B * (H // parts) * padded * D)
    turns = lse.new_empty(1 + B * (H // parts) * query_tiles, dtype=torch.int32) if deterministic else None
    known = None
    if not tabled and parts == 1:
        constants = causal, window is not None, globals_, softcap is not None, deterministic
        known = known_by(q, k, v, dout, out, lse), constants

    def compute(
        stats: Tensor,
        lse: Tensor,
        q: Tensor,
        out: Tensor,
        dout: Tensor,
        dq: Tensor,
        k: Tensor,
        v: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> None:
        """The gradients of some heads of keys and of their queries."""
        H, K = q.shape[2], k.shape[2]
        _prepare(
            (B * H, query_tiles),  # the second axis has at most 65535 programs
            known,
            out,
            dout,
            lse,
            stats,
            sums,
            turns,
            T,
            padded,
            *out.stride()[:3],
            *dout.stride()[:3],
            *lse.stride()[:2],
            H,
            D,
            rows,
            LOG2E,
        )
        _backward(
            (key_tiles * B * K,),
            known,
            describe(q, rows),
            describe(k, 64),
            describe(v, 64),
            describe(dout, rows),
            describe_numbers(stats.view(-1, rows), 2, rows),
            rows_desc,
            describe(dk, 64),
            describe(dv, 64),
            sums,
            turns,
            visits.tables,
            T,
            S,
            H,
            K,
            key_tiles,
            window or 0,
            global_tokens,
            heavy,
            score_scale,
            scale,
            cap_scale,
            LAST_FIRST.value if causal and deterministic else int(causal),
            window is not None,
            globals_,
            softcap is not None,
            rows,
            D,
            STAGES,
        )
        grid = B * H, query_tiles, rows * D // FRAGMENT.value
        _finish(grid, known, sums, dq, T, padded, *dq.stride()[:3], H, scale, D, rows)

    heads = (q, out, dout, dq, k, v, dk, dv)
    if parts == 1:
        compute(by_parts[0], lse, *heads)
    else:
        for each in zip(by_parts, lse.chunk(parts, 1), *(x.chunk(parts, 2) for x in heads), strict=True):
            compute(*each)
    return dq, dk, dv, by_parts[..., 1, :].transpose(0, 1).flatten(1, 2)
