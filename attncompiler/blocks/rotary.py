"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attncompiler.mechanisms.base import RopeParameters


class Rotary(nn.Module):
    """Turns pairs of a head's channels by position · theta^(−2i / width), the first `partial` share of them.

    Pairs are (i, i + width/2) as in HF's Llama, or (2i, 2i + 1) when interleaved, as in GPT-J. Angles are computed in
    fp32 from the positions themselves, so there is no table to grow, to move or to lose precision.
    """

    def __init__(self, head_dim: int, parameters: RopeParameters):
        super().__init__()
        self.width = int(head_dim * parameters.partial_rotary_factor) // 2 * 2
        self.theta = parameters.rope_theta
        self.interleaved = parameters.interleaved

    def forward(self, q: Tensor, k: Tensor, position_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """q (B, T, H, D), k (B, T, K, D), position_ids (B or 1, T), default 0 … T−1 → q and k, turned, in their dtypes."""
        if position_ids is None:
            position_ids = torch.arange(q.shape[1], device=q.device)[None]
        exponent = torch.arange(0, self.width, 2, device=q.device, dtype=torch.float32) / self.width
        angles = position_ids[..., None].float() * self.theta**-exponent
        cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
        return self._turn(q, cos, sin), self._turn(k, cos, sin)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        turned, rest = x[..., : self.width], x[..., self.width :]
        if self.interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        else:
            a, b = turned.chunk(2, -1)
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        return torch.cat([turned, rest], -1) if rest.shape[-1] else turned

    def extra_repr(self) -> str:
        return f"{self.width}, theta={self.theta:g}" + (", interleaved" if self.interleaved else "")
