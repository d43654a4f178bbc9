"""The causal depthwise convolution with its silu, in Triton: forward in one launch, backward in one and a sum.

A program has ROWS stretches of TOKENS tokens of a block of channels, and goes through all stretches together, token by
token. The last W−1 inputs stay in registers, so x is read once but for the W−1 tokens before a stretch, which another
program or another row reads at about the same time: they come from a cache. A tile [ROWS, CHANNELS] has as many numbers
as the threads load with one instruction each; tokens are no axis of it, but a loop that is unrolled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attncompiler.blocks.gpu import Device, device_of, parts
from attncompiler.blocks.launching.launcher import Launcher, known_by
from attncompiler.blocks.launching.numbers import sigmoid, silu_slope, widened


@triton.jit
def empty():
    """A tuple to which tensors are added."""
    return ()


@triton.jit
def several(like, COUNT: tl.constexpr):
    """So many tensors of zeros."""
    found = empty()
    for _ in tl.static_range(COUNT):
        found += (tl.zeros_like(like),)
    return found


@triton.jit
def shifted(first, others, COUNT: tl.constexpr):
    """`first` and all but the last of COUNT others."""
    found = empty()
    if COUNT > 0:
        found += (first,)
        for k in tl.static_range(COUNT - 1):
            found += (others[k],)
    return found


@triton.jit
def where_same(same, window, COUNT: tl.constexpr):
    """The window, and nothing of it where a run begins."""
    found = empty()
    for k in tl.static_range(COUNT):
        found += (tl.where(same[:, None], window[k], 0.0),)
    return found


@triton.jit
def taps_of(weight, e, E, W: tl.constexpr):
    """The taps (E, W) of a block's channels, from that of the token itself on to that of the one W−1 before."""
    found = empty()
    for j in tl.static_range(W):
        found += (widened(tl.load(weight + e * W + (W - 1 - j), mask=e < E, other=0.0)),)
    return found


@triton.jit
def is_real(real, row, t, T):
    """Which of the tokens t there are, and are no padding; `row` is where the sequence begins in (B, T)."""
    there = (t >= 0) & (t < T)
    if real is not None:
        there &= tl.load(real + row + t, mask=there, other=0) != 0
    return there


@triton.jit
def run_of(runs, row, t, T):
    """The run of tokens; the first one's is 0, and so is that of what came before it."""
    return tl.load(runs + row + t, mask=(t >= 0) & (t < T), other=0)


@triton.jit
def numbers_of(x, token, there, t, e, E):
    """Tokens' numbers [ROWS, CHANNELS] in fp32; 0 of those that are not `there`."""
    return widened(tl.load(x + t.to(tl.int64)[:, None] * token + e, mask=there[:, None] & (e < E), other=0.0))


@triton.jit
def input_of(x, token, before, there, b, t, e, E, W: tl.constexpr, STATE: tl.constexpr):
    """Tokens' numbers; with STATE what comes before the first is of `before`."""
    found = numbers_of(x, token, there, t, e, E)
    if STATE:
        at = before + (b.to(tl.int64) * E + e) * (W - 1) + (W - 1 + t)[:, None]
        # as the tokens themselves would have been
        kept = tl.load(at, mask=(t < 0)[:, None] & (e < E), other=0.0).to(x.dtype.element_ty)
        found = tl.where((t < 0)[:, None], widened(kept), found)
    return found


@triton.jit
def before_of(runs, row, t, T, W: tl.constexpr):
    """Of the token before each of t: which of the W−1 before it are of its run, and that run."""
    found = empty()
    run = t  # there must be something
    if runs is not None:
        run = run_of(runs, row, t - 1, T)
        for k in tl.static_range(W - 1):
            found += (run_of(runs, row, t - (k + 2), T) == run,)
    return found, run


