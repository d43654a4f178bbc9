"""What linear attention costs. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def operator_flops(shapes: Mapping[str, tuple[int, ...]], options: Any) -> tuple[int, int]:
    """FLOPs forward and backward of one call, as the recurrence counts them, whatever the chunk size.

    `shapes` holds q (B, T, H, D) and v (B, T, H, V); `options.normalize` adds the normaliser's column to V. A token
    adds φ(k)vᵀ to the state and reads φ(q)·S from it: two products of D·V. The backward makes the state again and
    has four such products more, one each for the gradients of q, k, v and of the state.
    """
    B, T, H, D = shapes["q"]
    width = shapes["v"][3] + bool(options.normalize)
    product = 2 * B * T * H * D * width
    return 2 * product, 5 * product
