"""Padded sequences, moved so that their first real token stands at column 0 of the projections."""

from __future__ import annotations

import torch
from torch import Tensor


def columns(attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Which token (B, S) each column reads, and whether (B, S) that is a real one.

    `attention_mask` (B, S) bool. Column j reads token first + j, `first` being the sequence's first real token. Reads
    no value on the host.
    """
    length = attention_mask.shape[1]
    first = attention_mask.int().argmax(1, keepdim=True)
    index = first + torch.arange(length, device=attention_mask.device)
    inside = index < length
    index = index.clamp(max=length - 1)
    return index, attention_mask.gather(1, index) & inside


def query_mask(attention_mask: Tensor, queries: int) -> Tensor:
    """Which queries (B, T) are real: the last query stands at the last key."""
    return attention_mask[:, attention_mask.shape[1] - queries :]
