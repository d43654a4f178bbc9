"""Time steps of all tokens and heads: Δ = clamp(softplus(dt + bias)), 0 on padding, and its gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attncompiler.blocks.gpu import parts, power_of_2
from attncompiler.blocks.launching.launcher import Launcher, known_by
from attncompiler.blocks.launching.numbers import softplus
from attncompiler.mechanisms.mamba2.op import Mamba2Options
from attncompiler.mechanisms.mamba2.recurrence.heads import Dots

TOKENS, HEADS, HEADS_BACKWARD = 64, 32, 8
"""of a program at most: the heads' numbers lie side by side in `dt`, the tokens' in what is made of it"""


@triton.jit
def raw_steps(dt, batch, token, head, bias, real, T, H, C: tl.constexpr, BLOCK_H: tl.constexpr):
    """Of a program: dt + bias of its tokens and heads (C, BLOCK_H), by which of them there are and are no padding; and
    its sequence, tokens and heads."""
    blocks, tiles = tl.cdiv(H, BLOCK_H), tl.cdiv(T, C)
    place = tl.program_id(0) // blocks
    b, t = place // tiles, place % tiles * C + tl.arange(0, C)
    h = tl.program_id(0) % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    there = t < T
    if real is not None:
        there &= tl.load(real + b.to(tl.int64) * T + t, mask=there, other=0) != 0
    inside = there[:, None] & (h < H)[None, :]
    at = dt + b.to(tl.int64) * batch + t.to(tl.int64)[:, None] * token + h.to(tl.int64)[None, :] * head
    raw = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        raw += tl.load(bias + h, mask=h < H, other=0.0)[None, :]
    return raw, inside, b, t, h


@triton.jit(do_not_specialize=["T", "H", "low", "high"])
def steps_kernel(
    dt, batch, token, head, bias, a, real, delta, decay, T, H, low, high,
    SOFTPLUS: tl.constexpr, C: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Δ and the decays Δ·A (B, H, T), fp32, of dt (B, T, H) by strides."""
    raw, inside, b, t, h = raw_steps(dt, batch, token, head, bias, real, T, H, C, BLOCK_H)
    step = softplus(raw)[0] if SOFTPLUS else raw
    step = tl.where(step < low, low, step)  # a maximum would swallow NaN
    step = tl.where(inside, tl.where(step > high, high, step), 0.0)
    at = (b.to(tl.int64) * H + h)[None, :] * T + t[:, None]
    here = (t < T)[:, None] & (h < H)[None, :]
    tl.store(delta + at, step, mask=here)
    tl.store(decay + at, step * tl.load(a + h, mask=h < H, other=0.0)[None, :], mask=here)


class Sums(NamedTuple):
    """The gradients that a program sums over its tokens, (tiles, H); None where nobody asks."""

    a: Any
    bias: Any
    skip: Any


@triton.jit
def of_heads(array, at, here):
    """Numbers (B, H, T) of a program's tokens and heads."""
    return tl.load(array + at, mask=here, other=0.0)


