"""What Mamba costs. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def operator_flops(shapes: Mapping[str, tuple[int, ...]], options: Any) -> tuple[int, int]:
    """FLOPs forward and backward of one call, as the recurrence counts them; none run in matrix units.

    `shapes` holds u (B, T, E) and a (E, N). A token decays the state, writes to it and reads it: three multiply-adds for
    each of its numbers. The backward makes the state again (two), carries its gradient back (two), and has one each for
    the gradients of u, B, C and of the decay. exp is not counted.
    """
    B, T, E = shapes["u"]
    product = 2 * B * T * E * shapes["a"][1]
    return 3 * product, 8 * product
