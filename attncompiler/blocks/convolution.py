"""Depthwise causal convolution along the sequence, channels last, with its activation.

It is an operator of its own (`attncompiler::causal_conv1d`). On a GPU it is compiled by Triton (`streaming/`); on a CPU
the taps are several times faster block by block, each block's rows staying in the cache, than as passes over the whole
sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attncompiler.blocks.gpu import takes_triton
from attncompiler.blocks.segments import run_numbers
from attncompiler.blocks.tangents import refuse_tangents

BLOCK_ELEMENTS = 2**18


class CausalConv1d(nn.Module):
    """y[t] = silu(bias + Σ_j weight[:, 0, W−1−j] · x[t−j]), j from 0 to W−1, each channel by itself.

    weight (E, 1, W) and bias (E,) as in torch's depthwise Conv1d. Sums are taken in fp32 for lower dtypes.
    """

    def __init__(self, channels: int, width: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, T, E) → y (B, T, E) in x's dtype, and the new state where one was given.

        `attention_mask` (B, T) is non-zero for real tokens, on one side of the padding; padding reads as 0 and gives 0.
        No tap crosses the start of a segment of `segment_ids` (B, T). `state` is the layer's decode state: its "conv"
        (B, E, W−1) holds the inputs of the last W−1 real tokens before the first; with it padding may lie anywhere.
        """
        refuse_tangents("the causal convolution", (x, self.weight))
        mask = None if attention_mask is None else attention_mask != 0
        runs = None if segment_ids is None else run_numbers(segment_ids, mask)
        if state is not None:
            return self._step(x, mask, runs, state["conv"])
        return causal_conv1d(x, self.weight, self.bias, runs, mask), None

    def _step(self, x: Tensor, mask: Tensor | None, runs: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        """Real tokens follow the state, and padding follows them: so every tap finds the token it means."""
        before = state.shape[-1]
        order = None
        if mask is not None:
            order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
            x = x.masked_fill(~mask[..., None], 0).gather(1, order[..., None].expand_as(x))
            runs = None if runs is None else runs.gather(1, order)
        y = causal_conv1d(x, self.weight, self.bias, runs, None, state)
        # the last rows of the state and of what may follow it
        follows = x[:, max(0, x.shape[1] - before) :] if mask is None else x
        joined = torch.cat([state.transpose(1, 2).to(x.dtype), follows], 1)
        last = joined[:, follows.shape[1] :]
        runs = None if runs is None else F.pad(runs, (before, 0))[:, x.shape[1] - follows.shape[1] :]
        if mask is not None and order is not None:
            y = y.gather(1, order.argsort(1)[..., None].expand_as(y)).masked_fill(~mask[..., None], 0)
            index = mask.sum(1, keepdim=True) + torch.arange(before, device=x.device)
            last = joined.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
            runs = None if runs is None else F.pad(runs.gather(1, index), (x.shape[1], 0))
        if runs is not None:
            ended = runs[:, follows.shape[1] :]
            last = last.masked_fill((ended != ended[:, -1:])[..., None], 0)
        # in memory of its own: a view would hold all tokens of the step
        return y, last.transpose(1, 2).to(state.dtype, copy=True, memory_format=torch.contiguous_format)

    def initial_value(self, name: str, generator: torch.Generator) -> Tensor:
        """Uniform within ±1/√W, torch's own scheme for a depthwise convolution."""
        bound = self.weight.shape[-1] ** -0.5
        shape = self.weight.shape if name == "weight" else self.weight.shape[:1]
        return torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, width={self.weight.shape[-1]}, bias={self.bias is not None}, silu"


STREAMING = "attncompiler.blocks.streaming.convolution"
"""imported where it runs, since Triton may not be installed"""
WIDEST = 4
"""taps at most that it holds in registers; of 8 it spills"""


def streams(x: Tensor, weight: Tensor) -> bool:
    """Whether Triton's form is the one that runs."""
    return weight.shape[-1] <= WIDEST and takes_triton(x, weight)


@torch.library.custom_op("attncompiler::causal_conv1d", mutates_args=())
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    runs: Tensor | None,
    real: Tensor | None = None,
    before: Tensor | None = None,
) -> Tensor:
    """x (B, T, E), weight (E, 1, W), bias (E,), runs (B, T) rising from 0 where segments begin → silu of the sums.

    Tokens that `real` (B, T) bool says are none read as 0 and give 0. `before` (B, E, W−1) are the inputs of the tokens
    before the first, which are of the run 0.
    """
    if streams(x, weight):
        return import_module(STREAMING).forward(x, weight, bias, runs, real, before)
    x, runs, kept = _joined(x, runs, real, before)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    taps = _taps(x, weight)
    for start, stop, rows in _blocks(x, weight):
        y[:, start:stop] = F.silu(_sums(rows, start, stop, taps, bias, runs))
    if real is not None:
        y[:, kept:].masked_fill_(~real[..., None], 0)
    return y[:, kept:].contiguous()


