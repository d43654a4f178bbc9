"""Normalisation over the model width."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attncompiler.blocks.inference import differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) · weight along the last axis, in fp32 or better. x (…, width) → (…, width), x's dtype.

    Keeps x and one number a row for its backward, and takes half the passes over memory that autograd would.
    """
    if not torch.is_grad_enabled() and x.dtype == weight.dtype == torch.promote_types(x.dtype, torch.float32):
        return F.rms_norm(x, x.shape[-1:], weight, eps)  # as fast on many rows, and with less around it on few
    normed: Tensor = differentiable(_RMSNorm, x, weight, eps)
    return normed


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = _scale(wide, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.eps = eps
        # the result must be new: a Function whose result an in-place operation or a cast to the same dtype gave back
        # is compiled by torch 2.11 into one without gradients, and nothing is said
        normed = wide * scale * weight
        return normed if normed.dtype == x.dtype else normed.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            scale = _scale(x.to(scale.dtype), ctx.eps)  # a second derivative sees that the scale follows from x
        normed, grad = x * scale, grad.to(scale.dtype)
        product = (grad * normed).flatten(0, -2)
        # the part of the gradient along x itself, which the norm takes away: one number a row
        along = torch.mv(product, weight.to(scale.dtype)).view(scale.shape) / x.shape[-1]
        d_x = (grad * weight).sub_(normed * along).mul_(scale)
        return d_x.to(x.dtype), product.sum(0).to(weight.dtype), None


def _scale(x: Tensor, eps: float) -> Tensor:
    """1 / √(mean(x²) + eps), one number a row."""
    return torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + eps)


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467): x / rms(x) · weight.

    The mean of squares is taken in fp32 for lower dtypes. x (…, width) → (…, width), in x's dtype.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def initial_value(self, name: str, generator: torch.Generator) -> Tensor:
        return torch.ones(self.weight.shape)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class GatedRMSNorm(nn.Module):
    """rms_norm(x · silu(gate)), or rms_norm(x) · silu(gate) with the norm first (Mamba-2's norm).

    Each of `groups` equal parts of the width has a norm of its own. x, gate (…, width) → (…, width), in x's dtype; the
    gate is applied in fp32 for lower dtypes.
    """

    def __init__(self, width: int, eps: float, norm_before_gate: bool = False, groups: int = 1):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.norm_before_gate, self.groups = eps, norm_before_gate, groups

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        opened = F.silu(gate.to(wide))
        if self.norm_before_gate:
            return (self._normed(x.to(wide)) * opened).to(x.dtype)
        return self._normed(x.to(wide) * opened).to(x.dtype)

    def _normed(self, x: Tensor) -> Tensor:
        if self.groups == 1:
            return rms_norm(x, self.weight, self.eps)
        parts = x.unflatten(-1, (self.groups, -1))
        return F.rms_norm(parts, parts.shape[-1:], None, self.eps).flatten(-2) * self.weight

    def initial_value(self, name: str, generator: torch.Generator) -> Tensor:
        return torch.ones(self.weight.shape)

    def extra_repr(self) -> str:
        order = ", norm before gate" if self.norm_before_gate else ""
        return f"{self.weight.shape[0]}, eps={self.eps}, groups={self.groups}{order}"


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
