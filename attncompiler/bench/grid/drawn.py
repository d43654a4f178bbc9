"""A row's inputs, drawn from a seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from attncompiler.bench.grid.operands import TimedRow

Values = Mapping[str, Callable[[Tensor], Tensor]]
"""input → its values, made of Gaussian ones in fp32 of its shape; the others are Gaussian"""


class Drawn:
    """The inputs of a row's operator by name, made once for all who take part; leaves where the row has a backward."""

    def __init__(self, row: TimedRow, device: str, dtype: torch.dtype, values: Values):
        self.row, self.device, self.dtype = row, device, dtype
        generator, operands = torch.Generator(device).manual_seed(0), row.operands
        self.tensors: dict[str, Tensor] = {}
        for name, shape in operands.given.items():
            wanted = torch.promote_types(dtype, torch.float32) if name in operands.wide else dtype
            made = torch.float32 if name in values else wanted
            tensor = torch.randn(shape, generator=generator, device=device, dtype=made)
            self.tensors[name] = values[name](tensor).to(wanted) if name in values else tensor
        for name in operands.given.keys() - operands.constant:
            self.tensors[name].requires_grad_(row.backward)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """Those that have a gradient, in the operator's own layout."""
        return tuple(self.tensors[name] for name in self.row.operands.given if name not in self.row.operands.constant)

    def compared(self, out: Tensor) -> Tensor:
        """All of an output."""
        return out


def on_gpu(inputs: Drawn) -> bool:
    """Whether they are where the libraries' kernels run."""
    return torch.device(inputs.device).type == "cuda"
