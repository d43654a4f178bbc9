"""What attention costs."""

from __future__ import annotations


def operator_flops(shapes, options):
    B, T, H, D = shapes["q"]
    S, V = shapes["v"][1], shapes["v"][3]
    pairs = T * S
    return 2 * B * pairs * H * (D + V), 5 * B * pairs * H * (D + V)
