"""Attention with linear biases (Press et al. 2022, https://arxiv.org/abs/2108.12409): the slope of each head."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Alibi(nn.Module):
    """Slopes 2^(−8h / H) for h = 1 … H, where H is a power of two.

    Otherwise those of the next smaller power n, and then every other one of those of 2n, from the first, as the
    paper's code has it. Made from whole numbers on the device at hand, so there is nothing to store or to move.
    """

    def __init__(self, heads: int):
        super().__init__()
        self.heads = heads

    def forward(self, example: Tensor) -> Tensor:
        """(H,) in fp32, fp64 where the example is, on its device."""
        dtype = torch.promote_types(example.dtype, torch.float32)
        n = 2 ** (self.heads.bit_length() - 1)
        first = torch.arange(1, n + 1, device=example.device, dtype=dtype) / n
        rest = (torch.arange(self.heads - n, device=example.device, dtype=dtype) * 2 + 1) / (2 * n)
        return torch.exp2(-8 * torch.cat([first, rest]))

    def extra_repr(self) -> str:
        return f"{self.heads} heads"
