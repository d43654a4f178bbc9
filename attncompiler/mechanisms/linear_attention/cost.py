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

    `shapes` holds q (B, T, H, D), v (B, T, H, V) and, for favor, projection (R, D); `options.normalize` adds the
    normaliser's column to V. A token adds φ(k)vᵀ to the state and reads φ(q)·S from it: two products of R·V. The
    backward makes the state again and has four such products more, one each for the gradients of q, k, v and of the
    state. Favor projects q and k, products of R·D, in both directions, and their gradients back. Decays scale only.
    """
    B, T, H, D = shapes["q"]
    projected = shapes["projection"][0] if "projection" in shapes else 0
    width = shapes["v"][3] + bool(options.normalize)
    product = 2 * B * T * H * (projected or D) * width
    features = 2 * B * T * H * D * projected
    return 2 * product + 2 * features, 5 * product + 4 * features


def cost(policy: LinearAttentionPolicy, size: MixerSize) -> Cost:
    """Projections, rotary, random features and the operator.

    Autograd keeps the layer's input, q, k and v as the operator got them, its decays and projection, and its outputs:
    the normaliser and the final state among them, in fp32. The projection of a layer that redraws it is a copy.
    """
    M, H = size.hidden_size, policy.num_attention_heads
    D, V, R = policy.key_width(M), policy.value_width(M), policy.feature_count(M)
    n, itemsize, wide = size.tokens, size.itemsize, max(size.itemsize, FP32)
    qkv_bias, out_bias = policy.attention_bias in ("qkv", "all"), policy.attention_bias == "all"
    shapes: dict[str, tuple[int, ...]] = {"q": (size.batch, size.seq_len, H, D), "v": (size.batch, size.seq_len, H, V)}
    if policy.feature_map == "favor":
        shapes["projection"] = (R, D)
    forward, backward = operator_flops(shapes, policy)
    heads, out = n * H * (2 * D + V) * itemsize, n * H * V * itemsize
    state = size.batch * H * (R * V + R + 1) * wide
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
    if policy.feature_map == "favor":
        projection = R * D * wide
        kept = projection if policy.redraw_interval is not None else 0
        total = total + Cost(forward_bytes=projection, backward_bytes=projection, saved_bytes=kept)
    if policy.decay == "scalar":
        gates = n * H * 2 * wide  # the gate, which its logarithm's gradient asks for, and the logarithm of the decay
        gating = Cost(forward_bytes=gates, backward_bytes=gates, saved_bytes=gates)
        total = total + blocks.linear(n, M, H, True, itemsize) + gating
    return total + blocks.rotary(policy.rope_parameters, size, 2 * H, D)


def _kernel_workspace(policy: LinearAttentionPolicy, size: MixerSize) -> int:
    """The largest transient inside a kernel, which is its backward's, beside inputs, outputs and their gradients."""
    B, T, H, M = size.batch, size.seq_len, policy.num_attention_heads, size.hidden_size
    D, V, R = policy.key_width(M), policy.value_width(M) + 1, policy.feature_count(M)
    wide = max(size.itemsize, FP32)
    weighted = policy.feature_map == "favor" or policy.decay != "none"
    if size.kernel == "eager":
        return (10 if weighted else 6) * B * H * T * T * wide
    span = min(T, SPAN)
    features = B * span * H * (2 * R + 2 * V)
    # states at the chunks' boundaries, what each chunk adds, and the gradient; weights inside chunks and theirs
    chunks = B * H * ((3 + (policy.decay != "none")) * -(-span // CHUNK) * R * V + (2 + 2 * weighted) * span * CHUNK)
    found = B * span * H * (2 * R + 4 * V + 2 * (R > D) * D)
    return (features + chunks + found) * wide
