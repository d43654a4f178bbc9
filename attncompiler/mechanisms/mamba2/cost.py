"""What Mamba-2 costs. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attncompiler.blocks import cost as blocks
from attncompiler.mechanisms.base import Cost, MixerSize
from attncompiler.mechanisms.mamba2.mechanism import Mamba2Policy

FP32 = 4
CHUNK = 64
"""tokens of a chunk of the chunkwise kernel at most"""
BLOCK_ELEMENTS = 2**19
"""of a block's scores there: some megabytes"""
HELD = 2**29
"""bytes of states that the Triton kernel's backward holds at a time, about"""
NARROW = 16
"""tokens of its chunks of fp32 numbers; of 16 bits on Hopper as many as the chunkwise kernel's"""


def operator_flops(shapes: Mapping[str, tuple[int, ...]], options: Any) -> tuple[int, int]:
    """FLOPs forward and backward of one call, as the recurrence counts them, whatever the chunk size.

    `shapes` holds x (B, T, H, P) and b (B, T, G, N). A token adds x Bᵀ to the state and reads h·C from it: two products
    of P·N for each head. The backward makes the state again and has four such products more, one each for the
    gradients of x, B, C and of the state.
    """
    B, T, H, P = shapes["x"]
    product = 2 * B * T * H * P * shapes["b"][3]
    return 2 * product, 5 * product


def cost(policy: Mamba2Policy, size: MixerSize) -> Cost:
    """Projections, the causal convolution over x, B and C, the operator, and the gated norm.

    Autograd keeps the layer's input, the first projection (z, x, B, C and the time steps), the convolution's output,
    the operator's outputs, and, with a norm, the input of the last projection.
    """
    M, N, W = size.hidden_size, policy.state_size, policy.conv_kernel
    E, H, P, G = policy.channels(M), policy.heads(M), policy.head_dim, policy.n_groups
    n, itemsize, wide = size.tokens, size.itemsize, max(size.itemsize, FP32)
    shapes = {"x": (size.batch, size.seq_len, H, P), "b": (size.batch, size.seq_len, G, N)}
    forward, backward = operator_flops(shapes, policy)
    mixed, projected = E + 2 * G * N, 2 * E + 2 * G * N + H
    state = size.batch * H * P * N * wide
    total = (
        blocks.linear(n, M, projected, policy.use_bias, itemsize)
        + blocks.convolution(n, mixed, W, policy.use_conv_bias, itemsize)
        + blocks.linear(n, E, M, policy.use_bias, itemsize)
    )
    if policy.rms_norm:
        total = total + blocks.gated_norm(n, E, G, itemsize) + Cost(saved_bytes=n * E * itemsize)
    return total + Cost(
        parameters=3 * H,
        fp32_parameters=3 * H,
        forward_flops=forward,
        backward_flops=backward,
        forward_bytes=n * (projected + E) * itemsize + state,
        backward_bytes=2 * n * (projected + E) * itemsize + state,
        saved_bytes=n * (M + projected + mixed + E) * itemsize + state,
        workspace_bytes=_workspace(policy, size),
        state_bytes=state + size.batch * mixed * (W - 1) * itemsize,
    )


def _workspace(policy: Mamba2Policy, size: MixerSize) -> int:
    """The largest transient in the operator's backward, less what the gate and the norm have let go by then."""
    B, T, M = size.batch, size.seq_len, size.hidden_size
    E, H, N, G = policy.channels(M), policy.heads(M), policy.state_size, policy.n_groups
    n, wide = size.tokens, max(size.itemsize, FP32)
    gradients = n * (2 * E + E + 2 * G * N + H) * size.itemsize
    let_go = n * 3 * E * size.itemsize if policy.rms_norm else 0
    if size.kernel == "eager":
        # every token's state, its decay, what is written to it, and the gradients on the way
        return gradients - let_go + 4 * n * E * N * wide
    if size.kernel == "triton":
        # states before chunks, B's and C's gradients in fp32, and of each head's tokens four sums and their decay
        held = n * E * N // min(CHUNK if size.itemsize < FP32 else NARROW, T) * size.itemsize
        return gradients - let_go + min(held, HELD) + (2 * n * G * N + 5 * n * H) * FP32
    chunk = min(policy.chunk_size, CHUNK, T)
    states = n * E * N // chunk
    # a block of chunks: nine tensors as wide as x, four of states, three of scores, six as wide as B
    tokens = B * chunk * min(-(-T // chunk), max(1, BLOCK_ELEMENTS // (B * H * chunk * max(chunk, policy.head_dim))))
    block = tokens * (9 * E + 4 * E * N // chunk + 3 * H * chunk + 6 * G * N)
    return gradients - let_go + (states + block) * wide
