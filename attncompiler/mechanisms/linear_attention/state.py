"""Linear attention's decode state: sums over all tokens so far, of one size whatever their number."""

from __future__ import annotations

import math

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
    """Sums of nothing: s (B, H, R, V), z (B, H, R) and m (B, H), in fp32, or fp64 for fp64.

    Favor's m is the logarithm of the largest feature so far: −∞ before the first.

    Raises InputError (E503) for a policy that is not causal: its first output depends on the last token.
    """
    if not policy.causal:
        raise fail(
            InputError,
            "E503",
            f"{context.chain.label}: linear_attention with causal: false reads the whole sequence before its first "
            "output",
            remedy="run the model on whole sequences",
        )
    wide = torch.promote_types(dtype, torch.float32)
    H, R = policy.num_attention_heads, policy.feature_count(context.hidden_size)
    V = policy.value_width(context.hidden_size)
    nothing = -math.inf if policy.feature_map == "favor" else 0.0
    return {
        "s": torch.zeros(batch, H, R, V, device=device, dtype=wide),
        "z": torch.zeros(batch, H, R, device=device, dtype=wide),
        "m": torch.full((batch, H), nothing, device=device, dtype=wide),
    }
