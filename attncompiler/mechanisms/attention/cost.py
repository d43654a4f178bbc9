"""What attention costs. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attncompiler.blocks import cost as blocks
from attncompiler.mechanisms.attention.mechanism import AttentionPolicy
from attncompiler.mechanisms.attention.pairs import visible_pairs
from attncompiler.mechanisms.attention.pattern import retained
from attncompiler.mechanisms.base import Cost, MixerSize

FP32 = 4


def operator_flops(shapes: Mapping[str, tuple[int, ...]], options: Any) -> tuple[int, int]:
    """FLOPs forward and backward of one call, over visible pairs alone (segments and padding are not looked at).

    `shapes` holds q (B, T, H, D), k (B, S, K, D), v (B, S, K, V); `options` has the pattern. Forward is two products
    per pair, q·k and p·v; backward five, as the scores are made again (Dao et al. 2022, https://arxiv.org/abs/2205.14135,
    algorithm 4), which is counted as 2.5 times the forward.
    """
    B, T, H, D = shapes["q"]
    S, V = shapes["v"][1], shapes["v"][3]
    forward = 2 * B * visible_pairs(options.pattern, T, S) * H * (D + V)
    return forward, 5 * forward // 2


def cost(policy: AttentionPolicy, size: MixerSize) -> Cost:
    """Projections, norms of queries and keys, rotary and the operator.

    Autograd keeps the layer's input, q, k and v as the operator got them, its outputs, and what the norms keep.
    """
    M, H, K = size.hidden_size, policy.num_attention_heads, policy.kv_heads
    D, V = policy.key_width(M), policy.value_width(M)
    n, itemsize = size.tokens, size.itemsize
    qkv_bias, out_bias = policy.attention_bias in ("qkv", "all"), policy.attention_bias == "all"
    shapes = {"q": (size.batch, size.seq_len, H, D), "v": (size.batch, size.seq_len, K, V)}
    forward, backward = operator_flops(shapes, policy)
    heads = n * (H * D + K * D + K * V) * itemsize
    out = n * H * V * itemsize
    lse = n * H * max(itemsize, FP32)
    total = (
        blocks.linear(n, M, H * D, qkv_bias, itemsize)
        + blocks.linear(n, M, K * D, qkv_bias, itemsize)
        + blocks.linear(n, M, K * V, qkv_bias, itemsize)
        + blocks.linear(n, H * V, M, out_bias, itemsize)
        + Cost(
            forward_flops=forward,
            backward_flops=backward,
            forward_bytes=heads + out + lse,
            backward_bytes=2 * heads + 2 * out + lse,
            saved_bytes=n * M * itemsize + heads + out + lse,
            # gradients of the output, of q, k and v, beside what the kernel itself holds
            workspace_bytes=out + heads + _kernel_workspace(policy, size),
        )
    )
    total = total + blocks.rotary(policy.rope_parameters, size, H + K, D)
    if policy.qk_norm != "none":
        kind = "rmsnorm" if policy.qk_norm == "rms" else "l2"
        queries = blocks.norm(kind, n * H, D, itemsize)
        total = total + queries + blocks.norm(kind, n * K, D, itemsize)
    if policy.sinks:
        total = total + Cost(parameters=H)
    slots = retained(policy.pattern).slots(size.seq_len)
    return total + Cost(state_bytes=size.batch * slots * K * (D + V) * itemsize)


def _kernel_workspace(policy: AttentionPolicy, size: MixerSize) -> int:
    """The largest transient inside a kernel, in either direction, beside inputs, outputs and their gradients."""
    B, T, H = size.batch, size.seq_len, policy.num_attention_heads
    wide = max(size.itemsize, FP32)
    if size.kernel == "eager":
        # scores, their mask, weights, probabilities, and as many gradients
        return 6 * B * H * T * T * wide
    if size.kernel == "sdpa" and policy.pattern.kind not in ("full", "causal"):
        return T * T * size.itemsize
    return 0
