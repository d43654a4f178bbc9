"""Device functions: which tiles of keys a tile of queries meets, and which tiles of queries a tile of keys does.

Both are two runs of numbers: the tiles that must be masked, then those that are seen whole. They come from lists, from
a table of bounds, or from the pattern's own arithmetic.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attncompiler.mechanisms.attention.flash.visible import Window

BOUNDS = 6


class Lists(NamedTuple):
    """Tiles by the row of tiles: row r has indices[offsets[r] : offsets[r + 1]]."""

    full_offsets: Any
    full_indices: Any
    partial_offsets: Any
    partial_indices: Any


class Bounds(NamedTuple):
    """Tiles as ranges: [global_first, global_last) and [first, last), of which [full_first, full_last) are whole."""

    global_first: Any
    global_last: Any
    first: Any
    full_first: Any
    full_last: Any
    last: Any


class Meeting(NamedTuple):
    """Where the tiles that a tile meets are found: lists, a table of `Bounds` (B or 1, tiles, 6), or neither."""

    lists: Lists | None
    table: Any
    batch: Any
    """what leads to the bounds of the next sequence, in elements"""
    tile: Any
    """what leads to those of the next tile"""


@triton.jit
def _bounds(first, full_first, full_last, last, global_last):
    """Bounds in order: ranges that are empty or cross are made empty where they do no harm."""
    last = tl.maximum(last, first)
    full_first = tl.minimum(tl.maximum(full_first, first), last)
    full_last = tl.minimum(full_last, last)
    empty = full_last <= full_first
    full_first = tl.where(empty, last, full_first)
    full_last = tl.where(empty, last, full_last)
    return Bounds(0, tl.minimum(global_last, first), first, full_first, full_last, last)


@triton.jit
def key_bounds(window: Window, start, stop, T, S, CAUSAL: tl.constexpr, BLOCK: tl.constexpr):
    """Tiles of `BLOCK` keys that the queries start … stop − 1 see, by index."""
    p, q = start + (S - T), tl.minimum(stop, T) - 1 + (S - T)
    low, high = 0, S  # seen by some
    full_low, full_high = 0, S  # seen by all
    global_last = 0
    if CAUSAL:
        high = tl.minimum(tl.maximum(q + 1, 0), S)
        full_high = tl.maximum(p + 1, 0)
    if window.width is not None:
        low = tl.minimum(tl.maximum(p - window.width + 1, 0), high)
        full_low = tl.maximum(q - window.width + 1, 0)
        if not CAUSAL:
            high = tl.maximum(tl.minimum(q + window.width, S), 0)
            full_high = tl.minimum(tl.maximum(p + window.width, 0), S)
        if window.tokens is not None:
            global_last = tl.cdiv(tl.minimum(window.tokens, high), BLOCK)
    return _bounds(
        low // BLOCK, tl.cdiv(full_low, BLOCK), tl.minimum(full_high, S) // BLOCK, tl.cdiv(high, BLOCK), global_last
    )


@triton.jit
def query_bounds(window: Window, start, stop, T, S, CAUSAL: tl.constexpr, BLOCK: tl.constexpr):
    """Tiles of `BLOCK` queries that see the keys start … stop − 1, by index."""
    before = S - T
    stop = tl.minimum(stop, S)
    low, high = 0, T
    full_low, full_high = 0, T
    if CAUSAL:
        low = tl.minimum(tl.maximum(start - before, 0), T)
        full_low = tl.minimum(tl.maximum(stop - 1 - before, 0), T)
    if window.width is not None:
        high = tl.minimum(tl.maximum(stop - 1 + window.width - before, 0), T)
        full_high = tl.minimum(tl.maximum(start + window.width - before, 0), T)
        if not CAUSAL:
            low = tl.minimum(tl.maximum(start - window.width + 1 - before, 0), T)
            full_low = tl.minimum(tl.maximum(stop - window.width - before, 0), T)
        if window.tokens is not None:
            high = tl.where(start < window.tokens, T, high)
            full_high = tl.where(stop <= window.tokens, T, full_high)
    # queries that are not there have weights of 0: a last tile of few queries may count as whole
    full_last = tl.where(full_high >= T, tl.cdiv(T, BLOCK), full_high // BLOCK)
    return _bounds(low // BLOCK, tl.cdiv(full_low, BLOCK), full_last, tl.cdiv(high, BLOCK), 0)


@triton.jit
def table_bounds(meeting: Meeting, b, number):
    """The bounds of tile `number` of the sequence b."""
    at = meeting.table + b.to(tl.int64) * meeting.batch + number * meeting.tile
    return Bounds(tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5))


@triton.jit
def counts(meeting: Meeting, bounds, number):
    """How many tiles must be masked, and how many are whole."""
    if meeting.lists is not None:
        partial = tl.load(meeting.lists.partial_offsets + number + 1) - tl.load(meeting.lists.partial_offsets + number)
        full = tl.load(meeting.lists.full_offsets + number + 1) - tl.load(meeting.lists.full_offsets + number)
    else:
        partial = bounds.global_last - bounds.global_first + bounds.full_first - bounds.first
        partial += bounds.last - bounds.full_last
        full = bounds.full_last - bounds.full_first
    return partial, full


@triton.jit
def partial_tile(meeting: Meeting, bounds, number, n):
    """The n-th of the tiles that must be masked."""
    if meeting.lists is not None:
        tile = tl.load(meeting.lists.partial_indices + tl.load(meeting.lists.partial_offsets + number) + n)
    else:
        globals_ = bounds.global_last - bounds.global_first
        left = globals_ + bounds.full_first - bounds.first
        behind = tl.where(n < left, bounds.first + n - globals_, bounds.full_last + n - left)
        tile = tl.where(n < globals_, bounds.global_first + n, behind)
    return tile


@triton.jit
def full_tile(meeting: Meeting, bounds, number, n):
    """The n-th of the tiles that are seen whole."""
    if meeting.lists is not None:
        tile = tl.load(meeting.lists.full_indices + tl.load(meeting.lists.full_offsets + number) + n)
    else:
        tile = bounds.full_first + n
    return tile
