"""Mamba-2's decode state: the convolution's last inputs and the heads' states, of one size at any length."""

from __future__ import annotations

import torch
from torch import Tensor

from attncompiler.mechanisms.mamba2.mechanism import Mamba2Policy
from attncompiler.runtime.context import MixerContext


def init_state(
    policy: Mamba2Policy, context: MixerContext, batch: int, max_length: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """No tokens yet: conv (B, E + 2·G·N, W−1) in `dtype`, ssm (B, H, P, N) in fp32 (fp64 for fp64)."""
    M, N = context.hidden_size, policy.state_size
    wide = torch.promote_types(dtype, torch.float32)
    channels = policy.channels(M) + 2 * policy.n_groups * N
    return {
        "conv": torch.zeros(batch, channels, policy.conv_kernel - 1, device=device, dtype=dtype),
        "ssm": torch.zeros(batch, policy.heads(M), policy.head_dim, N, device=device, dtype=wide),
    }
