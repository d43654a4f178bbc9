"""A row's tensors, by the operator's names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attncompiler.bench.grid.drawn import Drawn, Values
from attncompiler.bench.linear.rows import Row

SEEN = 64
"""tokens whose sums the states of decoding steps are of the size of"""
GATE_LOGIT_NORMALIZER = 16
"""what a scalar decay's logarithm is divided by, as in our layer and fla's"""


class Inputs(Drawn):
    """q, k, v and what else the row has. Scalar decays are of gates of any sign, retention's are its paper's."""

    row: Row

    def __init__(self, row: Row, device: str, dtype: torch.dtype):
        def retention(x: Tensor) -> Tensor:
            return torch.log1p(-torch.exp2(-5 - torch.arange(row.H, device=x.device, dtype=x.dtype)))

        def scalar(x: Tensor) -> Tensor:
            return F.logsigmoid(x) / GATE_LOGIT_NORMALIZER

        values: Values = {
            "log_decay": retention if row.decay == "retention" else scalar,
            "initial_s": lambda x: x * SEEN**0.5,
            "initial_z": lambda x: SEEN * (1 + x.abs()),
            "initial_m": torch.zeros_like,
        }
        super().__init__(row, device, dtype, values)
