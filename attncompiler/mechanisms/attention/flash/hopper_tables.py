"""What tells the kernels for Hopper which tiles meet, where a call's indices alone do not: lists or ranges of tiles,
and tables of what each query sees of a tile that is not whole.

A pattern's lists and rows are made once and kept. Those of packed segments are made on the device, in two launches,
from the ids: who is in whose segment is never read on the host.

A query is described by two or four numbers. It sees the column c when low ≤ c < low + span; where others are global,
also when begin ≤ c < begin + front; where there are classes, also when c < reach and c is of its class. Rows that pad
the last tile see nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from attncompiler.mechanisms.attention.block_lists import block_lists
from attncompiler.mechanisms.attention.flash.kept import kept
from attncompiler.mechanisms.attention.flash.sight import FAR, row_table
from attncompiler.mechanisms.attention.pattern import LocalGlobal, Pattern, Random, SlidingWindow, Strided

TILE = 128
"""Tokens of a program's own tile, of either side, and keys of a tile that is met."""
HEAVY = 4
"""A tile that meets this many times the usual number is begun before all others: nothing would hide it at the end."""


class Tables(NamedTuple):
    """What a kernel reads, int32 and on the device. None where a call has no such thing: lists (the first five) or
    bounds, or any."""

    full_offsets: Any = None
    """row r of tiles meets indices[offsets[r] : offsets[r + 1]]"""
    full_indices: Any = None
    partial_offsets: Any = None
    partial_indices: Any = None
    order: Any = None
    """the rows of tiles, those that meet most first"""
    bounds: Any = None
    """(B, tiles, 6), as `tiles.Bounds`"""
    rows: Any = None
    """(B or 1, fields, T padded to whole tiles)"""
    classes: Any = None
    """(S,): the class of each key"""


@dataclass(frozen=True)
class Visits:
    """The tables of a call, and what is known of them before."""

    tables: Tables
    heavy: int = 0
    """how many of the first rows of tiles in `order` are begun before all others"""

    @classmethod
    def none(cls) -> Visits:
        """Of a call whose indices say everything."""
        return cls(Tables())

    @property
    def listed(self) -> bool:
        return self.tables.order is not None

    @property
    def ranged(self) -> bool:
        return self.tables.bounds is not None

    @property
    def classes(self) -> bool:
        return self.tables.classes is not None

    @property
    def fields(self) -> int:
        return self.tables.rows.shape[1] if self.tables.rows is not None else 0

    @property
    def globals(self) -> bool:
        return self.fields == 4 and not self.classes


# --- a pattern alone -------------------------------------------------------------------------------------------------


def by_tiles(pattern: Pattern, T: int, S: int) -> bool:
    """Whether a tile is seen whole or not at all, but for what is later than its queries."""
    sized = isinstance(pattern, (Strided, LocalGlobal, Random)) and pattern.block_size % TILE == 0
    return sized and S % TILE == 0 and (S - T) % TILE == 0


@kept
def of_pattern(
    pattern: Pattern, layer: int, T: int, S: int, device: torch.device, queries: int, transposed: bool
) -> Visits:
    """Tiles of `queries` queries and 128 keys that meet: by queries, or, transposed, by keys.

    S is a multiple of 128: a tile that is listed as whole may not reach beyond the last key.
    """
    made = block_lists(pattern, T, S, tile_q=queries, tile_k=TILE, layer=layer)
    whole, partial = made.full, made.partial
    if transposed:
        whole, partial = made.full_transposed, made.partial_transposed
    met = whole.offsets.diff() + partial.offsets.diff()
    order = met.argsort(descending=True, stable=True).int()
    rows, classes = _rows_of_pattern(pattern, T, S, device)
    tables = Tables(
        full_offsets=whole.offsets.to(device),
        full_indices=whole.indices.to(device),
        partial_offsets=partial.offsets.to(device),
        partial_indices=partial.indices.to(device),
        order=order.to(device),
        rows=rows,
        classes=classes,
    )
    return Visits(tables, int((met > HEAVY * met.double().mean()).sum()))


