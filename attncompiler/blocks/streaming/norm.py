"""The root mean square norm, with a gate or without, in Triton: forward in one launch, backward in one and a sum.

A program goes through rows one tile after the other, with the weight in registers, and in the backward with its share
of the weight's gradient. A row is in one tile: what is read is read once.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attncompiler.blocks.gpu import Device, device_of, parts, power_of_2
from attncompiler.blocks.launching.launcher import Launcher, known_by
from attncompiler.blocks.launching.numbers import sigmoid, silu_slope, widened

NONE, BEFORE, AFTER = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""whether there is a gate, and whether it is on before the norm or after it"""


class Rows(NamedTuple):
    """A tensor of rows by two strides: row n is n // count · outer + n % count · inner numbers behind the first.

    It is no field of another tuple: Triton 3.6 forgets which fields of those are None.
    """

    ptr: Any
    count: Any
    outer: Any
    inner: Any


@triton.jit
def at(rows, n, d):
    """Where the numbers d of the rows n are."""
    place = (n // rows.count).to(tl.int64) * rows.outer + (n % rows.count).to(tl.int64) * rows.inner
    return rows.ptr + place[:, None] + d


@triton.jit
def numbers_of(rows, n, d, N, last):
    return widened(tl.load(at(rows, n, d), mask=(n < N)[:, None] & (d < last), other=0.0))


@triton.jit
def share_of(N, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """Of a program: its group, and from which row to which it goes."""
    programs = tl.num_programs(0) // GROUPS
    each = tl.cdiv(tl.cdiv(N, ROWS), programs) * ROWS
    start = tl.program_id(0) // GROUPS * each
    return tl.program_id(0) % GROUPS, start, tl.minimum(start + each, N)


@triton.jit(do_not_specialize=["N"])
def forward_kernel(
    x, gate, weight, out, scales, N, eps,
    GATE: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (N, GROUPS·WIDTH) and scales (N, GROUPS), 1 / √(mean + eps) of each row of a group."""
    group, start, end = share_of(N, GROUPS, ROWS)
    d = group * WIDTH + tl.arange(0, BLOCK)[None, :]
    last = group * WIDTH + WIDTH
    weights = widened(tl.load(weight + d, mask=d < last, other=0.0))
    for first in range(start, end, ROWS):
        n = first + tl.arange(0, ROWS)
        found = numbers_of(x, n, d, N, last)
        opened = found
        if GATE != NONE:
            opened = numbers_of(gate, n, d, N, last)
            opened *= sigmoid(opened)
        if GATE == BEFORE:
            found *= opened
        scale = tl.rsqrt(tl.sum(found * found, 1) / WIDTH + eps)
        found *= scale[:, None] * weights
        if GATE == AFTER:
            found *= opened
        place = n.to(tl.int64)
        inside = (n < N)[:, None] & (d < last)
        tl.store(out + place[:, None] * (GROUPS * WIDTH) + d, found.to(out.dtype.element_ty), mask=inside)
        tl.store(scales + place * GROUPS + group, scale, mask=n < N)


@triton.jit(do_not_specialize=["N"])
def backward_kernel(
    dout, x, gate, weight, scales, dx, dgate, shares, N,
    GATE: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx and dgate (N, GROUPS·WIDTH), and of each program its share of the weight's gradient: (programs, WIDTH)."""
    group, start, end = share_of(N, GROUPS, ROWS)
    d = group * WIDTH + tl.arange(0, BLOCK)[None, :]
    last = group * WIDTH + WIDTH
    weights = widened(tl.load(weight + d, mask=d < last, other=0.0))
    share = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(start, end, ROWS):
        n = first + tl.arange(0, ROWS)
        given = numbers_of(x, n, d, N, last)
        grad = numbers_of(dout, n, d, N, last)
        scale = tl.load(scales + n.to(tl.int64) * GROUPS + group, mask=n < N, other=0.0)
        normed, opened, slope = given, given, given
        if GATE != NONE:
            closed = numbers_of(gate, n, d, N, last)
            opened = sigmoid(closed)
            slope = silu_slope(closed, opened)
            opened *= closed
        if GATE == BEFORE:
            normed *= opened
        normed *= scale[:, None]
        of_normed = grad
        if GATE == AFTER:
            of_normed *= opened
        share += of_normed * normed
        of_normed *= weights
        along = tl.sum(of_normed * normed, 1) / WIDTH
        found = (of_normed - normed * along[:, None]) * scale[:, None]
        place = n.to(tl.int64)[:, None] * (GROUPS * WIDTH) + d
        inside = (n < N)[:, None] & (d < last)
        if GATE == BEFORE:
            tl.store(dgate + place, (found * given * slope).to(dgate.dtype.element_ty), mask=inside)
            found *= opened
        if GATE == AFTER:
            tl.store(dgate + place, (grad * normed * weights * slope).to(dgate.dtype.element_ty), mask=inside)
        tl.store(dx + place, found.to(dx.dtype.element_ty), mask=inside)
    of_rows = tl.arange(0, BLOCK)
    at_share = shares + tl.program_id(0).to(tl.int64) * WIDTH + of_rows
    tl.store(at_share, tl.sum(share, 0), mask=of_rows < WIDTH)


FORWARD, BACKWARD = Launcher(forward_kernel), Launcher(backward_kernel)


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rows of a tile, its numbers in each, and how many programs go through those of a group."""

    rows: int
    block: int
    programs: int
    num_warps: int


EACH = {"forward": 32, "backward": 16, "backward with a gate": 8}
"""numbers of a thread in a tile, each in as many registers as the direction has tensors, and sums between"""
MOST_WARPS, RESIDENT = 16, 16
"""of a program, and of a multiprocessor that are wanted at once"""


def tiles_for(device: Device, N: int, groups: int, width: int, direction: str) -> Tiles:
    """Tiles of four warps, or of more where a row is long."""
    block = power_of_2(width)
    if device.interpreted:
        return Tiles(2, block, parts(N, 6), 4)
    each = EACH[direction]
    num_warps = max(4, min(MOST_WARPS, block // (32 * each)))
    rows = max(1, 128 * each // block)
    programs = max(1, RESIDENT // num_warps * device.multiprocessors // groups)
    return Tiles(rows, block, min(programs, parts(N, rows)), num_warps)


def rows(tensor: Tensor) -> Rows:
    """Rows (…, width), as they lie where two strides say it."""
    axes: list[tuple[int, int]] = []
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        if axes and axes[-1][1] == size * stride:
            axes[-1] = axes[-1][0] * size, stride
        elif size > 1:
            axes.append((size, stride))
    if len(axes) > 2 or (tensor.stride(-1) != 1 and tensor.shape[-1] > 1):
        return rows(tensor.contiguous())
    if len(axes) < 2:
        return Rows(tensor, 1, axes[0][1] if axes else 0, 0)
    (_, outer), (count, inner) = axes
    return Rows(tensor, count, outer, inner)


class Call:
    """One call: its rows, and how they are cut."""

    def __init__(self, direction: str, x: Tensor, gate: Tensor | None, weight: Tensor, groups: int, first: bool):
        self.N, self.groups, self.width = x.numel() // x.shape[-1], groups, x.shape[-1] // groups
        self.x, self.gate, self.weight = rows(x), Rows(None, 1, 0, 0) if gate is None else rows(gate), weight
        self.weight = weight.contiguous()
        if direction == "backward" and gate is not None:
            direction = "backward with a gate"
        self.tiles = tiles_for(device_of(x.device), self.N, groups, self.width, direction)
        self.grid = (groups * self.tiles.programs,)
        kind = NONE.value if gate is None else AFTER.value if first else BEFORE.value
        self.constants = kind, groups, self.width, self.tiles.rows, self.tiles.block

    def known(self, *more: Tensor) -> Hashable:
        return known_by(self.x.ptr, self.gate.ptr, self.weight, *more), self.constants, self.tiles.num_warps


def forward(
    x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, groups: int, first: bool
) -> tuple[Tensor, Tensor]:
    """The norm of x (…, width) in each group of its width, times weight (width,), in x's dtype, and scales (…, groups)
    in fp32. silu of the gate (…, width) is on it before the norm, or after where the norm is `first`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    scales = torch.empty(*x.shape[:-1], groups, dtype=torch.float32, device=x.device)
    if out.numel():
        call = Call("forward", x, gate, weight, groups, first)
        with torch.cuda.device_of(x):
            FORWARD(
                *(call.grid, call.known(), call.x, call.gate, call.weight, out, scales, call.N, eps, *call.constants),
                num_warps=call.tiles.num_warps,
            )
    return out, scales


def backward(
    grad: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor, scales: Tensor, groups: int, first: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The gradients of x, gate and weight."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dgate = None if gate is None else torch.empty(gate.shape, dtype=gate.dtype, device=x.device)
    if not dx.numel():
        return dx, dgate, torch.zeros_like(weight)
    call, dout = Call("backward", x, gate, weight, groups, first), rows(grad)
    shares = torch.empty(call.tiles.programs, x.shape[-1], dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        BACKWARD(
            *(call.grid, call.known(dout.ptr), dout, call.x, call.gate, call.weight),
            *(scales, dx, dgate, shares, call.N, *call.constants),
            num_warps=call.tiles.num_warps,
        )
    return dx, dgate, shares.sum(0).to(weight.dtype)
