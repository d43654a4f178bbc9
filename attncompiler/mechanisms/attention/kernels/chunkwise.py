"""Plain torch over blocks of queries and tiles of the keys they can see (flash attention's recurrences).

The softmax is taken online over the tiles (Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867), the
backward recomputes the probabilities from the lse (Dao et al. 2022, https://arxiv.org/abs/2205.14135, algorithm 4).
Memory is linear in the length, and so is the work under a window. Scores are in base 2, whose exponential is faster.

Shapes: g = H / K query heads read one key head; a block of t queries is (B, K, g·t, D), so that no key is repeated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attncompiler.blocks.underflow import LOG2_E, exp2_
from attncompiler.mechanisms.attention.op import AttentionOptions
from attncompiler.mechanisms.attention.pattern import Causal, Full, SlidingWindow
from attncompiler.mechanisms.attention.visibility import pattern_visible, positions, query_mask
from attncompiler.runtime.implementation import Implementation, Tensors

QUERIES = 128
KEYS = 512
ALIGNMENT = 16
"""Ranges of keys begin and end at multiples of it: a matrix product of 383 costs up to twice that of 384."""
TILE = 2**22
"""Scores that are held at once, when one sequence does not already need more: larger batches go in parts."""


@dataclass(frozen=True, slots=True)
class Block:
    """Queries `rows` of the sequences `batch`, and disjoint ranges of keys that hold every key they see."""

    batch: slice
    rows: slice
    columns: tuple[slice, ...]


# --- which keys a block of queries can see ------------------------------------------------------------------------


def _index_range(pattern: object, first: int, last: int) -> tuple[int, int]:
    """The keys, by index, that the queries of index first to last see beside global tokens; may reach over the ends."""
    match pattern:
        case Causal():
            return 0, last + 1
        case SlidingWindow(window=window, causal=causal):
            return first - window + 1, last + (1 if causal else window)
    return 0, last + 2**62


def _rows_are_global(pattern: object) -> bool:
    """Whether a query at a position below `global_tokens` (so with none, one before the first key) sees everything."""
    return isinstance(pattern, SlidingWindow) and not pattern.causal


def _global_tokens(pattern: object) -> int:
    return pattern.global_tokens if isinstance(pattern, SlidingWindow) else 0


@dataclass(frozen=True, slots=True)
class Runs:
    """The segments of one sequence, by key index: where each key's begins, ends, and has its first real token."""

    begin: Sequence[int]
    end: Sequence[int]
    first: Sequence[int]


def _runs(inputs: Tensors, kv_positions: Tensor) -> list[Runs]:
    """Segments read on the host: one sequence's ranges would be too wide for another."""
    B, S = inputs["q"].shape[0], inputs["k"].shape[1]
    index = torch.arange(S)
    ids = inputs.get("kv_segment_ids", inputs.get("segment_ids"))
    ids = torch.zeros(B, S, dtype=torch.int64) if ids is None else ids.cpu()
    change = torch.ones(B, S + 1, dtype=torch.bool)
    change[:, 1:S] = ids[:, 1:] != ids[:, :-1]
    begin = torch.where(change[:, :S], index, 0).cummax(1).values
    end = torch.where(change[:, 1:], index + 1, S).flip(1).cummin(1).values.flip(1)
    first = torch.maximum(index - kv_positions.cpu(), begin)
    return [Runs(*map(torch.Tensor.tolist, row)) for row in zip(begin, end, first, strict=True)]


def _columns(pattern: object, first: int, last: int, S: int, runs: Runs | None) -> tuple[slice, ...]:
    """Ranges of keys for the queries of index first to last; the index of a query is that of the key beside it."""
    low, high = _index_range(pattern, first, last)
    low, high = low - low % ALIGNMENT, high + -high % ALIGNMENT
    low, high = max(low, runs.begin[first] if runs else 0), min(high, runs.end[last] if runs else S)
    tokens = _global_tokens(pattern)
    if _rows_are_global(pattern):
        seeing_all = [i for i in range(first, last + 1) if i - (runs.first[i] if runs else 0) < tokens]
        if seeing_all:
            low = min(low, runs.begin[seeing_all[0]] if runs else 0)
            high = max(high, runs.end[seeing_all[-1]] if runs else S)
    if high <= low:
        return ()
    band = slice(low, high)
    # a segment that begins before the band and reaches into the block holds the band's first key: there is but one
    start = runs.first[low] if runs else 0
    stop = min(start + tokens, low)
    return (slice(start, stop), band) if stop > start else (band,)


