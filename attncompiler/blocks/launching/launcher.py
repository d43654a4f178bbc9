"""Launching a compiled kernel again without asking what its arguments are.

At every launch Triton looks at each argument for what it compiles a kernel anew for: a pointer's type and alignment, a
number's being 1, a multiple of 16 or beyond 32 bits, a descriptor's layout, a constant. On short sequences that takes
longer than the kernel runs.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from triton import knobs
from triton.compiler import CompiledKernel

MOST = 4096
"""Launches of a kernel that are known; a sequence of every length is one of its own."""


class Launcher:
    """A kernel, compiled by its first launch that is `known` by a name, and launched as it is by the others.

    All that Triton would look at must follow from the name: the shapes, strides, dtypes and alignment of what the
    caller gave, with whatever chooses constants, warps and stages. A launch without a name is Triton's own.
    """

    def __init__(self, kernel: Any):
        self.kernel = kernel
        self._compiled: dict[Hashable, Any] = {}

    def __call__(
        self, grid: tuple[int, ...], known: Hashable | None, *arguments: object, num_warps: int = 4, num_stages: int = 3
    ) -> None:
        compiled = None if known is None else self._compiled.get(known)
        if compiled is not None:
            compiled[*grid, *(1,) * (3 - len(grid))](*arguments)
            return
        compiled = self.kernel[grid](*arguments, num_warps=num_warps, num_stages=num_stages)
        if known is not None and isinstance(compiled, CompiledKernel):  # not one that is yet to be compiled
            if len(self._compiled) >= MOST:
                self._compiled.clear()
            self._compiled[known] = compiled


def known_by(*tensors: torch.Tensor | None) -> tuple[Hashable, ...]:
    """What Triton would look at of these tensors, on which device they are, and what it is told to compile into all."""
    asked = knobs.runtime.debug, knobs.compilation.instrumentation_mode, knobs.runtime.add_stages_inspection_hook
    return asked, *(
        None
        if tensor is None
        else (tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % 16 == 0, tensor.device)
        for tensor in tensors
    )
