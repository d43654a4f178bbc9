"""Mamba's decode state: the convolution's last inputs and the scan's state, of one size at any length."""

from __future__ import annotations

import torch
from torch import Tensor

from attncompiler.mechanisms.mamba.mechanism import MambaPolicy
from attncompiler.runtime.context import MixerContext


def init_state(
    policy: MambaPolicy, context: MixerContext, batch: int, max_length: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """No tokens yet: conv (B, E, W−1) in `dtype`, ssm (B, E, N) in fp32 (fp64 for fp64)."""
    E = policy.channels(context.hidden_size)
    wide = torch.promote_types(dtype, torch.float32)
    return {
        "conv": torch.zeros(batch, E, policy.conv_kernel - 1, device=device, dtype=dtype),
        "ssm": torch.zeros(batch, E, policy.state_size, device=device, dtype=wide),
    }
