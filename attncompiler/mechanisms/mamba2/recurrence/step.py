"""One token of every sequence: the state is read and written once, by one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attncompiler.blocks.gpu import parts, power_of_2
from attncompiler.blocks.launching.launcher import Launcher, known_by
from attncompiler.blocks.launching.numbers import LOG2E, sigmoid, softplus
from attncompiler.blocks.recurrence.passes import Skip
from attncompiler.blocks.recurrence.step import each_head, is_real, of_row, row, there, warps_for, whole
from attncompiler.mechanisms.mamba2.op import Mamba2Options
from attncompiler.runtime.implementation import Tensors

NUMBERS, EACH = 2048, 16
"""of a state: for a program, and for a thread, whose loads are all under way at once"""


@triton.jit(do_not_specialize=["H", "share", "low", "high"])
def step_kernel(
    x, dt, gate, write, read, skip, a, bias, real, initial, out, final, H, share, low, high,
    SOFTPLUS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program takes BLOCK_P rows of one head's state (P, N), a head being one of `share` that read a group's B and C.

    x, dt, gate, write (B) and read (C) are Rows, skip is D; the others are contiguous: a and bias (H), `real` (B,)
    uint8, states (B, H, P, N) and out (B, H, P).
    """
    BLOCKS: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    block, both = tl.program_id(0) % BLOCKS, (tl.program_id(0) // BLOCKS).to(tl.int64)
    b, h = both // H, both % H
    p, n = block * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    at = both * (P * N) + p[:, None] * N + n[None, :]
    inside = (p < P)[:, None] & (n < N)[None, :]
    real_token = is_real(real, b)
    if initial is not None:  # all loads first: they are on their way where threads wait for one another
        before = tl.load(initial + at, mask=inside, other=0.0)
    rate = tl.load(a + h)
    step = of_row(dt, b, h, 0, real_token)
    if bias is not None:
        step += tl.load(bias + h)
    inside_row = (p < P) & real_token
    value = of_row(x, b, h, p, inside_row)
    column = of_row(write, b, h // share, n, (n < N) & real_token)
    row = of_row(read, b, h // share, n, (n < N) & real_token)
    if skip.ptr is not None:
        skipped = tl.load(skip.ptr + h * skip.head + p * skip.width, mask=p < P, other=0.0)
    if gate.ptr is not None:
        z = of_row(gate, b, h, p, inside_row)

    if SOFTPLUS:
        step = softplus(step)[0]
    step = tl.where(step < low, low, step)  # a maximum would swallow NaN
    step = tl.where(real_token, tl.where(step > high, high, step), 0.0)
    state = (step * value)[:, None] * column[None, :]
    if initial is not None:
        state += tl.exp2(step * rate * LOG2E) * before
    tl.store(final + at, state, mask=inside)
    found = tl.sum(state * row[None, :], 1)
    if skip.ptr is not None:
        found += value * skipped
    if gate.ptr is not None:
        found *= z * sigmoid(z)
    found = tl.where(real_token, found, 0.0)  # where the state is not finite, 0 times it is not 0
    tl.store(out + both * P + p, found.to(out.dtype.element_ty), mask=p < P)


STEP = Launcher(step_kernel)


def step(inputs: Tensors, options: Mamba2Options) -> dict[str, Tensor]:
    """What `forward` gives, of one token of every sequence."""
    x, d = inputs["x"], inputs.get("d")
    (B, _, H, P), (G, N) = x.shape, inputs["b"].shape[2:]
    rows = row(x), each_head(inputs["dt"]), row(inputs.get("z")), row(inputs["b"]), row(inputs["c"])
    skip = Skip(None, 0, 0) if d is None else Skip(d, d.stride(0), d.stride(1) if d.dim() == 2 else 0)
    others = (
        *(whole(inputs["a"]), whole(inputs.get("dt_bias"))),
        *(there(inputs.get("attention_mask")), whole(inputs.get("initial_state"))),
    )
    out = torch.empty(B, 1, H, P, dtype=x.dtype, device=x.device)
    final = torch.empty(B, H, P, N, dtype=torch.float32, device=x.device)
    wide = power_of_2(N)
    heights = min(power_of_2(P), max(1, NUMBERS // wide))
    constants = options.dt_softplus, P, N, heights, wide
    STEP(
        (B * H * parts(P, heights),),
        (known_by(*(each.ptr for each in rows), d, *others), constants),
        *(*rows, skip, *others, out, final, H, H // G, *options.dt_limit, *constants),
        num_warps=warps_for(wide * heights, EACH),
    )
    return {"out": out, "final_state": final}
