"""Normalisation over the model width."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from attncompiler.blocks.gpu import takes_triton
from attncompiler.blocks.inference import differentiable, plain


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) · weight along the last axis, in fp32 or better. x (…, width) → (…, width), x's dtype.

    Keeps x and one number a row for its backward, and takes half the passes over memory that autograd would.
    """
    normed: Tensor
    if _streams(x.shape[-1] <= WIDEST, x, weight):
        normed = differentiable(_Streaming, x, None, weight, eps, 1, False)
        return normed
    return _rms_norm(x, weight, eps)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same in torch."""
    if not torch.is_grad_enabled() and x.dtype == weight.dtype == torch.promote_types(x.dtype, torch.float32):
        return F.rms_norm(x, x.shape[-1:], weight, eps)  # as fast on many rows, and with less around it on few
    normed: Tensor = differentiable(_RMSNorm, x, weight, eps)
    return normed


STREAMING = "attncompiler.blocks.streaming.norm"
"""imported where it runs, since Triton may not be installed"""
WIDEST, WIDEST_GATED = 16384, 8192
"""numbers at most that a program holds of a row in registers, where there is no gate and where there is"""


def _streams(fits: bool, *tensors: Tensor) -> bool:
    """Whether Triton's form is the one that runs, where it has registers for a row.

    A compiler has torch's instead, to fuse it with what is around it; and torch's alone carries tangents on.
    """
    if torch.compiler.is_compiling() or not fits:  # first: compilers cannot follow the rest
        return False
    return takes_triton(*tensors) and plain(tensors) and forward_ad._current_level < 0


class _Streaming(torch.autograd.Function):
    """The norm with a gate or without, as Triton compiles it. Keeps its inputs and one number a row and group."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, groups: int, first: bool
    ) -> Tensor:
        out, scales = import_module(STREAMING).forward(x, gate, weight, eps, groups, first)
        ctx.save_for_backward(x, gate, weight, scales)
        ctx.options = eps, groups, first
        normed: Tensor = out
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight, scales = ctx.saved_tensors
        eps, groups, first = ctx.options
        if torch.is_grad_enabled():  # for a second derivative: torch's form has one
            again = _rms_norm(x, weight, eps) if gate is None else _gated(x, gate, weight, eps, groups, first)
            wanted = {n: each for n, each in enumerate((x, gate, weight)) if ctx.needs_input_grad[n]}
            grads = torch.autograd.grad(again, list(wanted.values()), grad, create_graph=True)
            found = dict(zip(wanted, grads, strict=True))
            return found.get(0), found.get(1), found.get(2), None, None, None
        return *import_module(STREAMING).backward(grad, x, gate, weight, scales, groups, first), None, None, None


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
        options = self.eps, self.groups, self.norm_before_gate
        if _streams(x.shape[-1] <= WIDEST_GATED * self.groups, x, gate, self.weight):
            normed: Tensor = differentiable(_Streaming, x, gate, self.weight, *options)
            return normed
        return _gated(x, gate, self.weight, *options)

    def initial_value(self, name: str, generator: torch.Generator) -> Tensor:
        return torch.ones(self.weight.shape)

    def extra_repr(self) -> str:
        order = ", norm before gate" if self.norm_before_gate else ""
        return f"{self.weight.shape[0]}, eps={self.eps}, groups={self.groups}{order}"


def _gated(x: Tensor, gate: Tensor, weight: Tensor, eps: float, groups: int, first: bool) -> Tensor:
    """The same in torch; `first` says that the norm comes before the gate."""
    wide = torch.promote_types(x.dtype, torch.float32)
    opened = F.silu(gate.to(wide))
    if first:
        return (_normed(x.to(wide), weight, eps, groups) * opened).to(x.dtype)
    return _normed(x.to(wide) * opened, weight, eps, groups).to(x.dtype)


def _normed(x: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    if groups == 1:
        return _rms_norm(x, weight, eps)
    parts = x.unflatten(-1, (groups, -1))
    return F.rms_norm(parts, parts.shape[-1:], None, eps).flatten(-2) * weight


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
