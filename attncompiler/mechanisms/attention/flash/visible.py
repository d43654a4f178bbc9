"""Device functions: which of a tile's keys each of its queries sees.

A query is described by a few numbers, a key by its column; a pair of them takes two or three comparisons, whatever the
pattern. Without a table (`rows.table` None) the numbers follow from the query's index. A row vector has an axis of 1
where keys lie, and a column vector where queries lie, so that either may be the first axis of a tile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

BEGIN = tl.constexpr(0)
STOP = tl.constexpr(1)
LOW = tl.constexpr(2)
HIGH = tl.constexpr(3)
GLOBAL = tl.constexpr(4)
POSITION = tl.constexpr(5)
FIELDS = 6
"""Of a table of rows. A query sees the column c when low ≤ c < high or c < global (or by its class, or by a draw), and
begin ≤ c < stop; `position` is where it stands among the columns."""
NOWHERE = tl.constexpr(2**31 - 1)
"""A column beyond every stop."""


class Strided(NamedTuple):
    """A tensor (B, T, H, D) whose last axis is contiguous, by its strides in elements."""

    ptr: Any
    batch: Any
    token: Any
    head: Any


class Vectors(NamedTuple):
    """A contiguous tensor (B or 1, …), by what leads from one sequence to the next, in elements: 0 where all share."""

    ptr: Any
    batch: Any


class Rows(NamedTuple):
    """What is known of queries beside their index. None stands for what a call does not have."""

    table: Vectors | None
    """(B or 1, FIELDS, T) int32"""
    classes: Vectors | None
    """(B or 1, T) int32: they see every column of their class"""
    drawn: Vectors | None
    """(B or 1, T, draws) int32: they see the columns of these blocks"""
    segments: Vectors | None
    """(B, T) int32: they see only columns of their segment"""


class Columns(NamedTuple):
    """What is known of keys beside their index."""

    positions: Vectors | None
    """(B or 1, S) int32: the column of each key; without it, its index"""
    classes: Vectors | None
    """(B or 1, S) int32"""
    blocks: Vectors | None
    """(B or 1, S) int32, for `Rows.drawn`"""
    segments: Vectors | None
    """(B, S) int32"""
    real: Vectors | None
    """(B, S) uint8: 0 where nobody sees the key"""


class Window(NamedTuple):
    """The numbers of a pattern that needs no table: None where nothing bounds what is seen."""

    width: Any
    tokens: Any
    """the first columns, which all later queries see"""


@triton.jit
def of_tokens(vectors, b, index, valid, other):
    """What each of the tokens `index` of the sequence b has; `other` where there is no such token."""
    return tl.load(vectors.ptr + b.to(tl.int64) * vectors.batch + index, mask=valid, other=other)


@triton.jit
def field(rows, b, index, T, NUMBER: tl.constexpr):
    """One of the numbers of queries; 0, which is an empty range, where there is no query."""
    start = rows.table.ptr + b.to(tl.int64) * rows.table.batch + NUMBER * T
    return tl.load(start + index, mask=index < T, other=0)


@triton.jit
def row_positions(rows, b, index, T, S):
    """Where queries stand among the columns."""
    if rows.table is None:
        return index + (S - T)
    else:
        return field(rows, b, index, T, POSITION)


@triton.jit
def column_positions(columns, b, index, S):
    """The column of each key."""
    if columns.positions is None:
        return index
    else:
        return of_tokens(columns.positions, b, index, index < S, NOWHERE)


@triton.jit
def sees(rows, columns, window, b, row, column, T, S, CAUSAL: tl.constexpr, DRAWS: tl.constexpr):
    """Which of the keys of index `column` the queries of index `row` see; one of the two has an axis of 1."""
    there = column < S
    c = column_positions(columns, b, column, S)
    if rows.table is None:
        i = row + (S - T)
        seen = there & (row < T)
        if CAUSAL:
            seen = seen & (c <= i)
        if window.width is not None:
            near = c > i - window.width
            if not CAUSAL:
                near = near & (c < i + window.width)
            if window.tokens is not None:
                near = near | (c < window.tokens)
            seen = seen & near
    else:
        seen = (c >= field(rows, b, row, T, LOW)) & (c < field(rows, b, row, T, HIGH))
        seen = seen | (c < field(rows, b, row, T, GLOBAL))
        if rows.classes is not None:
            of_row = of_tokens(rows.classes, b, row, row < T, -1)
            seen = seen | (of_row == of_tokens(columns.classes, b, column, there, -2))
        if rows.drawn is not None:
            block = of_tokens(columns.blocks, b, column, there, -2)
            for draw in tl.static_range(DRAWS):
                seen = seen | (of_tokens(rows.drawn, b, row * DRAWS + draw, row < T, -1) == block)
        seen = seen & (c >= field(rows, b, row, T, BEGIN)) & (c < field(rows, b, row, T, STOP))
        if rows.segments is not None:
            of_row = of_tokens(rows.segments, b, row, row < T, 0)
            seen = seen & (of_row == of_tokens(columns.segments, b, column, there, 0))
        if columns.real is not None:
            seen = seen & (of_tokens(columns.real, b, column, there, 0) != 0)
    return seen
