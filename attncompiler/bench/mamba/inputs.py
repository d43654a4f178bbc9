"""A row's tensors, by the operator's names, or a whole mixer's by those of its parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from attncompiler.bench.grid.drawn import Drawn, Values
from attncompiler.bench.mamba.rows import Mixer, Row

VALUES: Values = {
    "dt": lambda x: x / 2,
    # from −0.1 to −8.1: states that last for long and states that are gone after a token or two
    "a": lambda x: -0.1 - 8 * torch.special.ndtr(x),
}


def _weight(x: Tensor) -> Tensor:
    """Gives what is as large as what it is multiplied with."""
    return x / x.shape[-1] ** 0.5


def _time_steps(x: Tensor) -> Tensor:
    """About those that Mamba begins with, behind the softplus."""
    return x - 4


MIXER: Values = {
    **{f"{name}.weight": _weight for name in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")},
    **dict.fromkeys(("dt_proj.bias", "dt_bias"), _time_steps),
    # A from −1 to −16
    "A_log": lambda x: (1 + 15 * torch.special.ndtr(x)).log(),
}


class Inputs(Drawn):
    """What the scan or the duality is given, and in a step the state before it; or a mixer's input and parameters."""

    row: Row

    def __init__(self, row: Row, device: str, dtype: torch.dtype):
        super().__init__(row, device, dtype, MIXER if isinstance(row, Mixer) else VALUES)
