"""What a call's visibility is to a GPU: numbers for its rows and columns, and which tiles meet. No value is read on the
host, so a call can be recorded in a graph, if one like it went before: lists of tiles are made on the host.

A call is of one of three kinds. Where a pattern is simple arithmetic and nothing else hides a key, the kernels compute
everything. Other patterns have block lists and a table of rows, made once and kept. Where masks or positions decide,
tables of rows and of bounds are made on the device, from what is given.

Columns are numbered as keys lie; where positions are given, or other segments for keys than for queries, a key's column
is its position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from attncompiler.mechanisms.attention.block_lists import TileList, block_lists
from attncompiler.mechanisms.attention.flash.kept import kept
from attncompiler.mechanisms.attention.flash.tiles import BOUNDS, Lists, Meeting
from attncompiler.mechanisms.attention.flash.visible import Columns, Rows, Vectors, Window
from attncompiler.mechanisms.attention.op import AttentionOptions
from attncompiler.mechanisms.attention.pattern import (
    Causal,
    Chunked,
    Full,
    LocalGlobal,
    Pattern,
    Random,
    SlidingWindow,
    Strided,
)
from attncompiler.mechanisms.attention.random_blocks import NONE, drawn
from attncompiler.mechanisms.attention.visibility import positions, query_mask, sequence_lengths
from attncompiler.runtime.implementation import Tensors

FAR = 2**30
"""A column beyond all others, in either direction."""
NO_ROWS, NO_COLUMNS = Rows(None, None, None, None), Columns(None, None, None, None, None)
BY_INDEX = Meeting(None, None, 0, 0)

MeetingOf = Callable[[int, int], Meeting]
"""(tokens of a tile of its own, tokens of a tile that it meets) → where those are found"""


@dataclass(frozen=True)
class Sight:
    """Who sees whom in a call, as the kernels take it."""

    causal: bool
    rows: Rows
    columns: Columns
    window: Window
    keys: MeetingOf
    """for tiles of queries"""
    queries: MeetingOf
    """for tiles of keys"""
    listed: bool = False
    """whether tiles are listed, and one that is listed as whole may reach beyond the last key"""

    @property
    def draws(self) -> int:
        return self.rows.drawn.ptr.shape[-1] if self.rows.drawn is not None else 0

    @classmethod
    def of(cls, inputs: Tensors, options: AttentionOptions) -> Sight:
        pattern = options.pattern
        if inputs.keys() & {"segment_ids", "attention_mask", "q_positions"}:
            return _of_masks(inputs, options)
        T, S = inputs["q"].shape[1], inputs["k"].shape[1]
        by_index = isinstance(pattern, (Full, Causal))
        window = Window(None, None)
        # where time has no order, queries before the first key are among the global ones, as the formula has it
        if isinstance(pattern, SlidingWindow) and (pattern.causal or not (pattern.global_tokens or T > S)):
            by_index, tokens = True, min(pattern.global_tokens, FAR)
            window = Window(min(pattern.window, FAR), tokens or None)
        if by_index:
            return cls(pattern.causal, NO_ROWS, NO_COLUMNS, window, lambda m, n: BY_INDEX, lambda n, m: BY_INDEX)
        place = (pattern, options.layer, T, S, inputs["q"].device)
        rows, columns = _of_pattern(*place)
        return cls(
            causal=False,
            rows=rows,
            columns=columns,
            window=window,
            keys=lambda m, n: _lists(*place, m, n, False),
            queries=lambda n, m: _lists(*place, m, n, True),
            listed=True,
        )


# --- a pattern alone -------------------------------------------------------------------------------------------------


@kept
def _of_pattern(pattern: Pattern, layer: int, T: int, S: int, device: torch.device) -> tuple[Rows, Columns]:
    rows = torch.arange(S - T, S, device=device)[None]
    columns = torch.arange(S, device=device)[None]
    table = row_table(pattern, rows, rows, torch.zeros_like(rows), torch.full_like(rows, S))
    return _described(pattern, layer, table, rows, columns, torch.full_like(rows, S))


@kept
def _lists(
    pattern: Pattern, layer: int, T: int, S: int, device: torch.device, tile_q: int, tile_k: int, transposed: bool
) -> Meeting:
    made = block_lists(pattern, T, S, tile_q=tile_q, tile_k=tile_k, layer=layer)
    whole, partial = made.full, made.partial
    if transposed:
        whole, partial = made.full_transposed, made.partial_transposed

    def there(tiles: TileList) -> tuple[Tensor, Tensor]:
        return tiles.offsets.to(device), tiles.indices.to(device)

    return Meeting(Lists(*there(whole), *there(partial)), None, 0, 0)


def _near(pattern: Pattern, i: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What queries at positions i see without regard to the order of time: [low, high), and all below a last one."""
    nothing, low, high = torch.zeros_like(i), torch.full_like(i, -FAR), torch.full_like(i, FAR)
    nowhere = torch.full_like(i, -2 * FAR)  # also below keys at negative positions, however far from them
    match pattern:
        case SlidingWindow(window=window, global_tokens=tokens, causal=causal):
            everything = torch.zeros_like(i, dtype=torch.bool) if causal else i < tokens
            return (
                torch.where(everything, low, i - (window - 1)),
                torch.where(everything, high, i + window),
                nothing + tokens,
            )
        case Chunked(chunk=chunk):
            return i // chunk * chunk, high, nowhere
        case Strided(block_size=size, window=reach):
            block = i // size
            return (block - (reach - 1)) * size, (block + reach) * size, nowhere
        case LocalGlobal(block_size=size) | Random(block_size=size):
            block, reach = i // size, pattern.local_blocks
            everything = torch.zeros_like(i, dtype=torch.bool) if pattern.causal else block < pattern.global_blocks
            return (
                torch.where(everything, low, (block - (reach - 1)) * size),
                torch.where(everything, high, (block + reach) * size),
                nothing + pattern.global_blocks * size,
            )
    return low, high, nowhere


