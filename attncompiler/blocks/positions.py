"""Positions of tokens inside their segments, and along a decode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attncompiler.errors import InputError, fail


def segment_positions(attention_mask: Tensor | None, segment_ids: Tensor | None, length: int) -> Tensor:
    """Positions (B, S) of tokens inside their segment, counted from the segment's first real token.

    `attention_mask` (B, S) bool, True for real tokens; `segment_ids` (B, S), equal ids being one contiguous run.
    A padded token's position means nothing. Reads no value on the host.
    """
    given = attention_mask if attention_mask is not None else segment_ids
    assert given is not None
    index = torch.arange(length, device=given.device)
    real = torch.ones_like(given, dtype=torch.int64) if attention_mask is None else attention_mask.long()
    starts = torch.zeros_like(real, dtype=torch.bool)
    starts[:, :1] = True
    if segment_ids is not None:
        starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    count = real.cumsum(1)
    before_segment = torch.where(starts, count - real, 0).cummax(1).values
    first = (real > 0) & (count - before_segment == 1)
    return index - torch.where(first, index, 0).cummax(1).values


class Positions(nn.Module):
    """Position ids (B or 1, T) for rotary and learned positions: those given, else counted inside each segment."""

    def forward(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """`tokens` is (B, T) or (B, T, M); only its length counts."""
        if position_ids is not None:
            return position_ids
        if attention_mask is None and segment_ids is None:
            return torch.arange(tokens.shape[1], device=tokens.device)[None]
        mask = None if attention_mask is None else attention_mask != 0
        # a padded token's position means nothing, but must be a row of a table of learned positions
        return segment_positions(mask, segment_ids, tokens.shape[1]).clamp(min=0)


class StepPositions(nn.Module):
    """The part of a decode state that belongs to no layer: how many tokens it has seen, and the next position."""

    def forward(self, tokens: Tensor, state: dict[str, Any], attention_mask: Tensor | None = None) -> dict[str, Any]:
        """Position ids (B, T) of the new tokens and the state after them. Raises InputError (E502) when it is full."""
        B, T = tokens.shape[:2]
        seen = state["seen"] + T
        if seen > state["max_length"]:
            raise fail(
                InputError,
                "E502",
                f"the state holds {state['max_length']} tokens, and this step would make it {seen}",
                remedy="call init_state with a larger max_length",
            )
        if attention_mask is None:
            ranks = torch.arange(T, device=tokens.device).expand(B, T)
            count: Tensor | int = T
        else:
            real = (attention_mask != 0).long()
            ranks = (real.cumsum(1) - 1).clamp(min=0)
            count = real.sum(1)
        position = state["position"]
        return {
            "position_ids": position[:, None] + ranks,
            "position": position + count,
            "seen": seen,
            "max_length": state["max_length"],
        }
