"""What Linformer costs. Nothing here imports torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from attncompiler.blocks import cost as blocks
from attncompiler.mechanisms.base import Cost, MixerSize
from attncompiler.mechanisms.linformer.mechanism import LinformerPolicy

FP32 = 4
SCORES = 2**20
"""probabilities, over all heads, that the kernel's backward holds at once"""


def operator_flops(shapes: Mapping[str, tuple[int, ...]], options: Any) -> tuple[int, int]:
    """FLOPs forward and backward of one call (padding is not looked at).

    `shapes` holds q (B, T, H, D), k and v (B, S, H, D) and key_projection ([H,] R, S). Forward: keys and values are
    projected to R rows, and every query meets these. Backward: 2.5 times the attention, whose scores are made again,
    and 3 times the projections, which are made again and have a gradient of either side.
    """
    B, T, H, D = shapes["q"]
    S, V = shapes["v"][1], shapes["v"][3]
    R = shapes["key_projection"][-2]
    projected = 2 * B * R * S * H * (D + V)
    met = 2 * B * T * R * H * (D + V)
    return projected + met, 3 * projected + 5 * met // 2


def cost(policy: LinformerPolicy, size: MixerSize) -> Cost:
    """Projections of the width, projections of the length and the operator.

    Autograd keeps the layer's input, q, k and v, and the operator's output.
    """
    M, H, R = size.hidden_size, policy.num_attention_heads, policy.projected_length
    D = policy.head_width(M)
    n, itemsize = size.tokens, size.itemsize
    qkv_bias, out_bias = policy.attention_bias in ("qkv", "all"), policy.attention_bias == "all"
    shape = (size.batch, size.seq_len, H, D)
    forward, backward = operator_flops({"q": shape, "v": shape, "key_projection": (R, size.seq_len)}, policy)
    table = math.prod(policy.projection_shape(size.max_position_embeddings))
    tables = table if policy.share == "kv" else 2 * table
    heads = n * H * D * itemsize
    total = blocks.linear(n, H * D, M, out_bias, itemsize)
    for _ in range(3):
        total = total + blocks.linear(n, M, H * D, qkv_bias, itemsize)
    return total + Cost(
        parameters=tables,
        forward_flops=forward,
        backward_flops=backward,
        forward_bytes=4 * heads + tables * itemsize,
        backward_bytes=8 * heads + 2 * tables * itemsize,
        saved_bytes=n * M * itemsize + 4 * heads,
        workspace_bytes=4 * heads + _kernel_workspace(policy, size),
    )


def _kernel_workspace(policy: LinformerPolicy, size: MixerSize) -> int:
    """The largest transient inside a kernel, in either direction, beside inputs, outputs and their gradients."""
    B, T, H, R = size.batch, size.seq_len, policy.num_attention_heads, policy.projected_length
    if size.kernel == "eager":
        return 6 * B * H * T * R * max(size.itemsize, FP32)
    # projected keys and values and their gradients; probabilities of some queries, and three tensors made from them
    rows = min(T, max(1, SCORES // (B * H * R)))
    return (4 * B * R * H * policy.head_width(size.hidden_size) + 4 * B * H * rows * R) * max(size.itemsize, FP32)
