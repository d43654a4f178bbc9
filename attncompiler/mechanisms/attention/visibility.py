"""Which keys a query sees, as boolean tensors: the patterns' formulas, segments and padding, written once.

Shapes: positions (B or 1, T) and (B or 1, S); masks (B or 1, T, S), True where the query sees the key.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from attncompiler.blocks.positions import segment_positions
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
from attncompiler.mechanisms.attention.random_blocks import drawn, drawn_range
from attncompiler.runtime.implementation import Tensors


def positions(inputs: Tensors) -> tuple[Tensor, Tensor]:
    """Positions of queries and keys: those given, else with the last query aligned to the last key."""
    q, k = inputs["q"], inputs["k"]
    T, S = q.shape[1], k.shape[1]
    if "q_positions" in inputs:
        return inputs["q_positions"], inputs["kv_positions"]
    mask, segments = inputs.get("attention_mask"), inputs.get("kv_segment_ids", inputs.get("segment_ids"))
    if mask is None and segments is None:
        index = torch.arange(S - T, S, device=q.device) if T > S else None
        keys = torch.arange(S, device=q.device)[None]
        return (keys[:, S - T :] if index is None else index[None]), keys
    keys = segment_positions(mask, segments, S)
    if T <= S:
        return keys[:, S - T :], keys
    before = torch.arange(S - T, 0, device=q.device).expand(keys.shape[0], -1)
    return torch.cat([before, keys], 1), keys


def pattern_visible(pattern: Pattern, i: Tensor, j: Tensor, *, layer: int = 0, lengths: Tensor | None = None) -> Tensor:
    """The pattern's formula on broadcast positions i (…, T, 1) and j (…, 1, S).

    `random` reads the layer and, where it is not causal, how many keys each query's sequence has: `lengths` (…, T, 1).
    """
    match pattern:
        case Full():
            return torch.ones_like(i >= j)
        case Causal():
            return j <= i
        case SlidingWindow(window=window, global_tokens=globals_, causal=True):
            return (j <= i) & ((i - j < window) | (j < globals_))
        case SlidingWindow(window=window, global_tokens=globals_):
            return ((i - j).abs() < window) | (j < globals_) | (i < globals_)
        case Chunked(chunk=chunk):
            return (j <= i) & (i // chunk == j // chunk)
        case Strided(block_size=size, stride=stride, window=window):
            distance = (i // size - j // size).abs()
            seen = (distance < window) | (distance % stride == 0)
        case LocalGlobal(block_size=size) | Random(block_size=size):
            row, column = i // size, j // size
            seen = ((row - column).abs() < pattern.local_blocks) | (column < pattern.global_blocks)
            if not pattern.causal:
                seen = seen | (row < pattern.global_blocks)
            if isinstance(pattern, Random):
                seen = seen | _drawn(pattern, row, column, layer, lengths)
    return (j <= i) & seen if pattern.causal else seen


def _drawn(pattern: Random, row: Tensor, column: Tensor, layer: int, lengths: Tensor | None) -> Tensor:
    """Whether the block `row` (…, T, 1) of queries sees the block `column` (…, 1, S) of keys by chance."""
    if not (row.numel() and column.numel()):
        return torch.zeros(torch.broadcast_shapes(row.shape, column.shape), dtype=torch.bool, device=row.device)
    blocks = torch.zeros_like(row) if pattern.causal else -(-_given(lengths) // pattern.block_size)
    (first, last), (low, high), (least, most) = ((int(each.min()), int(each.max())) for each in (row, column, blocks))
    if least == most and last - first < row.numel():
        found, number = drawn_range(pattern, layer, first, last, most).to(row.device), row - first
    else:
        pairs = torch.stack([row, blocks.expand_as(row)], -1).flatten(0, -2)
        pairs, number = pairs.unique(dim=0, return_inverse=True)
        found, number = drawn(pattern, layer, *pairs.unbind(1)), number.view(row.shape)
    # one column more, for draws that there are not and for those that are not asked about
    table = torch.zeros(len(found), high - low + 2, dtype=torch.bool, device=row.device)
    table.scatter_(1, found.sub(low).masked_fill_((found < low) | (found > high), high - low + 1), True)
    return table[number, column - low]


def _given(lengths: Tensor | None) -> Tensor:
    if lengths is None:
        raise TypeError("a random pattern that is not causal is read with the lengths of its sequences")
    return lengths


def sequence_lengths(inputs: Tensors, pattern: Pattern, kv_positions: Tensor) -> Tensor | None:
    """How many keys the sequence of each query has (B or 1, T), from its first real one to its last.

    None where no pattern asks. A sequence is a run of equal segment ids; with given positions it is the whole row.
    """
    if pattern.causal or not isinstance(pattern, Random):
        return None
    T, S = inputs["q"].shape[1], inputs["k"].shape[1]
    mask = inputs.get("attention_mask")
    ends = kv_positions + 1 if mask is None else torch.where(mask, kv_positions + 1, 0)
    segments = inputs.get("kv_segment_ids", inputs.get("segment_ids"))
    if "q_positions" in inputs or segments is None:
        return ends.amax(1, keepdim=True).expand(-1, T)
    run = pad((segments[:, 1:] != segments[:, :-1]).cumsum(1), (1, 0))
    longest = torch.zeros_like(run).scatter_reduce(1, run, ends.expand_as(run), "amax").gather(1, run)
    return longest[:, S - T :] if T <= S else torch.cat([longest[:, :1].expand(-1, T - S), longest], 1)


def visible(
    inputs: Tensors, pattern: Pattern, rows: slice = slice(None), columns: slice = slice(None), *, layer: int = 0
) -> Tensor:
    """The mask (B or 1, T, S) of a call, or the part of it given by a range of queries and one of keys."""
    q_positions, kv_positions = positions(inputs)
    T, S = inputs["q"].shape[1], inputs["k"].shape[1]
    lengths = sequence_lengths(inputs, pattern, kv_positions)
    seen = pattern_visible(
        pattern,
        q_positions[:, rows, None],
        kv_positions[:, None, columns],
        layer=layer,
        lengths=None if lengths is None else lengths[:, rows, None],
    )
    if "segment_ids" in inputs:
        keys = inputs.get("kv_segment_ids", inputs["segment_ids"])
        seen = seen & (inputs["segment_ids"][:, rows, None] == keys[:, None, columns])
    if "attention_mask" in inputs:
        mask = inputs["attention_mask"]
        seen = seen & mask[:, None, columns] & query_mask(mask, T, S)[:, rows, None]
    return seen


def query_mask(attention_mask: Tensor, T: int, S: int) -> Tensor:
    """Which queries are real (B, T): query t reads mask[S − T + t]; one before the first key counts as real."""
    if T <= S:
        return attention_mask[:, S - T :]
    return torch.nn.functional.pad(attention_mask, (T - S, 0), value=True)
