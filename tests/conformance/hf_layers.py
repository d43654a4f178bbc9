"""One of our layers beside the same layer of transformers, with the same weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def assert_same(
    modules: tuple[nn.Module, nn.Module],
    hidden: tuple[Tensor, Tensor],
    outs: tuple[Tensor, Tensor],
    mask: Tensor | None,
    atol: float,
) -> None:
    """Of real tokens: what comes out, and the gradients of the input and of every weight. Pairs are ours and theirs.

    hidden and outs (B, T, M), mask (B, T) or None; `atol` is that of the gradients, which are sums over all tokens.
    """
    ours, theirs = (out if mask is None else out * mask[..., None] for out in outs)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    found, expected = map(_gradients, modules, hidden, (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=atol)


def _gradients(module: nn.Module, hidden: Tensor, out: Tensor) -> dict[str, Tensor]:
    tensors = {"hidden": hidden, **dict(module.named_parameters())}
    return dict(zip(tensors, torch.autograd.grad(out.square().sum(), list(tensors.values())), strict=True))
