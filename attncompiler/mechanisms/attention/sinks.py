"""A sink: a key without a value, one for each head, that only the softmax's denominator knows (Xiao et al. 2024,
https://arxiv.org/abs/2309.17453; learned as in GPT-OSS). It joins when all keys have been met, whatever met them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def join(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """out (B, T, H, V) and lse (B, H, T) of the keys alone, sinks (H,) → both with the sink.

    A row that sees no key has no sink either: out stays 0, and lse −∞.
    """
    joined = torch.logaddexp(lse, _by_row(sinks, lse)).masked_fill(lse == -torch.inf, -torch.inf)
    share = (lse - joined.masked_fill(joined == -torch.inf, 0.0)).exp()
    return (out * share.transpose(1, 2)[..., None]).to(out.dtype), joined


def gradient(sinks: Tensor, out: Tensor, lse: Tensor, dout: Tensor) -> Tensor:
    """The gradient of the sinks (H,), from the results with them: −Σ exp(sink − lse) · (dout · out)."""
    return gradient_of(sinks, lse, torch.linalg.vecdot(dout.to(lse.dtype), out.to(lse.dtype)).transpose(1, 2))


def gradient_of(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """The same from delta (B, H, T), the sums of dout · out over V."""
    weight = (_by_row(sinks, lse) - lse.masked_fill(lse == -torch.inf, torch.inf)).exp()
    return -(weight * delta).sum((0, 2))


def _by_row(sinks: Tensor, lse: Tensor) -> Tensor:
    return sinks.to(lse.dtype)[:, None].expand_as(lse)
