"""What Linformer costs. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def operator_flops(shapes: Mapping[str, tuple[int, ...]], options: Any) -> tuple[int, int]:
    """FLOPs forward and backward of one call.

    `shapes` holds q (B, T, H, D), v (B, S, H, V) and key_projection ([H,] R, P). Forward: keys and values are projected,
    S·R·(D + V), and every query meets R keys, T·R·(D + V). Backward: the projections are made again and have two
    products of that size each, for the gradients of what is projected and of the matrix; the attention counts 2.5
    times its forward (scores made again, and four gradients).
    """
    B, T, H, D = shapes["q"]
    S, V = shapes["v"][1], shapes["v"][3]
    R = shapes["key_projection"][-2]
    width = 2 * B * H * R * (D + V)
    return width * (S + T), width * 3 * S + 5 * width * T // 2
