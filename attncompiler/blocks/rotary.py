"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attncompiler.mechanisms.base import RopeParameters, rotary_width


class Rotary(nn.Module):
    """Turns pairs of a head's channels by position · theta^(−2i / width), the first `partial` share of them.

    Pairs are (i, i + width/2) as in HF's Llama, or (2i, 2i + 1) when interleaved, as in GPT-J. Angles are computed in
    fp32 (fp64 for fp64) from the positions themselves, so there is no table to grow or to move.
    """

    def __init__(self, head_dim: int, parameters: RopeParameters):
        super().__init__()
        self.width = int(rotary_width(parameters, head_dim)) // 2 * 2
        self.theta = parameters.rope_theta
        self.interleaved = parameters.interleaved

    def forward(self, q: Tensor, k: Tensor, position_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """q (B, T, H, D), k (B, T, K, D), position_ids (B or 1, T), default 0 … T−1 → q, k, turned, in their dtypes."""
        if position_ids is None:
            position_ids = torch.arange(q.shape[1], device=q.device)[None]
        wide = torch.promote_types(q.dtype, torch.float32)
        exponent = torch.arange(0, self.width, 2, device=q.device, dtype=wide) / self.width
        angles = position_ids[..., None].to(wide) * self.theta**-exponent
        cos, sin = angles.cos(), angles.sin()
        if self.interleaved:
            cos, sin = cos.repeat_interleave(2, -1), torch.stack([-sin, sin], -1).flatten(-2)
        else:
            cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        return self._turn(q, cos, sin), self._turn(k, cos, sin)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned, rest = x[..., : self.width], x[..., self.width :]
        cos, sin = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)
        turned = _Turn.apply(turned, cos, sin, self.interleaved)
        return torch.cat([turned, rest], -1) if rest.shape[-1] else turned

    def extra_repr(self) -> str:
        return f"{self.width}, theta={self.theta:g}" + (", interleaved" if self.interleaved else "")


class _Turn(torch.autograd.Function):
    """x · cos + swap(x) · sin, where `swap` exchanges the two of each pair and sin has the sign of the turn.

    A turn's gradient is the turn back, so nothing but the angles is kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return torch.addcmul(x * cos, _swap(x, interleaved), sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return torch.addcmul(grad * cos, _swap(grad, ctx.interleaved), sin, value=-1), None, None, None


def _swap(x: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat([second, first], -1)