@kept
def _rows_of_pattern(pattern: Pattern, T: int, S: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    i = torch.arange(S - T, S, device=device)[None]
    begin, stop, low, high, global_end, _ = row_table(pattern, i, i, torch.zeros_like(i), torch.full_like(i, S)).unbind(
        1
    )
    if by_tiles(pattern, T, S):
        return _rows(begin, stop), None
    near = torch.maximum(low, begin), torch.minimum(high, stop)
    if isinstance(pattern, Strided):
        classes = (torch.arange(S, device=device) // pattern.block_size % pattern.stride).int()
        own = (i // pattern.block_size % pattern.stride).int()
        return _rows(*near, own, own + stop.clamp(min=0)), classes
    if isinstance(pattern, LocalGlobal) or (isinstance(pattern, SlidingWindow) and pattern.global_tokens):
        return _rows(*near, begin, torch.minimum(global_end, stop)), None
    return _rows(*near), None


def _rows(*bounds: Tensor) -> Tensor:
    """Pairs of where something begins and ends (1, T) → the table of rows, which has lengths in place of ends."""
    fields = []
    for begin, end in zip(bounds[::2], bounds[1::2], strict=True):
        fields += [begin, (end - begin).clamp(min=0)]
    return pad(torch.stack(fields, 1), (0, -bounds[0].shape[1] % TILE)).contiguous()


# --- packed segments -------------------------------------------------------------------------------------------------


def of_segments(ids: Tensor, pattern: Pattern, queries: int, transposed: bool) -> Visits:
    """What a pattern (full, causal or a sliding window) leaves of runs of equal ids (B, T), of queries and keys alike.

    Bounds are those of tiles of 128 queries in tiles of 128 keys, or, transposed, of 128 keys in tiles of `queries`.
    """
    B, T = ids.shape
    tiles, ids = triton.cdiv(T, TILE), ids.contiguous()
    width, tokens = FAR, 0
    if isinstance(pattern, SlidingWindow):
        width, tokens = min(pattern.window, FAR), min(pattern.global_tokens, FAR)
    edges = torch.empty(B, tiles, 2, dtype=torch.int32, device=ids.device)
    bounds = torch.empty(B, tiles, 6, dtype=torch.int32, device=ids.device)
    rows = torch.empty(B, 4 if tokens else 2, tiles * TILE, dtype=torch.int32, device=ids.device)
    edges_kernel[(tiles, B)](ids, edges, T, tiles, TILE)
    segments_kernel[(tiles, B)](
        ids,
        edges,
        rows,
        bounds,
        T,
        tiles,
        width,
        tokens,
        CAUSAL=pattern.causal,
        GLOBALS=tokens > 0,
        TRANSPOSED=transposed,
        OWN=TILE,
        MET=queries if transposed else TILE,
        CHUNK=1024,
    )
    return Visits(Tables(bounds=bounds, rows=rows))


@triton.jit
def _turns(ids, b, t, T):
    """Which of the tokens t begin a segment that is not the first."""
    inner = (t > 0) & (t < T)
    at = ids + b.to(tl.int64) * T + t
    return inner & (tl.load(at, mask=inner, other=0) != tl.load(at - 1, mask=inner, other=0))


@triton.jit(do_not_specialize=["T", "tiles"])
def edges_kernel(ids, edges, T, tiles, OWN: tl.constexpr):
    """The first token of each tile that begins a segment, and the last one: T and 0 where there is none."""
    number, b = tl.program_id(0), tl.program_id(1)
    t = number * OWN + tl.arange(0, OWN)
    turns = _turns(ids, b, t, T)
    at = edges + (b.to(tl.int64) * tiles + number) * 2
    tl.store(at, tl.min(tl.where(turns, t, T), 0))
    tl.store(at + 1, tl.max(tl.where(turns, t, 0), 0))


@triton.jit
def _larger(x, y):
    return tl.maximum(x, y)


@triton.jit
def _smaller(x, y):
    return tl.minimum(x, y)


@triton.jit(do_not_specialize=["T", "tiles", "width", "tokens"])
def segments_kernel(
    ids, edges, rows, bounds, T, tiles, width, tokens, CAUSAL: tl.constexpr, GLOBALS: tl.constexpr,
    TRANSPOSED: tl.constexpr, OWN: tl.constexpr, MET: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The table of rows, and the bounds of each tile of queries, or, transposed, of each tile of keys."""
    number, b = tl.program_id(0), tl.program_id(1)
    t = number * OWN + tl.arange(0, OWN)
    there = t < T
    # where the segments begin and end that the tile's first and last tokens are in
    first, last = T, 0
    for chunk in range(0, tiles, CHUNK):
        tile = chunk + tl.arange(0, CHUNK)
        at = edges + (b.to(tl.int64) * tiles + tile) * 2
        first = tl.minimum(first, tl.min(tl.load(at, mask=(tile > number) & (tile < tiles), other=T), 0))
        last = tl.maximum(last, tl.max(tl.load(at + 1, mask=tile < number, other=0), 0))
    begin = tl.maximum(tl.associative_scan(tl.where(_turns(ids, b, t, T), t, 0), 0, _larger), last)
    ends = tl.where(_turns(ids, b, t + 1, T), t + 1, T)
    stop = tl.minimum(tl.associative_scan(ends, 0, _smaller, reverse=True), first)

    # as queries: what they see near themselves, and of the first tokens
    early = t - begin < tokens
    low, high = tl.maximum(t - (width - 1), begin), tl.minimum(t + width, stop)
    global_end = tl.minimum(begin + tokens, stop)
    if CAUSAL:
        high = t + 1
        global_end = tl.minimum(global_end, high)
    elif GLOBALS:
        low, high = tl.where(early, begin, low), tl.where(early, stop, high)
    FIELDS: tl.constexpr = 4 if GLOBALS else 2
    padded = tiles * OWN
    at = rows + b.to(tl.int64) * FIELDS * padded + t
    tl.store(at, low)
    tl.store(at + padded, tl.where(there, high - low, 0))
    if GLOBALS:
        tl.store(at + 2 * padded, begin)
        tl.store(at + 3 * padded, tl.where(there, global_end - begin, 0))

    # as keys, where that is not the same: who sees them
    if TRANSPOSED and CAUSAL:
        low, high = t, tl.where(early, stop, tl.minimum(t + width, stop))
        global_end = begin
    first = tl.min(tl.where(there, low, T), 0) // MET
    last = tl.cdiv(tl.max(tl.where(there, high, 0), 0), MET)
    full_first = tl.cdiv(tl.max(tl.where(there, low, 0), 0), MET)
    full_last = tl.min(tl.where(there, high, T), 0) // MET
    empty = full_last <= full_first
    if TRANSPOSED:
        empty = empty | (number * OWN + OWN > T)  # keys that are not there must be masked
    global_first, global_last = 0, 0
    if GLOBALS:
        some = there & (begin < global_end)
        global_last = tl.minimum(tl.cdiv(tl.max(tl.where(some, global_end, 0), 0), MET), first)
        global_first = tl.minimum(tl.min(tl.where(some, begin, T), 0) // MET, global_last)
    at = bounds + (b.to(tl.int64) * tiles + number) * 6
    tl.store(at, global_first)
    tl.store(at + 1, global_last)
    tl.store(at + 2, first)
    tl.store(at + 3, tl.where(empty, last, full_first))
    tl.store(at + 4, tl.where(empty, last, full_last))
    tl.store(at + 5, last)


# --- device functions: which tiles -----------------------------------------------------------------------------------


@gluon.jit
def walk(tables: Tables, b, number, known, tiles):
    """The tiles that tile `number` of the sequence b meets, as numbers for the functions below: of none if not `known`.

    By lists: where the partial tiles start, how many they are, and the same of the whole ones. By ranges: the bounds.
    """
    if tables.order is not None:
        partials = gl.load(tables.partial_offsets + number, mask=known, other=0)
        partial = gl.load(tables.partial_offsets + number + 1, mask=known, other=0) - partials
        wholes = gl.load(tables.full_offsets + number, mask=known, other=0)
        whole = gl.load(tables.full_offsets + number + 1, mask=known, other=0) - wholes
        return partials, partial, wholes, whole
    else:
        at = tables.bounds + (b.to(gl.int64) * tiles + number) * 6
        return (
            gl.load(at, mask=known, other=0),
            gl.load(at + 1, mask=known, other=0),
            gl.load(at + 2, mask=known, other=0),
            gl.load(at + 3, mask=known, other=0),
            gl.load(at + 4, mask=known, other=0),
            gl.load(at + 5, mask=known, other=0),
        )


@gluon.jit
def steps(tables: Tables, walk):
    """How many tiles that is."""
    if tables.order is not None:
        count = walk[1] + walk[3]
    else:
        count = walk[5] - walk[2] + walk[1] - walk[0]
    return count


@gluon.jit
def tile_at(tables: Tables, i, walk, past):
    """The i-th of them. Of lists the partial ones come first; ranges go from the last tile down, then to global ones.
    Where there is no i-th: `past`, or any."""
    if tables.order is not None:
        partials, partial, wholes, whole = walk
        tile = gl.load(tables.partial_indices + partials + i, mask=i < partial, other=past)
        inside = (i >= partial) & (i < partial + whole)
        tile = gl.where(i < partial, tile, gl.load(tables.full_indices + wholes + i - partial, mask=inside, other=past))
    else:
        global_first, global_last, first, full_first, full_last, last = walk
        tile = last - 1 - i
        tile = gl.where(tile < first, global_last - first + tile, tile)
    return tile


@gluon.jit
def whole_steps(tables: Tables, walk):
    """Of its steps, the first that needs no mask, and the first after it that does."""
    if tables.order is not None:
        unmasked = walk[1]
        masked = walk[1] + walk[3]
    else:
        unmasked = walk[5] - walk[4]
        masked = walk[5] - walk[3]
    return unmasked, masked


# --- device functions: which keys of a tile --------------------------------------------------------------------------


@gluon.jit
def within(column, begin, length):
    """begin ≤ column < begin + length, by one unsigned comparison."""
    return (column - begin).to(gl.uint32, bitcast=True) < length.to(gl.uint32, bitcast=True)


@gluon.jit
def seen(column, left, low, span, third, fourth, of_column, GLOBALS: gl.constexpr, CLASSES: gl.constexpr):
    """Which keys queries see: columns counted from `left`, and the fields of rows, along the other axis."""
    found = within(column, low - left, span)
    if GLOBALS:
        found = found | within(column, third - left, fourth)
    if CLASSES:
        found = found | ((third == of_column) & within(column, -left, fourth))
    return found
