"""The backward kernels: probabilities come back from the lse (Dao et al. 2022, https://arxiv.org/abs/2205.14135).

`gather_kernel` has a tile of keys and meets the queries that see them; `spread_kernel` has a tile of queries and meets
the keys they see. Each adds up its own gradients alone, in one order: two runs are equal bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attncompiler.mechanisms.attention.flash.forward import SIZES, Sizes, tile_of
from attncompiler.mechanisms.attention.flash.scores import LOG2_E, kept, logits
from attncompiler.mechanisms.attention.flash.tiles import (
    counts,
    full_tile,
    key_bounds,
    partial_tile,
    query_bounds,
    table_bounds,
)
from attncompiler.mechanisms.attention.flash.visible import column_positions, row_positions, sees


@triton.jit(do_not_specialize=SIZES)
def delta_kernel(dout, out, delta, B, T, S, H, K, V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr):
    """The sum over V of dout · out, both (B, T, H, V), as delta (B, H, T) in fp32."""
    sizes = Sizes(B, T, S, H, K)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    both = tl.program_id(0).to(tl.int64)
    head, b = both % sizes.H, both // sizes.H
    w = tl.arange(0, BLOCK_V)
    there = (row < sizes.T)[:, None] & (w < V)[None, :]
    down = dout.ptr + b * dout.batch + head * dout.head + row.to(tl.int64)[:, None] * dout.token + w[None, :]
    up = out.ptr + b * out.batch + head * out.head + row.to(tl.int64)[:, None] * out.token + w[None, :]
    products = tl.load(down, mask=there, other=0.0).to(tl.float32) * tl.load(up, mask=there, other=0.0).to(tl.float32)
    tl.store(delta + (b * sizes.H + head) * sizes.T + row, tl.sum(products, 1), mask=row < sizes.T)


@triton.jit
def _weights(
    products, dweights, lse, delta, rows, columns, window, scoring, slope, b, head, row, column, sizes,
    CAUSAL: tl.constexpr, DRAWS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """q·k and dout·v of a tile → the probabilities that dropout leaves, and the gradient of q·k but for the scale.

    `row` and what is by row have an axis of 1 where keys lie, `column` where queries do.
    """
    distance = row
    if scoring.slopes is not None:
        distance = row_positions(rows, b, row, sizes.T, sizes.S) - column_positions(columns, b, column, sizes.S)
    score, capped = logits(products, scoring, slope, distance)
    weights = tl.exp2(score - lse)
    if MASKED:
        seen = sees(rows, columns, window, b, row, column, sizes.T, sizes.S, CAUSAL, DRAWS)
        weights = tl.where(seen, weights, 0.0)
    dropped = weights
    if scoring.seed is not None:
        keep = kept(scoring, b, head, sizes.H, row, column)
        dropped = weights * keep
        dweights = dweights * keep
    dscores = weights * (dweights - delta)
    if scoring.softcap is not None:
        dscores *= 1 - capped * capped
    return dropped, dscores


@triton.jit
def _by_row(lse, delta, b, head, row, sizes):
    """The lse in base 2, +∞ where a row sees nothing or is not there: its weights are 0; and delta."""
    at = (b.to(tl.int64) * sizes.H + head) * sizes.T + row
    logarithm = tl.load(lse + at, mask=row < sizes.T, other=float("inf"))
    logarithm = tl.where(logarithm == float("-inf"), float("inf"), logarithm * LOG2_E)
    return logarithm, tl.load(delta + at, mask=row < sizes.T, other=0.0)


@triton.jit
def _gather(
    dkey, dvalue, key, value, tile, queries, grads, lse, delta, rows, columns, window, scoring, slope, b, head, column,
    sizes, CAUSAL: tl.constexpr, DRAWS: tl.constexpr, MASKED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, D: tl.constexpr, V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries more."""
    start = tile * BLOCK_M
    row = (start + tl.arange(0, BLOCK_M))[None, :]
    query = tile_of(queries[0], queries[1], start, sizes.T, D, BLOCK_M, BLOCK_D, True)
    products = tl.dot(key, tl.trans(query), input_precision=PRECISION)
    grad = tile_of(grads[0], grads[1], start, sizes.T, V, BLOCK_M, BLOCK_V, True)
    dweights = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
    logarithm, of_row = _by_row(lse, delta, b, head, row, sizes)
    weights, dscores = _weights(
        products, dweights, logarithm, of_row, rows, columns, window, scoring, slope, b, head, row, column, sizes,
        CAUSAL, DRAWS, MASKED,
    )  # fmt: skip
    dvalue = tl.dot(weights.to(grad.dtype), grad, dvalue, input_precision=PRECISION)
    dkey = tl.dot(dscores.to(query.dtype), query, dkey, input_precision=PRECISION)
    return dkey, dvalue


