"""Normalisation over the model width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467): x / rms(x) · weight.

    The mean of squares is taken in fp32 for lower dtypes. x (…, width) → (…, width), in x's dtype.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)

    def initial_value(self, name: str, generator: torch.Generator) -> Tensor:
        return torch.ones(self.weight.shape)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class LayerNorm(nn.Module):
    """Layer norm with weight and bias (Ba et al. 2016, https://arxiv.org/abs/1607.06450). x (…, width) → (…, width)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)

    def initial_value(self, name: str, generator: torch.Generator) -> Tensor:
        return torch.ones(self.weight.shape) if name == "weight" else torch.zeros(self.bias.shape)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class L2Norm(nn.Module):
    """x / |x| along the last axis, without a weight. x (…, width) → (…, width)."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1, eps=self.eps)


def make_norm(kind: str, width: int, eps: float) -> nn.Module:
    """The norm of that kind: "rmsnorm" or "layernorm"."""
    return {"rmsnorm": RMSNorm, "layernorm": LayerNorm}[kind](width, eps)
