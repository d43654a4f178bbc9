"""A row's tensors, by the operator's names."""

from __future__ import annotations

import torch

from attncompiler.bench.grid.drawn import Drawn, Values
from attncompiler.bench.mamba.rows import Row

VALUES: Values = {
    "dt": lambda x: x / 2,
    # from −0.1 to −8.1: states that last for long and states that are gone after a token or two
    "a": lambda x: -0.1 - 8 * torch.special.ndtr(x),
}


class Inputs(Drawn):
    """What the scan or the duality is given, and in a step the state before it."""

    row: Row

    def __init__(self, row: Row, device: str, dtype: torch.dtype):
        super().__init__(row, device, dtype, VALUES)