@triton.jit(do_not_specialize=["T", "H", "low", "high"])
def steps_backward_kernel(
    dots, passing, delta, a, dt, batch, token, head, bias, real, out, sums, T, H, low, high,
    SOFTPLUS: tl.constexpr, BLOCKS: tl.constexpr, C: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The gradients of dt (B, T, H) and, summed over each chunk of C tokens, of A, the bias and D.

    A decay passes on what reaches rows at it or behind it from before the chunk; what columns before it give to what is
    behind the chunk; the pairs around it; and what passes the whole chunk, `passing` (BLOCKS, B, H, chunks).
    """
    raw, inside, b, t, h = raw_steps(dt, batch, token, head, bias, real, T, H, C, BLOCK_H)
    here = (t < T)[:, None] & (h < H)[None, :]
    both = b.to(tl.int64) * H + h
    at = both[None, :] * T + t[:, None]
    step, slope = raw, tl.where(inside, 1.0, 0.0)
    if SOFTPLUS:
        step, small = softplus(raw)
        slope *= tl.where(raw > 0, 1.0, small) / (1 + small)
    slope = tl.where((step < low) | (step > high), 0.0, slope)

    ends = of_heads(dots.ends, at, here)
    decay = of_heads(dots.between, at, here) + tl.cumsum(ends, 0) - ends
    decay += tl.cumsum(of_heads(dots.starts, at, here), 0, reverse=True)
    chunks = tl.cdiv(T, C)
    chunk = tl.program_id(0) // tl.cdiv(H, BLOCK_H) % chunks
    heads = tl.num_programs(0) // (tl.cdiv(H, BLOCK_H) * chunks) * H  # B · H
    for block in tl.static_range(BLOCKS):
        row = block * heads.to(tl.int64) + both
        decay += tl.load(passing + row * chunks + chunk, mask=h < H, other=0.0)[None, :]
    decay = tl.where(inside, decay, 0.0)
    found = of_heads(dots.given, at, here) + decay * tl.load(a + h, mask=h < H, other=0.0)[None, :]
    found = tl.where(slope == 0, 0.0, found * slope)
    to = out + (b.to(tl.int64) * T + t)[:, None] * H + h[None, :]
    tl.store(to, found.to(out.dtype.element_ty), mask=here)
    place = (tl.program_id(0) // tl.cdiv(H, BLOCK_H)).to(tl.int64) * H + h
    tl.store(sums.a + place, tl.sum(decay * of_heads(delta, at, here), 0), mask=h < H)
    if sums.bias is not None:
        tl.store(sums.bias + place, tl.sum(found, 0), mask=h < H)
    if sums.skip is not None:
        tl.store(sums.skip + place, tl.sum(of_heads(dots.skipped, at, here), 0), mask=h < H)


STEPS, STEPS_BACKWARD = Launcher(steps_kernel), Launcher(steps_backward_kernel)


def _tiles(T: int, H: int) -> tuple[int, int]:
    return min(TOKENS, max(16, power_of_2(T))), min(HEADS, power_of_2(H))


def time_steps(
    dt: Tensor, bias: Tensor | None, a: Tensor, real: Tensor | None, options: Mamba2Options
) -> tuple[Tensor, Tensor]:
    """Δ, and the decays Δ·A: (B, H, T) in fp32, of dt (B, T, H)."""
    B, T, H = dt.shape
    tokens, heads = _tiles(T, H)
    delta, decay = (torch.empty(B, H, T, dtype=torch.float32, device=dt.device) for _ in range(2))
    STEPS(
        (B * parts(T, tokens) * parts(H, heads),),
        (known_by(dt, bias, a, real), options.dt_softplus),
        *(dt, *dt.stride(), _whole(bias), _whole(a), _numbers(real), delta, decay, T, H, *options.dt_limit),
        *(options.dt_softplus, tokens, heads),
    )
    return delta, decay


def time_steps_gradient(
    dots: Dots, passing: Tensor, delta: Tensor, a: Tensor, dt: Tensor, bias: Tensor | None, real: Tensor | None,
    tokens: int, options: Mamba2Options,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The gradient of dt (B, T, H), in its dtype, and those of A, the bias and D (H), by what chunks of so many tokens
    gave."""
    B, T, H = dt.shape
    heads = min(HEADS_BACKWARD, power_of_2(H))
    out = torch.empty(B, T, H, dtype=dt.dtype, device=dt.device)
    names = ["a", *(["dt_bias"] if bias is not None else []), *(["d"] if dots.skipped is not None else [])]
    sums = torch.empty(len(names), B * parts(T, tokens), H, dtype=torch.float32, device=dt.device)
    found = dict(zip(names, sums, strict=True))
    STEPS_BACKWARD(
        (B * parts(T, tokens) * parts(H, heads),),
        (known_by(dt, bias, a, real), options.dt_softplus, dots.skipped is None, len(passing), tokens),
        *(dots, passing, delta, _whole(a), dt, *dt.stride(), _whole(bias), _numbers(real), out),
        *(Sums(found["a"], found.get("dt_bias"), found.get("d")), T, H, *options.dt_limit),
        *(options.dt_softplus, len(passing), tokens, heads),
    )
    return out, {name: each.sum(0) for name, each in found.items()}  # no two in one tensor


def _whole(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _numbers(real: Tensor | None) -> Tensor | None:
    return None if real is None else real.contiguous().view(torch.uint8)
