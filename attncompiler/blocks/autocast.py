"""Autocast at an operator's door: what comes in is cast there, and nothing inside is."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

DEVICES = ("cpu", "cuda")
"""those that kernels run on; torch's own question whether a device has autocast breaks graphs before torch 2.13"""


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where autocast is on for their device; fp64, and what is no float, stays."""
    device = tensors[0].device.type
    if device not in DEVICES or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
        for tensor in tensors
    )


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and states of that dtype: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def no_autocast(device: str) -> AbstractContextManager[object]:
    """A block in which nothing is cast, so that fp32 accumulators stay fp32."""
    if device not in DEVICES or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)