@triton.jit(do_not_specialize=SIZES)
def gather_kernel(
    q, k, v, dout, lse, delta, dk, dv, meeting, rows, columns, window, scoring, B, T, S, H, K,
    CAUSAL: tl.constexpr, DRAWS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, D: tl.constexpr, V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk (B, S, K, D) and dv (B, S, K, V): a tile of keys of one head, and all query heads that read it."""
    sizes = Sizes(B, T, S, H, K)
    every = sizes.B * sizes.K
    number, both = tl.program_id(0) // every, tl.program_id(0) % every
    b, kv_head = both // sizes.K, both % sizes.K
    wide = b.to(tl.int64)
    start = number * BLOCK_N
    column = start + tl.arange(0, BLOCK_N)
    far = kv_head.to(tl.int64)
    keys, values = k.ptr + wide * k.batch + far * k.head, v.ptr + wide * v.batch + far * v.head
    key = tile_of(keys, k.token, start, sizes.S, D, BLOCK_N, BLOCK_D, True)
    value = tile_of(values, v.token, start, sizes.S, V, BLOCK_N, BLOCK_V, True)
    if meeting.table is not None:
        bounds = table_bounds(meeting, b, number)
    else:
        bounds = query_bounds(window, start, start + BLOCK_N, sizes.T, sizes.S, CAUSAL, BLOCK_M)
    partial, full = counts(meeting, bounds, number)

    dkey = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dvalue = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        slope = 0.0
        if scoring.slopes is not None:
            slope = tl.load(scoring.slopes + head)
        queries = q.ptr + wide * q.batch + head.to(tl.int64) * q.head, q.token
        grads = dout.ptr + wide * dout.batch + head.to(tl.int64) * dout.head, dout.token
        for n in range(partial):
            dkey, dvalue = _gather(
                dkey, dvalue, key, value, partial_tile(meeting, bounds, number, n), queries, grads, lse, delta, rows,
                columns, window, scoring, slope, b, head, column[:, None], sizes, CAUSAL, DRAWS, True, BLOCK_M, BLOCK_D,
                BLOCK_V, D, V, PRECISION,
            )  # fmt: skip
        for n in range(full):
            dkey, dvalue = _gather(
                dkey, dvalue, key, value, full_tile(meeting, bounds, number, n), queries, grads, lse, delta, rows,
                columns, window, scoring, slope, b, head, column[:, None], sizes, CAUSAL, DRAWS, False, BLOCK_M,
                BLOCK_D, BLOCK_V, D, V, PRECISION,
            )  # fmt: skip
    at = (wide * sizes.S + column[:, None]) * sizes.K + kv_head
    d, w = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_V)[None, :]
    there = (column < sizes.S)[:, None]
    tl.store(dk + at * D + d, (dkey * scoring.scale).to(dk.dtype.element_ty), mask=there & (d < D))
    tl.store(dv + at * V + w, dvalue.to(dv.dtype.element_ty), mask=there & (w < V))


@triton.jit
def _spread(
    dquery, query, grad, logarithm, of_row, tile, keys, values, rows, columns, window, scoring, slope, b, head, row,
    sizes, CAUSAL: tl.constexpr, DRAWS: tl.constexpr, MASKED: tl.constexpr, RAGGED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys more. Keys that are not there are 0, and add nothing, whatever their weights."""
    start = tile * BLOCK_N
    column = (start + tl.arange(0, BLOCK_N))[None, :]
    key = tile_of(keys[0], keys[1], start, sizes.S, D, BLOCK_N, BLOCK_D, True)
    value = tile_of(values[0], values[1], start, sizes.S, V, BLOCK_N, BLOCK_V, True)
    products = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    dweights = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
    _, dscores = _weights(
        products, dweights, logarithm, of_row, rows, columns, window, scoring, slope, b, head, row, column, sizes,
        CAUSAL, DRAWS, MASKED,
    )  # fmt: skip
    if RAGGED:
        dscores = tl.where(column < sizes.S, dscores, 0.0)  # they may be infinite
    return tl.dot(dscores.to(key.dtype), key, dquery, input_precision=PRECISION)


@triton.jit(do_not_specialize=SIZES)
def spread_kernel(
    q, k, v, dout, lse, delta, dq, meeting, rows, columns, window, scoring, B, T, S, H, K,
    CAUSAL: tl.constexpr, DRAWS: tl.constexpr, RAGGED: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq (B, T, H, D): a tile of queries of one head, the last tiles first."""
    sizes = Sizes(B, T, S, H, K)
    every = sizes.B * sizes.H
    number = tl.cdiv(sizes.T, BLOCK_M) - 1 - tl.program_id(0) // every
    both = tl.program_id(0) % every
    b, head = both // sizes.H, both % sizes.H
    kv_head, wide = head // GROUP, b.to(tl.int64)
    start = number * BLOCK_M
    row = start + tl.arange(0, BLOCK_M)
    far, far_kv = head.to(tl.int64), kv_head.to(tl.int64)
    queries, grads = q.ptr + wide * q.batch + far * q.head, dout.ptr + wide * dout.batch + far * dout.head
    query = tile_of(queries, q.token, start, sizes.T, D, BLOCK_M, BLOCK_D, True)
    grad = tile_of(grads, dout.token, start, sizes.T, V, BLOCK_M, BLOCK_V, True)
    keys = k.ptr + wide * k.batch + far_kv * k.head, k.token
    values = v.ptr + wide * v.batch + far_kv * v.head, v.token
    logarithm, of_row = _by_row(lse, delta, b, head, row[:, None], sizes)
    slope = 0.0
    if scoring.slopes is not None:
        slope = tl.load(scoring.slopes + head)
    if meeting.table is not None:
        bounds = table_bounds(meeting, b, number)
    else:
        bounds = key_bounds(window, start, start + BLOCK_M, sizes.T, sizes.S, CAUSAL, BLOCK_N)
    partial, full = counts(meeting, bounds, number)

    dquery = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for n in range(partial):
        dquery = _spread(
            dquery, query, grad, logarithm, of_row, partial_tile(meeting, bounds, number, n), keys, values, rows,
            columns, window, scoring, slope, b, head, row[:, None], sizes, CAUSAL, DRAWS, True, False, BLOCK_N, BLOCK_D,
            BLOCK_V, D, V, PRECISION,
        )  # fmt: skip
    for n in range(full):
        dquery = _spread(
            dquery, query, grad, logarithm, of_row, full_tile(meeting, bounds, number, n), keys, values, rows, columns,
            window, scoring, slope, b, head, row[:, None], sizes, CAUSAL, DRAWS, False, RAGGED, BLOCK_N, BLOCK_D,
            BLOCK_V, D, V, PRECISION,
        )  # fmt: skip
    at = (wide * sizes.T + row[:, None]) * sizes.H + head
    d = tl.arange(0, BLOCK_D)[None, :]
    there = (row < sizes.T)[:, None] & (d < D)
    tl.store(dq + at * D + d, (dquery * scoring.scale).to(dq.dtype.element_ty), mask=there)
