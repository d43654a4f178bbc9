"""What Mamba-2 costs. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def operator_flops(shapes: Mapping[str, tuple[int, ...]], options: Any) -> tuple[int, int]:
    """FLOPs forward and backward of one call, as the recurrence counts them, whatever the chunk size.

    `shapes` holds x (B, T, H, P) and b (B, T, G, N). A token adds x Bᵀ to the state and reads h·C from it: two products
    of P·N for each head. The backward makes the state again and has four such products more, one each for the
    gradients of x, B, C and of the state.
    """
    B, T, H, P = shapes["x"]
    product = 2 * B * T * H * P * shapes["b"][3]
    return 2 * product, 5 * product
