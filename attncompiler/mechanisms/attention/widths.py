"""Heads of a width that a library's kernel does not take, made wider by zeros: they add nothing to scores or values."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad


def rounded(width: int, multiple: int = 8) -> int:
    """The next width that is a multiple."""
    return -(-width // multiple) * multiple


def widened(tensor: Tensor, width: int) -> Tensor:
    """(…, D) → (…, width), zeros after D; rows of D lie together. A view, or the tensor itself, where it can be."""
    if tensor.shape[-1] != width:
        return pad(tensor, (0, width - tensor.shape[-1]))
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
