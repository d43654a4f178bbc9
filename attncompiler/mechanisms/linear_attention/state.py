"""Linear attention's decode state: sums over all tokens so far, of one size whatever their number."""

from __future__ import annotations

import torch
from torch import Tensor

from attncompiler.errors import InputError, fail
from attncompiler.mechanisms.linear_attention.mechanism import LinearAttentionPolicy
from attncompiler.runtime.context import MixerContext


def init_state(
    policy: LinearAttentionPolicy,
    context: MixerContext,
    batch: int,
    max_length: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Sums of nothing: s (B, H, D, V), z (B, H, D) and m (B, H), in fp32, or fp64 for fp64.

    Raises InputError (E503) for a policy that is not causal: its first output depends on the last token.
    """
    if not policy.causal:
        raise fail(
            InputError,
            "E503",
            f"{context.label}: linear_attention with causal: false reads the whole sequence before its first output",
            remedy="run the model on whole sequences",
        )
    wide = torch.promote_types(dtype, torch.float32)
    H, D = policy.num_attention_heads, policy.key_width(context.hidden_size)
    V = policy.value_width(context.hidden_size)
    return {
        "s": torch.zeros(batch, H, D, V, device=device, dtype=wide),
        "z": torch.zeros(batch, H, D, device=device, dtype=wide),
        "m": torch.zeros(batch, H, device=device, dtype=wide),
    }