def _blocks(inputs: Tensors, pattern: object, kv_positions: Tensor) -> Iterator[Block]:
    """Every query of every sequence once, with ranges from indices; from values too where those alone bound them."""
    T, S = inputs["q"].shape[1], inputs["k"].shape[1]
    segments, padding = "segment_ids" in inputs, "attention_mask" in inputs
    aligned = "q_positions" not in inputs and (T <= S or not (segments or padding))
    if aligned and "kv_segment_ids" in inputs:
        aligned = torch.equal(inputs["segment_ids"], inputs["kv_segment_ids"][:, S - T :])
    if not aligned:
        for batch in _parts(inputs):
            yield from (Block(batch, rows, (slice(0, S),)) for rows in _spans(0, T, QUERIES))
        return
    parts: Iterable[tuple[slice, Runs | None]] = ((batch, None) for batch in _parts(inputs))
    if segments or (padding and _global_tokens(pattern) > 0):
        parts = ((slice(b, b + 1), runs) for b, runs in enumerate(_runs(inputs, kv_positions)))
    for batch, runs in parts:
        for rows in _spans(0, T, QUERIES):
            yield Block(batch, rows, _columns(pattern, rows.start + S - T, rows.stop - 1 + S - T, S, runs))


def _parts(inputs: Tensors) -> Iterator[slice]:
    B, T, H, _ = inputs["q"].shape
    return _spans(0, B, max(1, TILE // (H * min(T, QUERIES) * min(inputs["k"].shape[1], KEYS))))


def _spans(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(at, min(at + size, stop)) for at in range(start, stop, size))


# --- one tile -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class View:
    """What decides visibility, by token: positions, and where given segments and which tokens are real."""

    pattern: object
    q_positions: Tensor
    kv_positions: Tensor
    segments: tuple[Tensor, Tensor] | None
    real: tuple[Tensor, Tensor] | None
    offset: int | None
    """S − T where positions are plain indices and the pattern alone decides"""
    biases: dict[tuple[int, int, int] | None, Tensor] = field(default_factory=dict)
    """by `_place`"""

    @classmethod
    def of(cls, inputs: Tensors, pattern: object) -> View:
        T, S = inputs["q"].shape[1], inputs["k"].shape[1]
        mask, ids = inputs.get("attention_mask"), inputs.get("segment_ids")
        plain = mask is None and ids is None and "q_positions" not in inputs
        return cls(
            pattern,
            *positions(inputs),
            segments=None if ids is None else (ids, inputs.get("kv_segment_ids", ids)),
            real=None if mask is None else (query_mask(mask, T, S), mask),
            offset=S - T if plain else None,
        )

    def bias(self, block: Block, columns: slice, dtype: torch.dtype) -> Tensor | None:
        """What a tile's scores gain, (b or 1, 1, 1, t, s): −∞ where hidden, else 0; None where all is seen."""
        if self.offset is not None and self._sees_all(block.rows, columns):
            return None
        place = self._place(block.rows, columns)
        if place in self.biases:
            return self.biases[place]
        hidden = self._hidden(block, columns)
        # on a CPU an addition is several times faster than a fill of all heads by one mask
        bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
        if place is not None:
            self.biases[place] = bias
        return bias

    def _place(self, rows: slice, columns: slice) -> tuple[int, int, int] | None:
        """What decides the bias of a tile where the distances of its tokens do: where none of them is a global one."""
        if self.offset is None or min(columns.start, rows.start + self.offset) < _global_tokens(self.pattern):
            return None
        return columns.start - rows.start, rows.stop - rows.start, columns.stop - columns.start

    def _hidden(self, block: Block, columns: slice) -> Tensor:
        batch, rows = block.batch, block.rows

        def pair(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
            queries = queries[batch] if len(queries) > 1 else queries
            keys = keys[batch] if len(keys) > 1 else keys
            return queries[:, rows, None], keys[:, None, columns]

        seen = pattern_visible(self.pattern, *pair(self.q_positions, self.kv_positions))
        if self.segments is not None:
            queries, keys = pair(*self.segments)
            seen = seen & (queries == keys)
        if self.real is not None:
            queries, keys = pair(*self.real)
            seen = seen & queries & keys
        return ~seen[:, None, None]

    def _sees_all(self, rows: slice, columns: slice) -> bool:
        assert self.offset is not None
        first, last = rows.start + self.offset, rows.stop - 1 + self.offset
        match self.pattern:
            case Full():
                return True
            case Causal():
                return columns.stop - 1 <= first
            case SlidingWindow(window=window, global_tokens=tokens, causal=True):
                return columns.stop - 1 <= first and (last - columns.start < window or columns.stop <= tokens)
            case SlidingWindow(window=window, global_tokens=tokens):
                near = last - columns.start < window and columns.stop - 1 - first < window
                return near or columns.stop <= tokens or last < tokens
        return False


def _tiles(columns: Sequence[slice]) -> Iterator[slice]:
    for part in columns:
        yield from _spans(part.start, part.stop, KEYS)


def _grouped(tensor: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """(b, t, H, D) → (b, K, g·t, D) in `dtype`."""
    return tensor.to(dtype).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _ungrouped(tensor: Tensor, length: int) -> Tensor:
    """(b, K, g·t, V) → (b, t, H, V)."""
    return tensor.unflatten(2, (-1, length)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _keys(tensor: Tensor, block: Block, columns: slice, dtype: torch.dtype) -> Tensor:
    """(B, S, K, D) → (b, K, s, D) in `dtype`."""
    return tensor[block.batch, columns].to(dtype).transpose(1, 2)


def _scores(queries: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
    """(b, K, g·t, s), −∞ where hidden."""
    scores = queries @ keys.transpose(-1, -2)
    if bias is not None:
        scores.unflatten(2, (-1, bias.shape[-2])).add_(bias)
    return scores


# --- the kernel ---------------------------------------------------------------------------------------------------


def forward(inputs: Tensors, options: AttentionOptions) -> dict[str, Tensor]:
    """q (B, T, H, D), k (B, S, K, D), v (B, S, K, V) → out (B, T, H, V), lse (B, H, T)."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    (B, T, H, D), V = q.shape, v.shape[-1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    view = View.of(inputs, options.pattern)
    out, lse = q.new_empty(B, T, H, V), q.new_empty(B, H, T, dtype=dtype)
    for block in _blocks(inputs, options.pattern, view.kv_positions):
        queries = _grouped(q[block.batch, block.rows], k.shape[2], dtype) * (options.softmax_scale(D) * LOG2_E)
        largest = queries.new_full((*queries.shape[:-1], 1), -torch.inf)
        total, weighted = torch.zeros_like(largest), queries.new_zeros(*queries.shape[:-1], V)
        for columns in _tiles(block.columns):
            weights = _scores(queries, _keys(k, block, columns, dtype), view.bias(block, columns, dtype))
            before, largest = largest, torch.maximum(largest, weights.amax(-1, keepdim=True))
            base = largest.masked_fill(largest == -torch.inf, 0.0)
            weights = exp2_(weights.sub_(base))
            kept = (before - base).exp2_()
            total = total * kept + weights.sum(-1, keepdim=True)
            weighted = weighted * kept + weights @ _keys(v, block, columns, dtype)
        length = block.rows.stop - block.rows.start
        normaliser = ((largest + total.log2()) / LOG2_E).squeeze(-1)
        lse[block.batch, :, block.rows] = normaliser.unflatten(2, (-1, length)).flatten(1, 2)
        out[block.batch, block.rows] = _ungrouped(weighted / total.masked_fill(total == 0, 1.0), length)
    return {"out": out, "lse": lse}


def backward(grads: Tensors, inputs: Tensors, outputs: Tensors, options: AttentionOptions) -> dict[str, Tensor]:
    """The gradients of q, k and v, from the probabilities that the lse gives back."""
    q, k, v, dout = inputs["q"], inputs["k"], inputs["v"], grads["out"]
    kv_heads, scale = k.shape[2], options.softmax_scale(q.shape[-1])
    dtype = torch.promote_types(q.dtype, torch.float32)
    view = View.of(inputs, options.pattern)
    dq, dk, dv = (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        _accumulator(k, dtype),
        _accumulator(v, dtype),
    )
    for block in _blocks(inputs, options.pattern, view.kv_positions):
        queries = _grouped(q[block.batch, block.rows], kv_heads, dtype) * (scale * LOG2_E)
        dweighted = _grouped(dout[block.batch, block.rows], kv_heads, dtype)
        delta = (dweighted * _grouped(outputs["out"][block.batch, block.rows], kv_heads, dtype)).sum(-1, keepdim=True)
        length = block.rows.stop - block.rows.start
        lse = outputs["lse"][block.batch, :, block.rows].unflatten(1, (kv_heads, -1)).flatten(2, 3)[..., None]
        lse = lse.masked_fill(lse == -torch.inf, torch.inf) * LOG2_E  # a row that sees nothing has only weights of 0
        dqueries = torch.zeros_like(queries)
        for columns in _tiles(block.columns):
            keys, values = _keys(k, block, columns, dtype), _keys(v, block, columns, dtype)
            weights = exp2_(_scores(queries, keys, view.bias(block, columns, dtype)).sub_(lse))
            dv[block.batch, columns] += (weights.transpose(-1, -2) @ dweighted).transpose(1, 2)
            dscores = (dweighted @ values.transpose(-1, -2)).sub_(delta).mul_(weights)
            dk[block.batch, columns] += (dscores.transpose(-1, -2) @ queries).transpose(1, 2)
            dqueries += dscores @ keys
        dq[block.batch, block.rows] = _ungrouped(dqueries.mul_(scale), length)
    return {"q": dq, "k": dk.div_(LOG2_E).to(k.dtype), "v": dv.to(v.dtype)}


def _accumulator(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(tensor.shape, dtype=dtype, device=tensor.device)


KERNEL = Implementation(forward, backward)
