"""The forward kernel: flash attention's online softmax (Dao 2023, https://arxiv.org/abs/2307.08691, algorithm 1).

A program has BLOCK_M rows. Usually those are queries of one head; with PACKED > 1 they are, token by token, the queries
of all heads that read the same keys, so that a single query fills a tile. With SPLITS > 1 several programs share the
keys of a tile and leave their parts, which `merge` joins by their lse (flash-decoding).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attncompiler.mechanisms.attention.flash.scores import LN_2, LOG2_E, kept, logits
from attncompiler.mechanisms.attention.flash.tiles import (
    counts,
    full_tile,
    key_bounds,
    partial_tile,
    table_bounds,
)
from attncompiler.mechanisms.attention.flash.visible import column_positions, row_positions, sees

SIZES = ("B", "T", "S", "H", "K", "heads_at_once")
"""Arguments of which no value has code of its own: there would be one for every combination of ones."""


class Sizes(NamedTuple):
    """T queries of H heads and S keys of K heads, of B sequences."""

    B: Any
    T: Any
    S: Any
    H: Any
    K: Any


@triton.jit
def tile_of(
    base, stride, start, length, width: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHECK: tl.constexpr
):
    """Rows start … start + ROWS − 1 of a matrix, 0 where there are none."""
    r, c = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    at = base + start.to(tl.int64) * stride + (r * stride + c)
    there = (r >= 0) & (c >= 0)
    if CHECK:
        there &= start + r < length
    if width != WIDTH:
        there &= c < width
    if CHECK or width != WIDTH:
        found = tl.load(at, mask=there, other=0.0)
    else:
        found = tl.load(at)
    return found


@triton.jit
def _attend(
    state, query, tile, keys, values, rows, columns, window, scoring, slope, b, head, row, sizes,
    CAUSAL: tl.constexpr, DRAWS: tl.constexpr, MASKED: tl.constexpr, RAGGED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, D: tl.constexpr, V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys more: sums of weights, relative to the largest score so far, and of values by them."""
    acc, total, largest = state
    start = tile * BLOCK_N
    CHECK: tl.constexpr = MASKED or RAGGED
    key = tile_of(keys[0], keys[1], start, sizes.S, D, BLOCK_N, BLOCK_D, CHECK)
    products = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    column = (start + tl.arange(0, BLOCK_N))[None, :]
    distance = row
    if scoring.slopes is not None:
        distance = row_positions(rows, b, row, sizes.T, sizes.S) - column_positions(columns, b, column, sizes.S)
    score, _ = logits(products, scoring, slope, distance)
    if MASKED:
        seen = sees(rows, columns, window, b, row, column, sizes.T, sizes.S, CAUSAL, DRAWS)
        score = tl.where(seen, score, float("-inf"))
    elif RAGGED:
        score = tl.where(column < sizes.S, score, float("-inf"))
    new = tl.maximum(largest, tl.max(score, 1))
    base = new
    if MASKED:
        base = tl.where(new == float("-inf"), 0.0, new)
    weights = tl.exp2(score - base[:, None])
    fading = tl.exp2(largest - base)
    total = total * fading + tl.sum(weights, 1)
    if scoring.seed is not None:
        weights *= kept(scoring, b, head, sizes.H, row, column)
    value = tile_of(values[0], values[1], start, sizes.S, V, BLOCK_N, BLOCK_V, CHECK)
    acc = tl.dot(weights.to(value.dtype), value, acc * fading[:, None], input_precision=PRECISION)
    return acc, total, new


