"""Attention's decode state: every key and value so far, with their positions and which of them are real.

The cache grows by concatenation: exact for every pattern, and linear in the length for all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attncompiler.mechanisms.attention.mechanism import AttentionPolicy
from attncompiler.runtime.context import MixerContext


def init_state(
    policy: AttentionPolicy,
    context: MixerContext,
    batch: int,
    max_length: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """An empty cache: k (B, 0, K, D), v (B, 0, K, V), mask and positions (B, 0)."""
    return {
        "k": torch.empty(batch, 0, policy.kv_heads, policy.key_width(context.hidden_size), device=device, dtype=dtype),
        "v": torch.empty(
            batch, 0, policy.kv_heads, policy.value_width(context.hidden_size), device=device, dtype=dtype
        ),
        "mask": torch.empty(batch, 0, device=device, dtype=torch.bool),
        "positions": torch.empty(batch, 0, device=device, dtype=torch.int64),
    }


def extend(
    state: dict[str, Tensor], k: Tensor, v: Tensor, positions: Tensor, attention_mask: Tensor | None
) -> dict[str, Tensor]:
    """The cache with the keys and values (B, T, K, ·) of T new tokens behind those it has."""
    B, T = k.shape[:2]
    mask = torch.ones(B, T, device=k.device, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    return {
        **state,
        "k": torch.cat([state["k"].to(k.dtype), k], 1),
        "v": torch.cat([state["v"].to(v.dtype), v], 1),
        "mask": torch.cat([state["mask"], mask], 1),
        "positions": torch.cat([state["positions"], positions.expand(B, T)], 1),
    }
