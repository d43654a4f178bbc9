"""The facts of a GPU that shapes of tiles and numbers of programs depend on."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from attncompiler.mechanisms.base import needs_of_triton
from attncompiler.targets.detect import detect_environment


@dataclass(frozen=True, slots=True)
class Device:
    """What block shapes and splits depend on."""

    shared_memory: int
    """bytes a program may have"""
    multiprocessors: int
    capability: tuple[int, int] = (0, 0)
    """compute capability; of no GPU, none"""

    @property
    def interpreted(self) -> bool:
        """Whether there is no GPU, and Triton's interpreter runs the kernels."""
        return self.capability == (0, 0)


@cache
def device_of(device: torch.device) -> Device:
    """The facts of a device. Where the kernels are interpreted there is none, and small numbers serve."""
    if device.type != "cuda":
        return Device(2**16, 4)
    seen = torch.cuda.get_device_properties(device)
    shared_memory = seen.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Device(shared_memory, seen.multi_processor_count, (seen.major, seen.minor))


def takes_triton(*tensors: Tensor) -> bool:
    """Whether what Triton compiles runs where the first of these tensors is, and takes the dtypes of all."""
    return _compiles(tensors[0].device) and all(tensor.dtype in _DTYPES for tensor in tensors)


_NEEDS = needs_of_triton({})
_DTYPES = frozenset(getattr(torch, name) for name in _NEEDS.dtypes)


@cache
def _compiles(device: torch.device) -> bool:
    if device.type not in _NEEDS.device_types or torch.version.hip is not None:
        return False
    if not all(package in detect_environment().packages for package in _NEEDS.packages):
        return False
    if device_of(device).capability < (_NEEDS.min_compute_capability or (0, 0)):
        return False
    why = import_module("attncompiler.blocks.launching.probe").failure(device)
    if why is not None:  # a mechanism's chain goes on to its next kernel; what has no chain is computed by torch
        warnings.warn(f"Triton cannot run on {device} ({why}): torch computes instead", RuntimeWarning, stacklevel=2)
    return why is None


def parts(whole: int, each: int) -> int:
    """How many parts of so many cover the whole. (Triton's own, on the host, take 5 µs a call.)"""
    return -(-whole // each)


def power_of_2(number: int) -> int:
    """The least power of 2 that is no less."""
    return 1 << (number - 1).bit_length()