@causal_conv1d.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    runs: Tensor | None,
    real: Tensor | None = None,
    before: Tensor | None = None,
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("attncompiler::causal_conv1d_backward", mutates_args=())
def causal_conv1d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    runs: Tensor | None,
    real: Tensor | None,
    before: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias and before (without one: of the bias that is not there, and of no state)."""
    if streams(x, weight):
        found = import_module(STREAMING).backward(grad, x, weight, bias, runs, real, before)
        return *found[:3], x.new_empty(0) if found[3] is None else found[3]
    if real is not None:
        grad = grad.masked_fill(~real[..., None], 0)
    x, runs, kept = _joined(x, runs, real, before)
    grad = F.pad(grad, (0, 0, kept, 0)) if kept else grad
    d_x, d_weight, d_bias = _gradients(grad, x, weight, bias, runs)
    if real is not None:
        d_x[:, kept:].masked_fill_(~real[..., None], 0)
    if before is None:
        return d_x, d_weight, d_bias, d_x.new_empty(0)
    d_before = d_x[:, :kept].mT.to(before.dtype, copy=True, memory_format=torch.contiguous_format)
    return d_x[:, kept:].clone(memory_format=torch.contiguous_format), d_weight, d_bias, d_before


@causal_conv1d_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    runs: Tensor | None,
    real: Tensor | None,
    before: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_bias = weight.new_empty(weight.shape[0]) if bias is None else bias.new_empty(bias.shape)
    d_before = x.new_empty(0) if before is None else before.new_empty(before.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), d_bias, d_before


def _setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, runs, real, before = ctx.saved_tensors
    d_x, d_weight, d_bias, d_before = causal_conv1d_backward(grad, x, weight, bias, runs, real, before)
    return d_x, d_weight, None if bias is None else d_bias, None, None, None if before is None else d_before


causal_conv1d.register_autograd(_backward, setup_context=_setup_context)


def _joined(
    x: Tensor, runs: Tensor | None, real: Tensor | None, before: Tensor | None
) -> tuple[Tensor, Tensor | None, int]:
    """x, with 0 for padding, and runs behind what comes before them, and how many rows that is."""
    if real is not None:
        x = x.masked_fill(~real[..., None], 0)
    if before is None:
        return x, runs, 0
    kept = before.shape[-1]
    return torch.cat([before.mT.to(x.dtype), x], 1), None if runs is None else F.pad(runs, (kept, 0)), kept


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, runs: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, weight and bias, in torch."""
    taps = _taps(x, weight)
    W, E = taps.shape
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_taps, d_bias = torch.zeros_like(taps), taps.new_zeros(E)
    onward = taps.new_zeros(x.shape[0], W - 1, E)  # what the block behind gives to the last rows of this one
    for start, stop, rows in reversed(list(_blocks(x, weight))):
        halo = rows.shape[1] - (stop - start)
        sums = _sums(rows, start, stop, taps, bias, runs)
        sigmoid = torch.sigmoid(sums)
        d_sums = sums.mul_(1 - sigmoid).add_(1).mul_(sigmoid).mul_(grad[:, start:stop])
        d_bias += d_sums.sum((0, 1))
        d_rows = torch.zeros_like(rows)
        reach = min(W - 1, stop - start)
        for j, source, target in _shifts(W, halo, stop - start):
            moved = d_sums[:, target]
            if runs is not None and j:
                moved = moved * _same(runs, start, j, target)[..., None]
            d_rows[:, source].addcmul_(moved, taps[W - 1 - j])
            d_taps[W - 1 - j] += (moved * rows[:, source]).sum((0, 1))
        own = d_rows[:, halo:]
        own[:, own.shape[1] - reach :] += onward[:, W - 1 - reach :]
        d_x[:, start:stop] = own
        passed = F.pad(onward[:, : W - 1 - reach], (0, 0, reach, 0))
        passed[:, W - 1 - halo :] += d_rows[:, :halo]
        onward = passed
    d_weight = d_taps.T[:, None].to(weight.dtype, memory_format=torch.contiguous_format, copy=True)
    return d_x, d_weight, d_bias.to(weight.dtype if bias is None else bias.dtype, copy=True)


def _taps(x: Tensor, weight: Tensor) -> Tensor:
    """The weights as rows (W, E), in the dtype of the sums."""
    return weight[:, 0].T.to(torch.promote_types(x.dtype, torch.float32), memory_format=torch.contiguous_format)


def _blocks(x: Tensor, weight: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Ranges of tokens, each with its rows of x and up to W−1 rows before them; on a GPU one block is best."""
    B, T, E = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    size = max(32, BLOCK_ELEMENTS // max(1, B * E)) if x.device.type == "cpu" else max(1, T)
    for start in range(0, T, size):
        stop = min(start + size, T)
        yield start, stop, x[:, max(0, start - weight.shape[-1] + 1) : stop].to(wide)


def _shifts(W: int, halo: int, length: int) -> Iterator[tuple[int, slice, slice]]:
    """For each distance j: the rows (of a block with its halo) it reads, and the tokens (of the block) that read."""
    for j in range(W):
        first = max(0, j - halo)
        if first < length:
            yield j, slice(first + halo - j, length + halo - j), slice(first, length)


def _same(runs: Tensor, start: int, j: int, target: slice) -> Tensor:
    """Whether the tokens of a block are of the same run as those j before them."""
    first, last = start + target.start, start + target.stop
    return runs[:, first:last] == runs[:, first - j : last - j]


def _sums(rows: Tensor, start: int, stop: int, taps: Tensor, bias: Tensor | None, runs: Tensor | None) -> Tensor:
    """bias + Σ_j taps[W−1−j] · x[t−j] for the tokens of a block (B, stop − start, E)."""
    W, halo = taps.shape[0], rows.shape[1] - (stop - start)
    own = rows[:, halo:]
    sums = own * taps[-1] if bias is None else torch.addcmul(bias.to(taps.dtype), own, taps[-1])
    for j, source, target in _shifts(W, halo, stop - start):
        if j:
            moved = rows[:, source]
            if runs is not None:
                moved = moved * _same(runs, start, j, target)[..., None]
            sums[:, target].addcmul_(moved, taps[W - 1 - j])
    return sums
