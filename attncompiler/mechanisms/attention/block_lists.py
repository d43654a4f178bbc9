"""A pattern as block lists: which tiles of keys each tile of queries meets, and which it sees whole.

Made analytically, from ranges: time and memory are those of the tiles that are kept, never of a T × S mask. Kernels
skip what is not listed, and mask only what is listed as partial.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attncompiler.mechanisms.attention.intervals import Range, seen_by_all, seen_by_some
from attncompiler.mechanisms.attention.op import as_pattern
from attncompiler.mechanisms.attention.pattern import Pattern
from attncompiler.runtime.inputs import whole as whole_number


@dataclass(frozen=True, slots=True)
class TileList:
    """For each row of tiles the columns that are listed, in order: row r has indices[offsets[r] : offsets[r + 1]]."""

    offsets: Tensor
    """(rows + 1,), int32"""
    indices: Tensor
    """(listed tiles,), int32"""

    def __len__(self) -> int:
        return len(self.indices)

    def rows(self) -> Tensor:
        """The row of each listed tile, int64."""
        return torch.arange(len(self.offsets) - 1).repeat_interleave(self.offsets.diff().long())

    def transposed(self, columns: int) -> TileList:
        """The same tiles listed by column: for each tile of keys, the tiles of queries that meet it."""
        indices = self.indices.long()
        order = torch.argsort(indices, stable=True)  # rows stay in order within a column
        return TileList(_offsets(indices.bincount(minlength=columns)), self.rows()[order].int())


@dataclass(frozen=True, slots=True)
class BlockLists:
    """The tiles of `tile_q` queries × `tile_k` keys in which somebody sees something.

    `full` tiles hold only pairs that see each other, `partial` ones others too; no tile is in both. Tiles at the ends
    of the sequences hold fewer tokens: what is not there counts for nothing.
    """

    full: TileList
    partial: TileList
    full_transposed: TileList
    partial_transposed: TileList
    tile_q: int
    tile_k: int


def block_lists(
    pattern: str | Mapping[str, Any] | Pattern,
    queries: int,
    keys: int,
    *,
    tile_q: int = 128,
    tile_k: int = 128,
    layer: int = 0,
) -> BlockLists:
    """The tiles that a pattern keeps of a call of `queries` queries and `keys` keys, the last of each side by side.

    `pattern` is as in `attention`. Time and memory are those of the kept tiles. Raises InputError (E403) on a pattern
    that is none, and on sizes that are no whole numbers of at least 1 (`layer`: 0).
    """
    pattern = as_pattern(pattern)
    for name, value, least in (
        ("queries", queries, 1),
        ("keys", keys, 1),
        ("tile_q", tile_q, 1),
        ("tile_k", tile_k, 1),
        ("layer", layer, 0),
    ):
        whole_number(name, value, least)
    before, columns = keys - queries, -(-keys // tile_k)
    touched, whole = [], []
    for start in range(before, keys, tile_q):
        last = min(start + tile_q, keys) - 1
        around = seen_by_some(pattern, start, last, keys, layer)
        inside = seen_by_all(pattern, start, last, keys, layer)
        touched.append([(low // tile_k, -(-high // tile_k)) for low, high in around])
        whole.append([(-(-low // tile_k), columns if high == keys else high // tile_k) for low, high in inside])
    listed, full = _listed(touched), _listed(whole)
    rows = len(touched)
    held = torch.isin(_keys(listed, columns), _keys(full, columns), assume_unique=True)
    partial_rows = listed.rows()[~held]
    partial = TileList(_offsets(partial_rows.bincount(minlength=rows)), listed.indices[~held])
    return BlockLists(full, partial, full.transposed(columns), partial.transposed(columns), tile_q, tile_k)


def _listed(rows: Iterable[list[Range]]) -> TileList:
    """Ranges of tiles, in order and perhaps with a tile in common where two meet, as lists of tiles."""
    starts: list[int] = []
    counts: list[int] = []
    per_row: list[int] = []
    for ranges in rows:
        total = end = 0
        for low, high in ranges:
            low = max(low, end)
            if high > low:
                starts.append(low)
                counts.append(high - low)
                total, end = total + high - low, high
        per_row.append(total)
    count = torch.tensor(counts, dtype=torch.int64)
    first = torch.tensor(starts, dtype=torch.int64) - (count.cumsum(0) - count)
    indices = torch.arange(int(count.sum())) + first.repeat_interleave(count)
    return TileList(_offsets(torch.tensor(per_row, dtype=torch.int64)), indices.int())


def _offsets(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()


def _keys(tiles: TileList, columns: int) -> Tensor:
    """One number for each listed tile."""
    return tiles.rows() * columns + tiles.indices
