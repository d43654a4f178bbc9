"""What linear attention costs. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attncompiler.blocks import cost as blocks
from attncompiler.mechanisms.base import Cost, MixerSize
from attncompiler.mechanisms.linear_attention.mechanism import LinearAttentionPolicy

FP32 = 4
CHUNK = 64
SPAN = 16 * CHUNK
"""tokens that the chunkwise kernel holds in chunks at once"""


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


def cost(policy: LinearAttentionPolicy, size: MixerSize) -> Cost:
    """Projections, rotary and the operator.

    Autograd keeps the layer's input, q, k and v as the operator got them, and its outputs: the normaliser and the final
    state among them, in fp32.
    """
    M, H = size.hidden_size, policy.num_attention_heads
    D, V = policy.key_width(M), policy.value_width(M)
    n, itemsize, wide = size.tokens, size.itemsize, max(size.itemsize, FP32)
    qkv_bias, out_bias = policy.attention_bias in ("qkv", "all"), policy.attention_bias == "all"
    shapes = {"q": (size.batch, size.seq_len, H, D), "v": (size.batch, size.seq_len, H, V)}
    forward, backward = operator_flops(shapes, policy)
    heads, out = n * H * (2 * D + V) * itemsize, n * H * V * itemsize
    state = size.batch * H * (D * V + D + 1) * wide
    total = (
        blocks.linear(n, M, H * D, qkv_bias, itemsize)
        + blocks.linear(n, M, H * D, qkv_bias, itemsize)
        + blocks.linear(n, M, H * V, qkv_bias, itemsize)
        + blocks.linear(n, H * V, M, out_bias, itemsize)
        + Cost(
            forward_flops=forward,
            backward_flops=backward,
            forward_bytes=heads + out + state,
            backward_bytes=2 * (heads + out + state),
            saved_bytes=n * M * itemsize + heads + out + n * H * wide + state,
            workspace_bytes=out + heads + _kernel_workspace(policy, size),
            state_bytes=state,
        )
    )
    return total + blocks.rotary(policy.rope_parameters, size, 2 * H, D)


def _kernel_workspace(policy: LinearAttentionPolicy, size: MixerSize) -> int:
    """The largest transient inside a kernel, which is its backward's, beside inputs, outputs and their gradients."""
    B, T, H = size.batch, size.seq_len, policy.num_attention_heads
    D, V = policy.key_width(size.hidden_size), policy.value_width(size.hidden_size) + 1
    wide = max(size.itemsize, FP32)
    if size.kernel == "eager":
        return 6 * B * H * T * T * wide
    span = min(T, SPAN)
    features = B * span * H * (2 * D + 2 * V)
    # states at the chunks' boundaries, what each chunk adds, and the gradient; weights inside chunks and theirs
    chunks = B * H * (3 * -(-span // CHUNK) * D * V + 2 * span * CHUNK)
    found = B * span * H * (2 * D + 4 * V)
    return (features + chunks + found) * wide