def row_table(pattern: Pattern, i: Tensor, column: Tensor, begin: Tensor, stop: Tensor) -> Tensor:
    """The table of rows (B or 1, FIELDS, T) of queries at positions i, whose own columns are `column`, all (B or 1, T).

    They see nothing outside begin … stop − 1, and position 0 is at column − i.
    """
    low, high, global_end = (bound + (column - i) for bound in _near(pattern, i))
    if pattern.causal:
        stop = torch.minimum(stop, column + 1)
    fields = torch.broadcast_tensors(begin, stop, low, high, global_end, column)
    return torch.stack(fields, 1).clamp(-FAR, FAR).int()


def _described(
    pattern: Pattern, layer: int, table: Tensor, i: Tensor, j: Tensor, lengths: Tensor | None
) -> tuple[Rows, Columns]:
    """Rows and columns of queries at positions i (B or 1, T) and keys at j (B or 1, S)."""
    rows, columns = NO_ROWS._replace(table=_vectors(table)), NO_COLUMNS
    if isinstance(pattern, Strided):
        classes = [_vectors(p // pattern.block_size % pattern.stride) for p in (i, j)]
        return rows._replace(classes=classes[0]), columns._replace(classes=classes[1])
    if isinstance(pattern, Random):
        own = (i // pattern.block_size).clamp(min=0)
        blocks: Tensor | int = 0
        if not pattern.causal:
            assert lengths is not None
            blocks = (-(-lengths // pattern.block_size)).expand_as(own).flatten()
        found = drawn(pattern, layer, own.flatten(), blocks, trimmed=False)
        found = torch.where(found == NONE, -FAR, found)  # keys at negative positions have a block −1
        return rows._replace(drawn=_vectors(found.view(*own.shape, -1))), columns._replace(
            blocks=_vectors(j // pattern.block_size)
        )
    return rows, columns


def _vectors(tensor: Tensor) -> Vectors:
    """A tensor (B or 1, …) as int32, bool as bytes."""
    tensor = tensor.to(torch.uint8 if tensor.dtype == torch.bool else torch.int32).contiguous()
    if tensor[0].numel() == 1:
        # Triton makes a stride of 1 a constant, and loses the tuple that has it. What stands there twice, as a row's
        # one drawn block, says what it says once.
        tensor = torch.cat((tensor, tensor), -1)
    return Vectors(tensor, tensor.stride(0) if len(tensor) > 1 else 0)


# --- masks and positions ---------------------------------------------------------------------------------------------


def _of_masks(inputs: Tensors, options: AttentionOptions) -> Sight:
    pattern, T, S = options.pattern, inputs["q"].shape[1], inputs["k"].shape[1]
    i, j = positions(inputs)
    mask, ids = inputs.get("attention_mask"), inputs.get("segment_ids")
    indexed = "q_positions" not in inputs and "kv_segment_ids" not in inputs
    index = torch.arange(S - T, S, device=i.device)[None]
    begin, stop = torch.full_like(i, -FAR), torch.full_like(i, FAR)
    if indexed:
        begin, stop = torch.zeros_like(index), torch.full_like(index, S)
        if ids is not None:
            begin, stop = _runs(ids)
    if mask is not None:
        stop = torch.where(query_mask(mask, T, S), stop, -FAR)
    column = index if indexed else i
    if indexed and T > S:  # queries before the first key stand before the first that is real, however far that lies
        column = torch.where(index < 0, index + (S - 1 - j[:, -1:]), index)
    table = row_table(pattern, i, column, begin, stop)
    rows, columns = _described(pattern, options.layer, table, i, j, sequence_lengths(inputs, pattern, j))
    if mask is not None:
        columns = columns._replace(real=_vectors(mask))
    if indexed:
        ranges = _Ranges.of(table, S, near=rows.classes is None and rows.drawn is None, whole=mask is None)
        return Sight(False, rows, columns, Window(None, None), ranges.keys, ranges.queries)
    columns = columns._replace(positions=_vectors(j))
    if ids is not None:
        own, met = _numbered(ids, inputs.get("kv_segment_ids", ids))
        rows = rows._replace(segments=_vectors(own))
        columns = columns._replace(segments=_vectors(met))

    def all_of(length: int) -> MeetingOf:
        def meeting(own: int, met: int) -> Meeting:
            last = triton.cdiv(length, met)
            table = torch.zeros(BOUNDS, dtype=torch.int32, device=i.device)
            table[3:] = last  # [0, last), of which no tile is whole
            return Meeting(None, table, 0, 0)

        return meeting

    return Sight(False, rows, columns, Window(None, None), all_of(S), all_of(T))


def _numbered(*ids: Tensor) -> tuple[Tensor, ...]:
    """Ids of 64 bits, each (B, n), as numbers from 0 on that are equal where they are."""
    ordered, place = torch.cat(ids, 1).sort(1)
    numbers = pad((ordered[:, 1:] != ordered[:, :-1]).cumsum(1), (1, 0))
    return torch.empty_like(numbers).scatter_(1, place, numbers).split([each.shape[1] for each in ids], 1)


def _runs(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Where the run of equal ids begins that each token (B, T) is in, and where it ends."""
    T = ids.shape[1]
    index = torch.arange(T, device=ids.device)
    turns = ids[:, 1:] != ids[:, :-1]
    begin = torch.where(pad(turns, (1, 0)), index, 0).cummax(1).values
    stop = torch.where(pad(turns, (0, 1)), index + 1, T).flip(1).cummin(1).values.flip(1)
    return begin, stop


@dataclass(frozen=True)
class _Ranges:
    """What every query sees, as ranges of columns (B or 1, T): at least the columns that it sees, each once."""

    S: int
    begin: Tensor
    """of the columns it sees because they are global"""
    global_end: Tensor
    first: Tensor
    """of the others"""
    last: Tensor
    whole: bool
    """whether it sees all of them"""

    @classmethod
    def of(cls, table: Tensor, S: int, *, near: bool, whole: bool) -> _Ranges:
        """From a table of rows. `near`: low and high bound what is seen beside global columns; `whole`: all of that is
        seen."""
        begin, stop, low, high, global_end, _ = table.unbind(1)
        first, last = torch.maximum(begin, low if near else begin), torch.minimum(stop, high if near else stop)
        return cls(S, begin, torch.minimum(global_end, stop), first, last, near and whole)

    def keys(self, own: int, met: int) -> Meeting:
        limit = triton.cdiv(self.S, met)
        begin, global_end, first, last, full_first, full_last = self._summary(own).unbind(-1)
        last = (-(-last // met)).clamp(0, limit)
        first = torch.minimum((first // met).clamp(min=0), last)
        full_first = torch.minimum(torch.maximum(-(-full_first // met), first), last)
        full_last = torch.minimum(full_last // met, last)
        empty = full_last <= full_first
        full_first, full_last = torch.where(empty, last, full_first), torch.where(empty, last, full_last)
        global_last = torch.minimum((-(-global_end // met)).clamp(min=0), first)
        global_first = torch.minimum((begin // met).clamp(min=0), global_last)
        bounds = torch.stack((global_first, global_last, first, full_first, full_last, last), -1).int()
        return Meeting(None, bounds, bounds.stride(0) if len(bounds) > 1 else 0, BOUNDS)

    def queries(self, own: int, met: int) -> Meeting:
        summary = self._summary(met).contiguous()
        sequences, tiles, _ = summary.shape
        keys = triton.cdiv(self.S, own)
        bounds = torch.empty(sequences, keys, BOUNDS, dtype=torch.int32, device=summary.device)
        turn_kernel[(keys, sequences)](summary, bounds, tiles, self.S, own, BLOCK=256)
        return Meeting(None, bounds, bounds.stride(0) if sequences > 1 else 0, BOUNDS)

    def _summary(self, size: int) -> Tensor:
        """Of tiles of `size` queries (B or 1, tiles, 6), int32: the ranges of global and of other columns that some of
        their queries see, and that of the others that all see."""
        some, globals_ = self.first < self.last, self.begin < self.global_end
        first, last = (self.first, self.last) if self.whole else (FAR, -FAR)
        fields = (
            (torch.where(globals_, self.begin, FAR), torch.amin, FAR),
            (torch.where(globals_, self.global_end, -FAR), torch.amax, -FAR),
            (torch.where(some, self.first, FAR), torch.amin, FAR),
            (torch.where(some, self.last, -FAR), torch.amax, -FAR),
            (first + torch.zeros_like(self.first), torch.amax, -FAR),
            (last + torch.zeros_like(self.last), torch.amin, FAR),
        )
        missing = -self.first.shape[1] % size
        found = [
            reduce(pad(field, (0, missing), value=fill).unflatten(1, (-1, size)), 2) for field, reduce, fill in fields
        ]
        return torch.stack(found, 2)


@triton.jit
def turn_kernel(summary, bounds, tiles, S, SIZE, BLOCK: tl.constexpr):
    """Summaries of tiles of queries → for a tile of SIZE keys, the bounds of those that see it."""
    number, b = tl.program_id(0), tl.program_id(1)
    start, stop = number * SIZE, tl.minimum(number * SIZE + SIZE, S)
    first, last, full_first, full_last, full_count = tiles, 0, tiles, 0, 0
    for chunk in range(0, tiles, BLOCK):
        t = chunk + tl.arange(0, BLOCK)
        at = summary + (b * tiles + t) * 6
        there = t < tiles
        some = (tl.load(at, mask=there, other=stop) < stop) & (tl.load(at + 1, mask=there, other=0) > start)
        some |= (tl.load(at + 2, mask=there, other=stop) < stop) & (tl.load(at + 3, mask=there, other=0) > start)
        every = (tl.load(at + 4, mask=there, other=stop) <= start) & (tl.load(at + 5, mask=there, other=0) >= stop)
        first = tl.minimum(first, tl.min(tl.where(some, t, tiles), 0))
        last = tl.maximum(last, tl.max(tl.where(some, t + 1, 0), 0))
        full_first = tl.minimum(full_first, tl.min(tl.where(every, t, tiles), 0))
        full_last = tl.maximum(full_last, tl.max(tl.where(every, t + 1, 0), 0))
        full_count += tl.sum(every.to(tl.int32), 0)
    last = tl.maximum(last, first)
    # whole tiles that do not follow one another are masked like others
    none = (full_count == 0) | (full_last - full_first != full_count)
    at = bounds + (b * tl.num_programs(0) + number) * 6
    tl.store(at, 0)
    tl.store(at + 1, 0)
    tl.store(at + 2, first)
    tl.store(at + 3, tl.where(none, last, full_first))
    tl.store(at + 4, tl.where(none, last, full_last))
    tl.store(at + 5, last)
