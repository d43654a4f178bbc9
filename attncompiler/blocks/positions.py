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


def sequence_lengths(position_ids: Tensor) -> Tensor:
    """How long the sequence is that each token belongs to: position_ids (B, T) → (B, T).

    A sequence is a run in which positions rise, and its length its last position and one. Tokens at position 0 begin a
    sequence or are padding, on either side or inside: they neither end a run nor add to it, and their own length may be
    that of the run before them. Reads no value on the host.
    """
    counted = position_ids > 0
    index = torch.arange(position_ids.shape[1], device=position_ids.device)
    latest = position_ids.gather(1, torch.where(counted, index, 0).cummax(1).values)
    starts = counted[:, 1:] & (position_ids[:, 1:] <= latest[:, :-1])
    run = nn.functional.pad(starts, (1, 0)).cumsum(1)
    return torch.zeros_like(position_ids).scatter_reduce(1, run, position_ids, "amax").gather(1, run) + 1


def check_inputs(tokens: Tensor, **others: Tensor | None) -> None:
    """One check at a model's door. Raises InputError: E401 shapes, E402 ids that are not whole numbers."""
    if tokens.dim() not in (2, 3):
        raise fail(
            InputError, "E401", f"a model takes tokens (B, T) or embeddings (B, T, M), not {tuple(tokens.shape)}"
        )
    if (tokens.dim() == 2) == tokens.is_floating_point():
        raise fail(InputError, "E402", f"tokens must be whole numbers and embeddings floating, not {tokens.dtype}")
    B, T = tokens.shape[:2]
    for name, tensor in others.items():
        if tensor is None:
            continue
        # one by one: torch 2.11 to 2.13 compile `in` to False for a batch of any size among ones of a fixed size
        one_for_all = name == "position_ids" and tensor.dim() == 2 and tensor.shape[0] == 1
        if tensor.dim() != 2 or not (one_for_all or tensor.shape[0] == B) or tensor.shape[1] != T:
            raise fail(InputError, "E401", f"{name} must be ({B}, {T}) as the tokens are, not {tuple(tensor.shape)}")
        if name != "attention_mask" and tensor.is_floating_point():
            raise fail(InputError, "E402", f"{name} must be whole numbers, not {tensor.dtype}")


def no_position(limit: int, wanted: int) -> Exception:
    """The error (E401) of a sequence that is longer than there are positions, to be raised."""
    return fail(
        InputError,
        "E401",
        f"the model has {limit} learned positions, and {wanted} are asked for",
        remedy="shorten the sequences, or raise model.max_position_embeddings and train",
    )


class Positions(nn.Module):
    """Position ids (B or 1, T) for rotary and learned positions: those given, else counted inside each segment.

    `limit` is how many learned positions there are, None where there are none.
    """

    def __init__(self, limit: int | None = None):
        super().__init__()
        self.limit = limit

    def forward(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """`tokens` is (B, T), whole numbers, or (B, T, M); only its size counts.

        Raises InputError: E401 for shapes that do not fit the tokens, or more tokens than the limit; E402 for ids that
        are not whole numbers.
        """
        check_inputs(tokens, attention_mask=attention_mask, position_ids=position_ids, segment_ids=segment_ids)
        if position_ids is not None:
            return position_ids
        if attention_mask is None and segment_ids is None:
            if self.limit is not None and not torch.compiler.is_compiling() and tokens.shape[1] > self.limit:
                raise no_position(self.limit, tokens.shape[1])
            return torch.arange(tokens.shape[1], device=tokens.device)[None]
        mask = None if attention_mask is None else attention_mask != 0
        found = segment_positions(mask, segment_ids, tokens.shape[1])
        return found if mask is None else found.masked_fill(~mask, 0)  # padding needs no position of its own


class StepPositions(nn.Module):
    """The part of a decode state that belongs to no layer: how many tokens it has seen, and the next position."""

    def forward(self, tokens: Tensor, state: dict[str, Any], attention_mask: Tensor | None = None) -> dict[str, Any]:
        """Position ids (B, T) of the new tokens and the state after them.

        Raises InputError: E502 when the state is full, E401 and E402 for tokens and masks that do not fit it.
        """
        check_inputs(tokens, attention_mask=attention_mask)
        B, T = tokens.shape[:2]
        if state["position"].shape[0] != B:
            raise fail(
                InputError, "E401", f"the state is for {state['position'].shape[0]} sequences, and {B} were given"
            )
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
            ranks = real.cumsum(1) - 1
            count = real.sum(1)
        position = state["position"]
        position_ids = position[:, None] + ranks
        return {
            "position_ids": position_ids
            if attention_mask is None
            else position_ids.masked_fill(attention_mask == 0, 0),
            "position": position + count,
            "seen": seen,
            "max_length": state["max_length"],
        }
