"""Weights too small to count, kept from a CPU's arithmetic.

A CPU takes some hundred cycles for each product that reads or makes a subnormal number, and a matrix product of such
weights a hundred times as long. Softmax probabilities and decays over many tokens are full of them where scores are far
apart. The largest weight is about 1, so that what is lost here lies far below the rounding of any sum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG2_E = 1 / math.log(2)
MARGIN = 26
"""By how many powers of 2 a weight is above the smallest normal number: products with what is not tiny are normal."""


def _least(dtype: torch.dtype) -> float:
    """The power of 2 from which weights count: −100 in fp32, −996 in fp64."""
    return math.log2(torch.finfo(dtype).tiny) + MARGIN


def exp2_(exponents: Tensor) -> Tensor:
    """2 to the exponents, in place; 0 for those of at most −100 (fp32) or −996 (fp64).

    For a natural exponential its argument is given times `LOG2_E`: torch's own one is MKL's on a CPU, which takes some
    20 times longer wherever it underflows, at −∞ too.
    """
    return torch.threshold_(exponents, _least(exponents.dtype), -math.inf).exp2_()


def flush_(weights: Tensor) -> Tensor:
    """Replace weights of at most 2⁻¹⁰⁰ (fp32) or 2⁻⁹⁹⁶ (fp64) by 0, in place."""
    return torch.threshold_(weights, 2.0 ** _least(weights.dtype), 0.0)


def flush_signed_(values: Tensor) -> Tensor:
    """As `flush_`, of values of either sign: those of so small a magnitude become 0, in place."""
    torch.ops.aten.hardshrink.out(values, 2.0 ** _least(values.dtype), out=values)
    return values
