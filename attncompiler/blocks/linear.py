"""Linear layers with a start of their own."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class ResidualLinear(nn.Linear):
    """A projection back into the residual stream, whose first weights shrink with the number of layers.

    x (…, inputs) → (…, outputs). With `layers` the weight starts Kaiming uniform (a = √5) divided by √layers, as
    mamba-ssm starts it (and GPT-2, §2.3, before it); with None as every other linear layer.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool, layers: int | None):
        super().__init__(inputs, outputs, bias=bias)
        self.layers = layers

    def initial_value(self, name: str, generator: torch.Generator) -> Tensor | None:
        """The weight's start; None where it is the usual one."""
        if name != "weight" or self.layers is None:
            return None
        bound = 1 / math.sqrt(self.in_features)
        return torch.empty(self.weight.shape).uniform_(-bound, bound, generator=generator) / math.sqrt(self.layers)