@triton.jit
def behind(window, alive, run, next, W: tl.constexpr, WHICH: tl.constexpr):
    """What a token finds of those before it: the window, which of them are of its run, and that run."""
    same = next == run
    found = empty()
    if WHICH and W > 1:
        found += (same,)
        for k in tl.static_range(W - 2):
            found += (alive[k] & same,)
    return where_same(same, window, W - 1), found, next


@triton.jit
def sums_of(now, window, taps, bias, W: tl.constexpr):
    """bias + Σ taps · inputs: what silu is taken of."""
    found = now * taps[0] + bias
    for k in tl.static_range(W - 1):
        found += window[k] * taps[k + 1]
    return found


@triton.jit
def bias_of(bias, e, E):
    found = tl.zeros_like(e).to(tl.float32)
    if bias is not None:
        found = widened(tl.load(bias + e, mask=e < E, other=0.0))
    return found


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    x, batch, token, weight, bias, runs, real, before, out, T, E,
    W: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out (B, T, E) of x, by strides, weight (E, W), bias (E,), runs and real (B, T), and before (B, E, W−1)."""
    blocks, pieces = tl.cdiv(E, CHANNELS), tl.cdiv(T, ROWS * TOKENS)
    place = tl.program_id(0) // blocks
    b = place // pieces
    t0 = place % pieces * (ROWS * TOKENS) + tl.arange(0, ROWS) * TOKENS
    e = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    row = b.to(tl.int64) * T
    x += b.to(tl.int64) * batch
    taps, bias = taps_of(weight, e, E, W), bias_of(bias, e, E)
    window = several(tl.zeros([ROWS, CHANNELS], tl.float32), W - 1)
    run = before_of(runs, row, t0 + (1 - W), T, 1)[1]
    for i in tl.static_range(1 - W, TOKENS):
        t = t0 + i
        if runs is not None:
            window, _, run = behind(window, empty(), run, run_of(runs, row, t, T), W, False)
        there = is_real(real, row, t, T)
        now = input_of(x, token, before, there, b, t, e, E, W, before is not None and i < 0)
        if i >= 0:
            sums = sums_of(now, window, taps, bias, W)
            found = sums * sigmoid(sums)
            if real is not None:
                found = tl.where(there[:, None], found, 0.0)
            at = out + (row + t)[:, None] * E + e
            tl.store(at, found.to(out.dtype.element_ty), mask=(t < T)[:, None] & (e < E))
        window = shifted(now, window, W - 1)


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    dout, dout_batch, dout_token, x, batch, token, weight, bias, runs, real, before, dx, dbefore, shares, T, E,
    W: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """dx (B, T, E), dbefore (B, E, W−1), and of each stretch of a sequence its share of the gradients of weight and
    bias: shares (stretches, W + 1, E), the first for the token itself, the last for the bias.

    A token's gradient is whole where W−1 tokens more have been met: until then its sum is carried along. Tokens behind
    a stretch are met for that alone.
    """
    blocks, pieces = tl.cdiv(E, CHANNELS), tl.cdiv(T, ROWS * TOKENS)
    place = tl.program_id(0) // blocks
    b = place // pieces
    t0 = place % pieces * (ROWS * TOKENS) + tl.arange(0, ROWS) * TOKENS
    e = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    row = b.to(tl.int64) * T
    x += b.to(tl.int64) * batch
    dout += b.to(tl.int64) * dout_batch
    taps, bias = taps_of(weight, e, E, W), bias_of(bias, e, E)
    nothing = tl.zeros([ROWS, CHANNELS], tl.float32)
    window, carried, share = several(nothing, W - 1), several(nothing, W), several(nothing, W + 1)
    alive, run = before_of(runs, row, t0 + (1 - W), T, W)
    for i in tl.static_range(1 - W, 0):
        t = t0 + i
        if runs is not None:
            window, alive, run = behind(window, alive, run, run_of(runs, row, t, T), W, True)
        there = is_real(real, row, t, T)
        window = shifted(input_of(x, token, before, there, b, t, e, E, W, before is not None), window, W - 1)
    for start in range(0, TOKENS, STEP):  # not unrolled whole: then all loads would come first
        # what runs say is read again, and not carried on, which would be from layout to layout
        near, its = before_of(runs, row, t0 + start, T, W)
        for i in tl.static_range(STEP):
            t = t0 + (start + i)
            if runs is not None:
                window, near, its = behind(window, near, its, run_of(runs, row, t, T), W, True)
            there = is_real(real, row, t, T)
            now = numbers_of(x, token, there, t, e, E)
            sums = sums_of(now, window, taps, bias, W)
            grad = numbers_of(dout, dout_token, there, t, e, E) * silu_slope(sums, sigmoid(sums))
            share = shared(share, grad, now, window, W)
            carried = passed(carried, grad, taps, near, runs is not None, W)
            keep(dx, dbefore, carried[W - 1], real, row, b, t, t0, T, e, E, W)
            window = shifted(now, window, W - 1)
    alive, run = before_of(runs, row, t0 + TOKENS, T, W)
    for i in tl.static_range(W - 1):
        t = t0 + (TOKENS + i)
        if runs is not None:
            window, alive, run = behind(window, alive, run, run_of(runs, row, t, T), W, True)
        there = is_real(real, row, t, T)
        now = numbers_of(x, token, there, t, e, E)
        sums = sums_of(now, window, taps, bias, W)
        grad = numbers_of(dout, dout_token, there, t, e, E) * silu_slope(sums, sigmoid(sums))
        carried = passed(carried, grad, taps, alive, runs is not None, W)
        keep(dx, dbefore, carried[W - 1], real, row, b, t, t0, T, e, E, W)
        window = shifted(now, window, W - 1)
    e = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    for j in tl.static_range(W + 1):
        at = shares + (place.to(tl.int64) * (W + 1) + j) * E + e
        tl.store(at, tl.sum(share[j], 0), mask=e < E)


@triton.jit
def keep(dx, dbefore, found, real, row, b, t, t0, T, e, E, W: tl.constexpr):
    """Write the gradient of the tokens W−1 before t, those among them that are of the stretch, or before all."""
    u = t - (W - 1)
    of_dx = found
    if real is not None:
        of_dx = tl.where(is_real(real, row, u, T)[:, None], found, 0.0)
    at = dx + (row + u)[:, None] * E + e
    tl.store(at, of_dx.to(dx.dtype.element_ty), mask=((u >= t0) & (u < T))[:, None] & (e < E))
    if dbefore is not None:
        at = dbefore + (b.to(tl.int64) * E + e) * (W - 1) + t[:, None]
        tl.store(at, found.to(dbefore.dtype.element_ty), mask=((t0 == 0) & (u < 0))[:, None] & (e < E))


@triton.jit
def shared(share, grad, now, window, W: tl.constexpr):
    """The shares of weight and bias with those of one token more."""
    found = empty()
    found += (share[0] + grad * now,)
    for k in tl.static_range(W - 1):
        found += (share[k + 1] + grad * window[k],)
    found += (share[W] + grad,)
    return found


@triton.jit
def passed(carried, grad, taps, alive, RUNS: tl.constexpr, W: tl.constexpr):
    """The gradients of a token's input, and of the W−1 before it, with what this token gives to them."""
    found = empty()
    found += (grad * taps[0],)
    for k in tl.static_range(W - 1):
        given = grad
        if RUNS:
            given = tl.where(alive[k][:, None], grad, 0.0)
        found += (carried[k] + given * taps[k + 1],)
    return found


