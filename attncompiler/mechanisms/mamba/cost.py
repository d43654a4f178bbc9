"""What Mamba costs. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attncompiler.blocks import cost as blocks
from attncompiler.mechanisms.base import Cost, MixerSize
from attncompiler.mechanisms.mamba.mechanism import MambaPolicy

FP32 = 4
BUFFER_ELEMENTS = 2**19
"""of a chunk's states in the chunkwise kernel: some megabytes"""
CHUNK, MANY, ROWS = 64, 8, 4
"""Of the Triton kernel's backward: tokens between the states that it keeps, of which each is N·4 bytes of each channel;
blocks of channels whose shares of the gradients of B and C a program adds, 8·N bytes a token for so many; and tokens
between the states that a program keeps inside a chunk, in memory of its own"""
FEW_ROWS, WIDE = 2, 128
"""In the place of ROWS where a channel's state has more than so many numbers, beside which four tokens spill"""
HELD = 512
"""numbers of state of a block: of 16 each, 32 channels; half as many of 33 to 128 each"""
RESIDENT = 1056
"""programs of an H100 or H200 together, 8 for each of 132 multiprocessors"""


def operator_flops(shapes: Mapping[str, tuple[int, ...]], options: Any) -> tuple[int, int]:
    """FLOPs forward and backward of one call, as the recurrence counts them; none run in matrix units.

    `shapes` holds u (B, T, E) and a (E, N). A token decays the state, writes to it and reads it: three multiply-adds
    for each of its numbers. The backward makes the state again (two), carries its gradient back (two), and has one each
    for the gradients of u, B, C and of the decay. exp is not counted.
    """
    B, T, E = shapes["u"]
    product = 2 * B * T * E * shapes["a"][1]
    return 3 * product, 8 * product


def cost(policy: MambaPolicy, size: MixerSize) -> Cost:
    """Projections, the causal convolution and the scan.

    Autograd keeps the layer's input, the first projection (u and z), the convolution's output, what it is projected to,
    the time steps, A, and the scan's outputs.
    """
    M, N, W = size.hidden_size, policy.state_size, policy.conv_kernel
    E, R = policy.channels(M), policy.rank(M)
    n, itemsize, wide = size.tokens, size.itemsize, max(size.itemsize, FP32)
    forward, backward = operator_flops({"u": (size.batch, size.seq_len, E), "a": (E, N)}, policy)
    state = size.batch * E * N * wide
    rows = n * (4 * E + 2 * N) * itemsize
    total = (
        blocks.linear(n, M, 2 * E, policy.use_bias, itemsize)
        + blocks.convolution(n, E, W, policy.use_conv_bias, itemsize)
        + blocks.linear(n, E, R + 2 * N, False, itemsize)
        + blocks.linear(n, R, E, True, itemsize)
        + blocks.linear(n, E, M, policy.use_bias, itemsize)
    )
    if policy.dt_bc_norm:
        for width in (R, N, N):
            total = total + blocks.norm("rmsnorm", n, width, itemsize)
    return total + Cost(
        parameters=E * N + E,
        fp32_parameters=E * N + 2 * E,
        forward_flops=forward,
        backward_flops=backward,
        forward_vector_flops=forward,
        backward_vector_flops=backward,
        forward_bytes=rows + n * E * itemsize + state,
        backward_bytes=2 * rows + 2 * n * E * itemsize + state,
        saved_bytes=n * (M + 5 * E + R + 2 * N) * itemsize + state + 2 * E * N * FP32,
        # gradients of the output and of what the scan is given, beside what the kernel itself holds
        workspace_bytes=rows + _kernel_workspace(policy, size),
        state_bytes=state + size.batch * E * (W - 1) * itemsize,
    )


def _kernel_workspace(policy: MambaPolicy, size: MixerSize) -> int:
    """The largest transient inside a kernel, which is its backward's, beside inputs, outputs and their gradients."""
    width = size.batch * policy.channels(size.hidden_size)
    state = width * policy.state_size * max(size.itemsize, FP32)
    if size.kernel == "eager":
        # every token's state, its decay, what is written to it, and the gradients on the way
        return 4 * size.seq_len * state
    if size.kernel == "triton":
        rows = ROWS if policy.state_size <= WIDE else FEW_ROWS
        held = HELD // 2 if 32 < policy.state_size <= 128 else HELD
        blocks = -(-width * policy.state_size // held)
        chunks = -(-size.seq_len // CHUNK)
        many = max(1, min(MANY, blocks * chunks // RESIDENT))
        programs = min(RESIDENT, -(-blocks // many) * chunks)
        # states before chunks (with tokens of bf16 they take half), shares, states inside a chunk, and those around
        # the groups of tokens, forward and back
        shares = 2 * -(-blocks // (many * size.batch)) * size.tokens * policy.state_size * FP32
        return chunks * state + shares + programs * held * FP32 * (CHUNK // rows + 2 * many)
    chunk = min(size.seq_len, max(8, min(64, BUFFER_ELEMENTS // (width * policy.state_size))))
    # the state before each chunk; decays, states and gradients of the states in one chunk
    return (-(-size.seq_len // chunk) + 4 * chunk) * state
