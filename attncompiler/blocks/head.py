"""Heads: what a model gives for its last hidden states, and the loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attncompiler.blocks.autocast import autocast, no_autocast
from attncompiler.errors import InputError, fail


class SoftCap(nn.Module):
    """cap · tanh(x / cap): keeps logits within ±cap (Gemma 2, https://arxiv.org/abs/2408.00118)."""

    def __init__(self, cap: float):
        super().__init__()
        self.cap = cap

    def forward(self, x: Tensor) -> Tensor:
        return self.cap * torch.tanh(x / self.cap)


class Pool(nn.Module):
    """One vector per sequence: of its first or last real token, or the mean over real tokens."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """hidden (B, T, M), attention_mask (B, T) → (B, M)."""
        B, T, _ = hidden.shape
        real = (
            torch.ones(B, T, device=hidden.device, dtype=torch.bool) if attention_mask is None else attention_mask != 0
        )
        if self.kind == "mean":
            # divided before the sum, which half precision could not hold
            weight = (real / real.sum(1, keepdim=True).clamp(min=1)).to(hidden.dtype)
            return torch.einsum("btm,bt->bm", hidden, weight)
        index = torch.arange(T, device=hidden.device)
        chosen = torch.where(real, index, T).amin(1) if self.kind == "first" else torch.where(real, index, -1).amax(1)
        return hidden[torch.arange(B, device=hidden.device), chosen.clamp(0, T - 1)]


class LMLoss(nn.Module):
    """Mean cross-entropy of the next token, without ever holding the logits of more than `chunk` tokens."""

    def __init__(self, softcap: float | None, chunk: int = 4096):
        super().__init__()
        self.softcap, self.chunk = softcap, chunk

    def forward(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        """hidden (B, T, M), weight (vocabulary, M), labels (B, T) with −100 ignored → a scalar in fp32 (fp64 for fp64).

        Raises InputError for labels of another shape (E401), that are not whole numbers (E402) or name no token (E403).
        """
        if labels.shape != hidden.shape[:2]:
            message = f"labels must be (B, T) = {tuple(hidden.shape[:2])} as the tokens are, not {tuple(labels.shape)}"
            raise fail(InputError, "E401", message)
        labels = _check_whole(labels, weight.shape[0])
        return linear_cross_entropy(hidden.flatten(0, 1), weight, bias, labels.flatten(), self.softcap, self.chunk)


class ClassifierLoss(nn.Module):
    """Mean cross-entropy of one label per sequence."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits (B, num_labels), labels (B,) with −100 ignored → a scalar in fp32 (fp64 for fp64), 0 when all are.

        Raises InputError for labels of another shape (E401), that are not whole numbers (E402) or name no class (E403).
        """
        if labels.shape != logits.shape[:1]:
            message = f"labels must be (B,) = {tuple(logits.shape[:1])}, not {tuple(labels.shape)}"
            raise fail(InputError, "E401", message)
        labels = _check_whole(labels, logits.shape[1])
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(wide, labels, reduction="sum") / (labels != -100).sum().clamp(min=1)


def _check_whole(labels: Tensor, count: int) -> Tensor:
    """The labels as int64. Their values are read only where that waits for no GPU, and where they have any."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise fail(InputError, "E402", f"labels must be whole numbers, not {labels.dtype}")
    labels = labels.long()
    if not torch.compiler.is_compiling() and labels.device.type == "cpu":
        wrong = (labels != -100) & ((labels < 0) | (labels >= count))
        if type(wrong) is Tensor and wrong.any():  # a fake tensor is of another type
            first = int(labels[wrong][0])
            raise fail(InputError, "E403", f"labels must be 0 to {count - 1}, or -100 to be ignored, not {first}")
    return labels


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, softcap: float | None = None, chunk: int = 4096
) -> Tensor:
    """Mean over labels ≠ −100 of −log softmax(softcap(hidden · weightᵀ + bias))[label], chunk by chunk.

    hidden (tokens, M), weight (vocabulary, M), bias (vocabulary,), labels (tokens,) → a scalar in fp32 (fp64 for
    fp64); 0 when every label is ignored. The gradient is made in the forward pass while a chunk's logits are at hand,
    so no logits are kept (Hsu et al. 2024, https://arxiv.org/abs/2410.10989); under no_grad none is made, and there are
    no second derivatives (E403). Logits are taken in autocast's dtype, the softmax in fp32.
    """
    if not torch.is_grad_enabled():
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    [hidden] = autocast(hidden)
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, labels, softcap, chunk)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, softcap: float | None, chunk: int
    ) -> Tensor:
        with no_autocast(hidden.device.type):
            return _forward(ctx, hidden, weight, bias, labels, softcap, chunk)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # torch's once_differentiable would say so too, but does not enter a compiled graph
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            message = "the fused loss has no second derivatives"
            raise fail(InputError, "E403", message, remedy="take the cross-entropy of the model's logits")
        d_hidden, d_weight, d_bias, share = ctx.saved_tensors
        # of the sum so far: divided by the number of labels only with a loss scale on it, which fp16 needs to hold it
        grad = grad * share
        scaled = [
            None if d is None else (d * grad).to(dtype)
            for d, dtype in zip((d_hidden, d_weight, d_bias), ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None)


def _forward(
    ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, softcap: float | None, chunk: int
) -> Tensor:
    need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    matrix = weight.to(hidden.dtype)
    real = labels != -100
    share = real.sum().clamp(min=1).to(wide).reciprocal()
    total = torch.zeros((), device=hidden.device, dtype=wide)
    d_hidden = torch.empty_like(hidden) if need_hidden else None
    d_weight = torch.zeros(weight.shape, device=weight.device, dtype=wide) if need_weight else None
    d_bias = torch.zeros(weight.shape[0], device=weight.device, dtype=wide) if bias is not None and need_bias else None
    for start in range(0, hidden.shape[0], chunk):
        rows = slice(start, start + chunk)
        logits = F.linear(hidden[rows], matrix).to(wide)
        if bias is not None:
            logits = logits + bias
        capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        target = torch.where(real[rows], labels[rows], 0)[:, None]
        normaliser = capped.logsumexp(-1, keepdim=True)
        total = total + torch.where(real[rows, None], normaliser - capped.gather(1, target), 0).sum()
        if not (need_hidden or need_weight or need_bias):
            continue
        grad = torch.exp(capped - normaliser)
        grad = grad.scatter_add(1, target, torch.full_like(grad[:, :1], -1.0))
        grad = grad * real[rows, None]
        if softcap is not None:
            grad = grad * (1 - (capped / softcap) ** 2)
        low = grad.to(hidden.dtype)
        if d_hidden is not None:
            d_hidden[rows] = low @ matrix
        if d_weight is not None:
            d_weight += low.T @ hidden[rows]
        if d_bias is not None:
            d_bias += grad.sum(0)
    ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
    ctx.save_for_backward(d_hidden, d_weight, d_bias, share)
    return total * share
