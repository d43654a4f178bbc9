"""Where packed documents begin."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor


@overload
def run_numbers(segment_ids: None, attention_mask: Tensor | None = None) -> None: ...
@overload
def run_numbers(segment_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor: ...
@overload
def run_numbers(segment_ids: Tensor | None, attention_mask: Tensor | None = None) -> Tensor | None: ...
def run_numbers(segment_ids: Tensor | None, attention_mask: Tensor | None = None) -> Tensor | None:
    """Which run each token is of (B, T), counted from 0: a new one begins where a token's segment is another.

    None without segments: there is one run alone.

    `segment_ids` (B, T), equal ids being one contiguous run; `attention_mask` (B, T) bool, True for real tokens.
    Padding belongs to the run of the last real token before it, or of the first one after it, whatever its own id, so
    a run always begins at a real token. Reads no value on the host.
    """
    if segment_ids is None:
        return None
    if attention_mask is not None:
        first_real = attention_mask.int().argmax(1, keepdim=True)
        index = torch.arange(segment_ids.shape[1], device=segment_ids.device)
        segment_ids = segment_ids.gather(1, torch.where(attention_mask, index, first_real).cummax(1).values)
    starts = segment_ids[:, 1:] != segment_ids[:, :-1]
    return torch.nn.functional.pad(starts, (1, 0)).cumsum(1)
