"""One token of every sequence: the state is read and written once, by one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attncompiler.blocks.gpu import parts, power_of_2
from attncompiler.blocks.launching.launcher import Launcher, known_by
from attncompiler.blocks.launching.numbers import LOG2E, sigmoid, softplus
from attncompiler.blocks.recurrence.step import is_real, of_row, row, there, warps_for, whole
from attncompiler.mechanisms.mamba.op import MambaOptions
from attncompiler.mechanisms.mamba.recurrence.passes import block_of
from attncompiler.runtime.implementation import Tensors

NUMBERS, EACH = 2048, 16
"""of a state: for a program, and for a thread, whose loads are all under way at once"""


@triton.jit
def step_kernel(
    u, dt, gate, write, read, a, d, bias, real, initial, out, final,
    SOFTPLUS: tl.constexpr, E: tl.constexpr, G: tl.constexpr, N: tl.constexpr, C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program takes C channels of one group of one sequence, with their N numbers of state.

    u, dt, gate, write (B) and read (C) are Rows; the others are contiguous: a (E, N), d and bias (E), `real` (B,)
    uint8, states (B, E, N) and out (B, E).
    """
    first, end, group, b = block_of(tl.program_id(0), E, G, C)
    b = b.to(tl.int64)
    e, n = first + tl.arange(0, C), tl.arange(0, BLOCK_N)
    at = e.to(tl.int64)[:, None] * N + n[None, :]
    inside = (e < end)[:, None] & (n < N)[None, :]
    real_token = is_real(real, b)
    if initial is not None:  # all loads first: they are on their way where threads wait for one another
        before = tl.load(initial + b * (E * N) + at, mask=inside, other=0.0)
        rate = tl.load(a + at, mask=inside, other=0.0)
    inside_row = (e < end) & real_token
    step = of_row(dt, b, 0, e, inside_row)
    value = of_row(u, b, 0, e, inside_row)
    column = of_row(write, b, group.to(tl.int64), n, (n < N) & real_token)
    row = of_row(read, b, group.to(tl.int64), n, (n < N) & real_token)
    if bias is not None:
        step += tl.load(bias + e, mask=e < end, other=0.0)
    if d is not None:
        skipped = tl.load(d + e, mask=e < end, other=0.0)
    if gate.ptr is not None:
        z = of_row(gate, b, 0, e, inside_row)

    if SOFTPLUS:
        step = softplus(step)[0]
    step = tl.where(inside_row, step, 0.0)
    state = (step * value)[:, None] * column[None, :]
    if initial is not None:
        state += tl.exp2((step * LOG2E)[:, None] * rate) * before
    tl.store(final + b * (E * N) + at, state, mask=inside)
    found = tl.sum(state * row[None, :], 1)
    if d is not None:
        found += value * skipped
    if gate.ptr is not None:
        found *= z * sigmoid(z)
    found = tl.where(inside_row, found, 0.0)  # where the state is not finite, 0 times it is not 0
    tl.store(out + b * E + e, found.to(out.dtype.element_ty), mask=e < end)


STEP = Launcher(step_kernel)


def step(inputs: Tensors, options: MambaOptions) -> dict[str, Tensor]:
    """What `forward` gives, of one token of every sequence."""
    u = inputs["u"]
    (B, _, E), (G, N) = u.shape, inputs["b"].shape[2:]
    rows = (*(row(inputs.get(name)) for name in ("u", "dt", "z", "b", "c")),)
    others = (
        *(whole(inputs.get(name)) for name in ("a", "d", "dt_bias")),
        *(there(inputs.get("attention_mask")), whole(inputs.get("initial_state"))),
    )
    out = torch.empty(B, 1, E, dtype=u.dtype, device=u.device)
    final = torch.empty(B, E, N, dtype=torch.float32, device=u.device)
    wide = power_of_2(N)
    channels = min(power_of_2(E // G), max(1, NUMBERS // wide))
    constants = options.dt_softplus, E, G, N, channels, wide
    STEP(
        (B * G * parts(E // G, channels),),
        (known_by(*(each.ptr for each in rows), *others), constants),
        *(*rows, *others, out, final, *constants),
        num_warps=warps_for(wide * channels, EACH),
    )
    return {"out": out, "final_state": final}
