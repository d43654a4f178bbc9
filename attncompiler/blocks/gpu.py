"""The facts of a GPU that shapes of tiles and numbers of programs depend on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


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


def parts(whole: int, each: int) -> int:
    """How many parts of so many cover the whole. (Triton's own, on the host, take 5 µs a call.)"""
    return -(-whole // each)


def power_of_2(number: int) -> int:
    """The least power of 2 that is no less."""
    return 1 << (number - 1).bit_length()
