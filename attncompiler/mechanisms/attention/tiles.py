"""A call as blocks of queries with the ranges of keys they can see, and what is hidden inside those ranges.

Ranges come from the pattern's analysis (`intervals`), per packed segment where positions are counted anew in each; what
they hold too many is hidden by a bias, which the pattern's formulas (`visibility`) decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attncompiler.mechanisms.attention.intervals import Range, seen_by_all, seen_by_some, union
from attncompiler.mechanisms.attention.op import AttentionOptions
from attncompiler.mechanisms.attention.pattern import Causal, Full, LocalGlobal, Pattern, Random, SlidingWindow, Strided
from attncompiler.mechanisms.attention.visibility import pattern_visible, positions, query_mask, sequence_lengths
from attncompiler.runtime.implementation import Tensors

ALIGNMENT = 16
"""Ranges of keys begin and end at multiples of it: a matrix product of 383 costs up to twice that of 384."""
LEAST_ROWS = 32
"""Queries of a block, where the pattern's own blocks are no smaller: products of fewer rows do less a second."""


@dataclass(frozen=True, slots=True)
class Span:
    """A range of keys, by index; `whole` when every query of its block sees all of it."""

    start: int
    stop: int
    whole: bool = False

    def __len__(self) -> int:
        return self.stop - self.start


class Tile:
    """Spans of keys that are worked on as one, gathered one behind the other."""

    def __init__(self, spans: Sequence[Span]):
        self.spans = spans
        self.whole = all(span.whole for span in spans)
        self.slices: list[slice] = []
        """the spans, those that touch as one"""
        for span in spans:
            if self.slices and self.slices[-1].stop == span.start:
                self.slices[-1] = slice(self.slices[-1].start, span.stop)
            else:
                self.slices.append(slice(span.start, span.stop))

    def __len__(self) -> int:
        return sum(map(len, self.spans))

    def split(self, tensor: Tensor, axis: int) -> Sequence[Tensor]:
        """Views of what belongs to each span."""
        return tensor.split([len(span) for span in self.spans], axis)

    def gathered(self, tensor: Tensor) -> Tensor:
        """What a tensor (B, S, …) has in the spans: a view where they touch."""
        if len(self.slices) == 1:
            return tensor[:, self.slices[0]]
        return torch.cat([tensor[:, each] for each in self.slices], 1)

    def scattered(self, into: Tensor, tensor: Tensor) -> None:
        """Add a tensor (B, s, …), whose rows are those of the spans, to a tensor (B, S, …)."""
        start = 0
        for each in self.slices:
            stop = start + each.stop - each.start
            into[:, each] += tensor[:, start:stop]
            start = stop


