"""Packed segments as runs: one number per token, so that two tokens may meet exactly where the numbers agree."""

from __future__ import annotations

import torch
from torch import Tensor


def run_numbers(segment_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
    """Number of each token's run (B, T), counted from 0 and never falling; None where there is one run alone.

    `segment_ids` (B, T), equal ids being one contiguous run; `attention_mask` (B, T) bool. Padding belongs to the run
    of the last real token before it, or of the first one, whatever its own id: it cannot reset a state. Reads no
    value on the host.
    """
    if segment_ids is None:
        return None
    if attention_mask is not None:
        first_real = attention_mask.int().argmax(1, keepdim=True)
        index = torch.arange(segment_ids.shape[1], device=segment_ids.device)
        last_real = torch.where(attention_mask, index, first_real).cummax(1).values
        segment_ids = segment_ids.gather(1, last_real)
    starts = segment_ids[:, 1:] != segment_ids[:, :-1]
    return torch.nn.functional.pad(starts, (1, 0)).cumsum(1)