FORWARD, BACKWARD = Launcher(forward_kernel), Launcher(backward_kernel)


@dataclass(frozen=True, slots=True)
class Tiles:
    """What a program has: `rows` stretches of so many tokens each, of so many channels."""

    rows: int
    tokens: int
    channels: int

    def stretches(self, B: int, T: int) -> int:
        """Programs for each block of channels."""
        return B * parts(T, self.rows * self.tokens)


THREADS = 128
LINE = 128
"""bytes of a token that a program reads: a line of the caches"""
VECTOR = {"forward": 8, "backward": 4}
"""numbers of a thread in a tile, 16 bytes at most: for each a backward holds five sums more"""
STEP = 4
"""tokens whose loads a backward may have together"""
ENOUGH = 8
"""programs for each multiprocessor with which stretches may be longer"""


def tiles_for(device: Device, B: int, T: int, E: int, itemsize: int, direction: str) -> Tiles:
    """Stretches of 16 tokens, to which 3 more are read for 4 taps, or shorter ones where there are few programs."""
    if device.interpreted:
        return Tiles(2, 4, 16)
    channels = LINE // itemsize
    rows = THREADS * min(VECTOR[direction], 16 // itemsize) // channels
    if rows >= T:
        return Tiles(rows, 1, channels)
    long = Tiles(rows, 16, channels)
    enough = long.stretches(B, T) * parts(E, channels) >= ENOUGH * device.multiprocessors
    return long if enough else replace(long, tokens=4)


class Call:
    """One call: what it was given, as pointers and strides, and how it is cut."""

    def __init__(
        self,
        direction: str,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        runs: Tensor | None,
        real: Tensor | None,
        before: Tensor | None,
        *more: Tensor,
    ):
        (self.B, self.T, self.E), self.W = x.shape, weight.shape[-1]
        self.before = whole(before)
        rows = [beside(tensor) for tensor in (*more, x)]
        rest = whole(weight), whole(bias), whole(runs), whole(real), self.before
        self.arguments = *(each for row in rows for each in (row, *row.stride()[:2])), *rest
        self.tiles = tiles_for(device_of(x.device), self.B, self.T, self.E, x.element_size(), direction)
        self.stretches = self.tiles.stretches(self.B, self.T)
        self.grid = (self.stretches * parts(self.E, self.tiles.channels),)
        self.known = known_by(*rows, *rest), self.tiles
        self.constants = self.W, self.tiles.rows, self.tiles.tokens, self.tiles.channels


def forward(x: Tensor, *given: Any) -> Tensor:
    """silu of the sums (B, T, E), in x's dtype, of what `blocks.convolution.causal_conv1d` is given."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        call = Call("forward", x, *given)
        with torch.cuda.device_of(x):
            FORWARD(call.grid, call.known, *call.arguments, out, call.T, call.E, *call.constants)
    return out


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *given: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of x (B, T, E), weight (E, 1, W), bias (E,), whether there is one or not, and before."""
    call = Call("backward", x, weight, bias, *given, grad)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dbefore = None if given[2] is None else torch.zeros_like(given[2], memory_format=torch.contiguous_format)
    shares = torch.empty(call.stretches, call.W + 1, call.E, dtype=torch.float32, device=x.device)
    if dx.numel():
        with torch.cuda.device_of(x):
            BACKWARD(
                call.grid,
                call.known,
                *(*call.arguments, dx, None if call.before is None else dbefore, shares),
                *(call.T, call.E, *call.constants, min(STEP, call.tiles.tokens)),
            )
    sums = shares.sum(0)
    dweight = sums[:-1].flip(0).T[:, None].to(weight.dtype, memory_format=torch.contiguous_format, copy=True)
    return dx, dweight, sums[-1].to(weight.dtype if bias is None else bias.dtype, copy=True), dbefore


def beside(tensor: Tensor) -> Tensor:
    """With the numbers of a token beside each other."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def whole(tensor: Tensor | None) -> Tensor | None:
    """With all numbers in order, truths as numbers; None where there are none."""
    if tensor is None or not tensor.numel():
        return None
    tensor = tensor.contiguous()
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