@triton.jit(do_not_specialize=SIZES)
def attend_kernel(
    q, k, v, out, lse, sinks, meeting, rows, columns, window, scoring, B, T, S, H, K, heads_at_once,
    CAUSAL: tl.constexpr, DRAWS: tl.constexpr, RAGGED: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr,
    PACKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out (B, T, H, V) and lse (B, H, T), or with SPLITS both once for each split, in fp32 and without sinks.

    Programs are numbered so that those of `heads_at_once` heads, whose keys fit the cache, run beside each other, and
    of these the last tiles of queries first: under a causal pattern they are the longest.
    """
    sizes = Sizes(B, T, S, H, K)
    TOKENS: tl.constexpr = BLOCK_M // PACKED
    tiles = tl.cdiv(T, TOKENS)
    every = sizes.B * (H if PACKED == 1 else sizes.K)
    chunk = tl.program_id(0) // (tiles * heads_at_once)
    inside = tl.program_id(0) % (tiles * heads_at_once)
    beside = tl.minimum(heads_at_once, every - chunk * heads_at_once)
    number = tiles - 1 - inside // beside
    both = chunk * heads_at_once + inside % beside
    m = tl.arange(0, BLOCK_M)
    row = number * TOKENS + m // PACKED
    if PACKED == 1:
        b, one = both // H, both % H
        kv_head, head = one // GROUP, one + m * 0
    else:
        b, kv_head = both // sizes.K, both % sizes.K
        head = kv_head * GROUP + m % PACKED
    there = (row < T) & (m % PACKED < GROUP)
    d, w = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    wide = b.to(tl.int64)

    at = q.ptr + wide * q.batch + row.to(tl.int64)[:, None] * q.token + head.to(tl.int64)[:, None] * q.head + d[None, :]
    query = tl.load(at, mask=there[:, None] & (d < D)[None, :], other=0.0)
    keys = k.ptr + wide * k.batch + kv_head.to(tl.int64) * k.head, k.token
    values = v.ptr + wide * v.batch + kv_head.to(tl.int64) * v.head, v.token
    slope = 0.0
    if scoring.slopes is not None:
        slope = tl.load(scoring.slopes + head, mask=there, other=0.0)[:, None]

    if meeting.table is not None:
        bounds = table_bounds(meeting, b, number)
    else:
        bounds = key_bounds(window, number * TOKENS, number * TOKENS + TOKENS, T, S, CAUSAL, BLOCK_N)
    partial, full = counts(meeting, bounds, number)
    first, last = 0, partial + full
    if SPLITS > 1:
        share = tl.cdiv(last, SPLITS)
        first = tl.program_id(1) * share
        last = tl.minimum(last, first + share)

    state = (
        tl.zeros([BLOCK_M, BLOCK_V], tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        tl.full([BLOCK_M], float("-inf"), tl.float32),
    )
    for n in range(first, tl.minimum(last, partial)):
        state = _attend(
            state, query, partial_tile(meeting, bounds, number, n), keys, values, rows, columns, window, scoring, slope,
            b, head[:, None], row[:, None], sizes, CAUSAL, DRAWS, True, True, BLOCK_N, BLOCK_D, BLOCK_V, D, V,
            PRECISION,
        )  # fmt: skip
    for n in range(tl.maximum(first - partial, 0), last - partial):
        state = _attend(
            state, query, full_tile(meeting, bounds, number, n), keys, values, rows, columns, window, scoring, slope,
            b, head[:, None], row[:, None], sizes, CAUSAL, DRAWS, False, RAGGED, BLOCK_N, BLOCK_D, BLOCK_V, D,
            V, PRECISION,
        )  # fmt: skip
    acc, total, largest = state

    if sinks is not None:
        sink = tl.load(sinks + head, mask=there, other=float("-inf")) * LOG2_E
        sink = tl.where(total > 0, sink, float("-inf"))  # a row that sees no key has no sink either
        new = tl.maximum(largest, sink)
        fading = tl.exp2(largest - tl.where(new == float("-inf"), 0.0, new))
        total = total * fading + tl.exp2(sink - tl.where(new == float("-inf"), 0.0, new))
        acc, largest = acc * fading[:, None], new
    empty = largest == float("-inf")
    total = tl.where(empty, 1.0, total)
    acc = acc / total[:, None]
    logarithm = (largest + tl.log2(total)) * LN_2
    part = 0
    if SPLITS > 1:
        part = tl.program_id(1).to(tl.int64) * sizes.B
    at = ((part + wide) * H + head) * T + row
    tl.store(lse + at, logarithm, mask=there)
    at = ((part + wide) * T + row[:, None]) * H + head[:, None]
    tl.store(out + at * V + w[None, :], acc.to(out.dtype.element_ty), mask=there[:, None] & (w < V)[None, :])


@triton.jit(do_not_specialize=SIZES)
def merge_kernel(
    parts, lses, out, lse, sinks, B, T, S, H, K,
    SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row of one head: parts (SPLITS, B, T, H, V) and lses (SPLITS, B, H, T), fp32 → out, lse, with the sink."""
    sizes = Sizes(B, T, S, H, K)
    row, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n, w = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_V)
    there = n < SPLITS
    number = n * sizes.B + b
    each = tl.load(lses + (number * sizes.H + head) * sizes.T + row, mask=there, other=float("-inf"))
    largest = tl.max(each, 0)
    sink = float("-inf")
    if sinks is not None:
        sink = tl.where(largest > float("-inf"), tl.load(sinks + head).to(tl.float32), float("-inf"))
        largest = tl.maximum(largest, sink)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    weights = tl.exp2((each - base) * LOG2_E)
    total = tl.sum(weights, 0) + tl.exp2((sink - base) * LOG2_E)
    at = ((number * sizes.T + row) * sizes.H + head)[:, None] * V + w[None, :]
    values = tl.load(parts + at, mask=there[:, None] & (w < V)[None, :], other=0.0)
    empty = largest == float("-inf")
    total = tl.where(empty, 1.0, total)
    joined = tl.sum(values * weights[:, None], 0) / total
    tl.store(lse + (b * sizes.H + head) * sizes.T + row, largest + tl.log2(total) * LN_2)
    at = ((b * sizes.T + row) * sizes.H + head) * V + w
    tl.store(out + at, joined.to(out.dtype.element_ty), mask=w < V)
