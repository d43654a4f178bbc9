"""Which keys a query sees, as boolean tensors: the patterns' formulas, segments and padding, written once.

Shapes: positions (B or 1, T) and (B or 1, S); masks (B or 1, T, S), True where the query sees the key.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attncompiler.blocks.positions import segment_positions
from attncompiler.mechanisms.attention.pattern import Causal, Full, SlidingWindow
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


def pattern_visible(pattern: object, i: Tensor, j: Tensor) -> Tensor:
    """The pattern's formula on broadcast positions i (…, T, 1) and j (…, 1, S)."""
    match pattern:
        case Full():
            return torch.ones_like(i >= j)
        case Causal():
            return j <= i
        case SlidingWindow(window=window, global_tokens=globals_, causal=True):
            return (j <= i) & ((i - j < window) | (j < globals_))
        case SlidingWindow(window=window, global_tokens=globals_):
            return ((i - j).abs() < window) | (j < globals_) | (i < globals_)
    raise TypeError(f"the pattern {pattern!r} is not built")


def visible(inputs: Tensors, pattern: object, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
    """The mask (B or 1, T, S) of a call, or the part of it given by a range of queries and one of keys."""
    q_positions, kv_positions = positions(inputs)
    T, S = inputs["q"].shape[1], inputs["k"].shape[1]
    seen = pattern_visible(pattern, q_positions[:, rows, None], kv_positions[:, None, columns])
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
