"""One token of every sequence: the state is read and written once, by one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attncompiler.blocks.gpu import parts, power_of_2
from attncompiler.blocks.launching.launcher import Launcher, known_by
from attncompiler.blocks.launching.numbers import LOG2E
from attncompiler.blocks.recurrence.launch import Map
from attncompiler.blocks.recurrence.passes import mapped
from attncompiler.blocks.recurrence.step import each_head, is_real, of_row, row, there, warps_for, whole
from attncompiler.mechanisms.linear_attention.op import LinearAttentionOptions
from attncompiler.runtime.implementation import Tensors

NUMBERS, EACH = 4096, 32
"""of a state: for a program, and for a thread, whose loads are all under way at once"""
LEAST_COLUMNS = 32
"""of a program, side by side in memory: 128 bytes of each row"""


@triton.jit
def features(x, inside, MAP: tl.constexpr):
    """φ of a head's numbers; 0 where they are not `inside`."""
    return x if MAP == "none" else tl.where(inside, mapped(x, MAP), 0.0)


@triton.jit(do_not_specialize=["H", "eps", "scale"])
def step_kernel(
    q, k, v, decay, real, initial_s, initial_z, initial_m, out, normalizer, final_s, final_z, final_m, H, eps, scale,
    MAP: tl.constexpr, NORMALIZE: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A program takes BLOCK_V columns of one head's state S (R, V), and all of z.

    q, k, v and decay are Rows, `real` (B,) uint8; the others are contiguous: S (B, H, R, V), z (B, H, R), m and the
    normaliser (B, H), out (B, H, V).
    """
    BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    block, both = tl.program_id(0) % BLOCKS, (tl.program_id(0) // BLOCKS).to(tl.int64)
    b, h = both // H, both % H
    r, c = tl.arange(0, BLOCK_R), block * BLOCK_V + tl.arange(0, BLOCK_V)
    at = both * (R * V) + r[:, None] * V + c[None, :]
    inside = (r < R)[:, None] & (c < V)[None, :]
    real_token = is_real(real, b)
    if initial_s is not None:  # all loads first: they are on their way where threads wait for one another
        before = tl.load(initial_s + at, mask=inside, other=0.0)
        before_z = tl.load(initial_z + both * R + r, mask=r < R, other=0.0)
        logarithm = tl.load(initial_m + both)
        if decay.ptr is not None:
            logarithm += of_row(decay, b, h, 0, real_token)
    inside_row = (r < R) & real_token
    query, z = of_row(q, b, h, r, inside_row), of_row(k, b, h, r, inside_row)
    value = of_row(v, b, h, c, (c < V) & real_token)

    query, z = features(query, inside_row, MAP), features(z, inside_row, MAP)
    s = z[:, None] * value[None, :]
    if initial_s is not None:
        kept = tl.exp2(logarithm * LOG2E)
        s += kept * before
        z += kept * before_z
    tl.store(final_s + at, s, mask=inside)
    tl.store(final_z + both * R + r, z, mask=(r < R) & (block == 0))
    tl.store(final_m + both, 0.0, mask=block == 0)
    found = scale * tl.sum(query[:, None] * s, 0)
    total = 1.0
    if NORMALIZE:
        total = tl.where(real_token, tl.sum(query * z, 0) + eps, 1.0)
        found /= total
    tl.store(normalizer + both, total, mask=block == 0)
    found = tl.where(real_token, found, 0.0)  # where the state is not finite, 0 times it is not 0
    tl.store(out + both * V + c, found.to(out.dtype.element_ty), mask=c < V)


STEP = Launcher(step_kernel)


def step(inputs: Tensors, options: LinearAttentionOptions, map: Map) -> dict[str, Tensor]:
    """What `forward` gives, of one token of every sequence: which sees itself alone, whether causal or not."""
    (B, _, H, R), V = inputs["q"].shape, inputs["v"].shape[-1]
    rows = *(row(inputs[name]) for name in "qkv"), each_head(inputs.get("log_decay"))
    real = there(inputs.get("attention_mask"))
    initial = [whole(inputs.get(name)) for name in ("initial_s", "initial_z", "initial_m")]
    out = torch.empty(B, 1, H, V, dtype=inputs["v"].dtype, device=inputs["v"].device)
    normalizer, s, z, m = (
        torch.empty(shape, dtype=torch.float32, device=out.device)
        for shape in ((B, 1, H), (B, H, R, V), (B, H, R), (B, H))
    )
    wide = power_of_2(R)
    columns = min(power_of_2(V), max(LEAST_COLUMNS, NUMBERS // wide))
    constants = map, options.normalize, R, V, wide, columns
    STEP(
        (B * H * parts(V, columns),),
        (known_by(*(each.ptr for each in rows), real, *initial), constants),
        *(*rows, real, *initial, out, normalizer, s, z, m, H, options.eps, options.scale, *constants),
        num_warps=warps_for(wide * columns, EACH),
    )
    return {"out": out, "normalizer": normalizer, "final_s": s, "final_z": z, "final_m": m}