@dataclass(frozen=True, slots=True)
class Block:
    """Queries `rows` of the sequences `batch`, and in order disjoint spans of keys that hold every key they see."""

    batch: slice
    rows: slice
    columns: tuple[Span, ...]

    @property
    def length(self) -> int:
        return self.rows.stop - self.rows.start

    def tiles(self, size: int) -> Iterator[Tile]:
        """The spans in as few tiles of at most `size` keys as there can be, of about the same number of keys."""
        total = sum(map(len, self.columns))
        if not total:
            return
        even = -(-total // -(-total // size))
        size = min(size, even + -even % ALIGNMENT)
        tile: list[Span] = []
        room = size
        for span in self.columns:
            start = span.start
            while start < span.stop:
                stop = min(span.stop, start + room)
                tile.append(Span(start, stop, span.whole))
                start, room = stop, room - (stop - start)
                if not room:
                    yield Tile(tile)
                    tile, room = [], size
        if tile:
            yield Tile(tile)


def parts(start: int, stop: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` from start to stop."""
    return (slice(at, min(at + size, stop)) for at in range(start, stop, size))


# --- which keys a block of queries can see --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Run:
    """A segment of one sequence, by key index: where it begins and ends, and where its real tokens do."""

    begin: int
    end: int
    first: int
    last: int


def blocks(inputs: Tensors, view: View, batches: Sequence[slice], size: int) -> Iterator[Block]:
    """Every query of every sequence once, in blocks of at most `size`.

    Ranges follow from indices where those say what is seen, from positions where those alone do; where neither does,
    a block has all keys.
    """
    T, S = inputs["q"].shape[1], inputs["k"].shape[1]
    segments, padding = "segment_ids" in inputs, "attention_mask" in inputs
    aligned = "q_positions" not in inputs and (T <= S or not (segments or padding))
    if aligned and "kv_segment_ids" in inputs:
        aligned = torch.equal(inputs["segment_ids"], inputs["kv_segment_ids"][:, S - T :])
    if not aligned:
        for batch in batches:
            yield from (Block(batch, rows, (Span(0, S),)) for rows in parts(0, T, size))
        return
    pattern, layer, before = view.pattern, view.layer, S - T
    size = _rows(pattern, size)
    if segments or (padding and not _moves_along(pattern)):
        for b, runs in enumerate(_runs(inputs)):
            for rows in parts(0, T, size):
                seen = _seen_in_runs(pattern, layer, runs, rows.start + before, rows.stop - 1 + before)
                yield Block(slice(b, b + 1), rows, _spans(seen, (), S))
        return
    for rows in parts(0, T, size):
        first, last = rows.start + before, rows.stop - 1 + before
        around = seen_by_some(pattern, first, last, S, layer)
        # the pattern alone decides where there is no padding
        inside = seen_by_all(pattern, first, last, S, layer) if view.offset is not None else []
        columns = _spans(around, inside, S)
        yield from (Block(batch, rows, columns) for batch in batches)


def _rows(pattern: Pattern, size: int) -> int:
    """How many queries to a block: where keys lie scattered no more than share them, unless those are few."""
    match pattern:
        case Strided(block_size=own) if own >= LEAST_ROWS:
            return min(own, size)
        case LocalGlobal(block_size=own) if own >= 2 * LEAST_ROWS:
            return min(own, size)
        case Random(block_size=own):
            return min(-(-LEAST_ROWS // own) * own, size)
    return size


def _moves_along(pattern: Pattern) -> bool:
    """Whether the distance of two tokens decides, so that a shift of all positions changes nothing."""
    return isinstance(pattern, (Full, Causal)) or (isinstance(pattern, SlidingWindow) and not pattern.global_tokens)


def _spans(around: Sequence[Range], inside: Sequence[Range], length: int) -> tuple[Span, ...]:
    """The ranges `around`, widened to be aligned, cut where the ranges `inside` them begin and end, which are whole."""
    wider = union(((low - low % ALIGNMENT, high + -high % ALIGNMENT) for low, high in around), 0, length)
    found = []
    cuts = iter([*inside, (length, length)])
    start, stop = next(cuts)
    for low, high in wider:
        while low < high:
            if stop <= low and stop < length:
                start, stop = next(cuts)
            elif start <= low < stop:
                found.append(Span(low, min(stop, high), True))
                low = found[-1].stop
            else:
                found.append(Span(low, min(start, high) if start > low else high))
                low = found[-1].stop
    return tuple(found)


def _runs(inputs: Tensors) -> list[list[Run]]:
    """Segments with a real token, by sequence, read on the host: one's ranges would be too wide for another."""
    B, S = inputs["q"].shape[0], inputs["k"].shape[1]
    ids = inputs.get("kv_segment_ids", inputs.get("segment_ids"))
    mask = inputs.get("attention_mask")
    ids = torch.zeros(B, S, dtype=torch.int64) if ids is None else ids.cpu()
    real = torch.ones(B, S, dtype=torch.bool) if mask is None else mask.cpu()
    found = []
    for row, tokens in zip(ids, real, strict=True):
        edges = [0, *(row.diff().nonzero().flatten() + 1).tolist(), S]
        index = tokens.nonzero().flatten()
        firsts = torch.searchsorted(index, torch.tensor(edges)).tolist()
        places = index.tolist()
        found.append(
            [
                Run(begin, end, places[low], places[high - 1])
                for begin, end, low, high in zip(edges, edges[1:], firsts, firsts[1:], strict=False)
                if low < high
            ]
        )
    return found


def _seen_in_runs(pattern: Pattern, layer: int, runs: Sequence[Run], first: int, last: int) -> list[Range]:
    """What the queries of index first … last see; the index of a query is that of the key beside it."""
    found = []
    for run in runs:
        low, high = max(first, run.first), min(last, run.end - 1)
        if low <= high:
            length = run.last + 1 - run.first
            seen = seen_by_some(pattern, low - run.first, high - run.first, length, layer)
            found += [(start + run.first, stop + run.first) for start, stop in seen]
    return found


# --- what is hidden in a range of keys ------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """What decides visibility, by token: positions, and where given segments and which tokens are real."""

    pattern: Pattern
    layer: int
    q_positions: Tensor
    kv_positions: Tensor
    lengths: Tensor | None
    segments: tuple[Tensor, Tensor] | None
    real: tuple[Tensor, Tensor] | None
    offset: int | None
    """S − T where positions are plain indices and the pattern alone decides"""
    kept: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    """biases, by `_place`"""

    @classmethod
    def of(cls, inputs: Tensors, options: AttentionOptions) -> View:
        T, S = inputs["q"].shape[1], inputs["k"].shape[1]
        mask, ids = inputs.get("attention_mask"), inputs.get("segment_ids")
        plain = mask is None and ids is None and "q_positions" not in inputs
        q_positions, kv_positions = positions(inputs)
        return cls(
            options.pattern,
            options.layer,
            q_positions,
            kv_positions,
            lengths=sequence_lengths(inputs, options.pattern, kv_positions),
            segments=None if ids is None else (ids, inputs.get("kv_segment_ids", ids)),
            real=None if mask is None else (query_mask(mask, T, S), mask),
            offset=S - T if plain else None,
        )

    def biases(self, block: Block, tile: Tile, dtype: torch.dtype) -> list[Tensor | None]:
        """For each span of a tile what its scores gain, (b or 1, 1, 1, t, s): −∞ where hidden; None where nothing is.

        What is not kept from an equal span is made for all spans at once.
        """
        places = [None if span.whole else self._place(block.rows, span) for span in tile.spans]
        found: list[Tensor | None] = [None if place is None else self.kept.get(place) for place in places]
        made = [n for n, span in enumerate(tile.spans) if found[n] is None and not span.whole]
        if made:
            part = Tile([tile.spans[n] for n in made])
            hidden = self._hidden(block, part)
            # on a CPU an addition is several times faster than a fill of all heads by one mask
            bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
            for n, each in zip(made, part.split(bias, -1), strict=True):
                found[n] = each
                if (place := places[n]) is not None:
                    self.kept[place] = each
        return found

    def distances(self, block: Block, tile: Tile, dtype: torch.dtype) -> Tensor:
        """|i − j| of the positions of queries and keys, (b or 1, 1, 1, t, s)."""
        queries, keys = _pair(block, tile, self.q_positions, self.kv_positions)
        return (queries - keys).abs().to(dtype)[:, None, None]

    def _place(self, rows: slice, span: Span) -> tuple[int, ...] | None:
        """What decides a bias where the distances of tokens do, and their places in the pattern's blocks if it has any.

        None where something else does: a global token, a draw, a segment.
        """
        if self.offset is None:
            return None
        pattern, first = self.pattern, rows.start + self.offset
        size = 1
        match pattern:
            case SlidingWindow(global_tokens=tokens):
                near = min(span.start, first) >= tokens
            case Strided(block_size=size):
                near = True
            case LocalGlobal(block_size=size, global_blocks=top):
                near = min(span.start, first) >= top * size
            case Random(block_size=size, local_blocks=reach):
                last = rows.stop - 1 + self.offset
                near = pattern.causal and last // size - span.start // size < reach
            case _:
                near = isinstance(pattern, (Full, Causal))
        if not near:
            return None
        return first % size, span.start - first, rows.stop - rows.start, len(span)

    def _hidden(self, block: Block, tile: Tile) -> Tensor:
        lengths = self.lengths
        if lengths is not None:
            lengths = (lengths[block.batch] if len(lengths) > 1 else lengths)[:, block.rows, None]
        pair = _pair(block, tile, self.q_positions, self.kv_positions)
        seen = pattern_visible(self.pattern, *pair, layer=self.layer, lengths=lengths)
        if self.segments is not None:
            queries, keys = _pair(block, tile, *self.segments)
            seen = seen & (queries == keys)
        if self.real is not None:
            queries, keys = _pair(block, tile, *self.real)
            seen = seen & queries & keys
        return ~seen[:, None, None]


def _pair(block: Block, tile: Tile, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """What queries have (B or 1, T) and keys have (B or 1, S), as (b or 1, t, 1) and (b or 1, 1, s)."""
    queries = queries[block.batch] if len(queries) > 1 else queries
    keys = keys[block.batch] if len(keys) > 1 else keys
    return queries[:, block.rows, None], tile.gathered(keys)[:, None]
