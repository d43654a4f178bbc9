"""Forward and backward: layouts of a warp, groups of tokens, buffers and launches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from attncompiler.blocks.gpu import Device, device_of, parts, power_of_2
from attncompiler.blocks.launching.launcher import Launcher, known_by
from attncompiler.blocks.segments import run_numbers
from attncompiler.mechanisms.mamba.cost import CHUNK, FEW_ROWS, MANY, ROWS, WIDE
from attncompiler.mechanisms.mamba.op import MambaOptions
from attncompiler.mechanisms.mamba.recurrence.passes import carry_kernel, read_kernel, sweep_kernel
from attncompiler.mechanisms.mamba.recurrence.reverse import Around, Grads, backward_kernel
from attncompiler.mechanisms.mamba.recurrence.step import step
from attncompiler.mechanisms.mamba.recurrence.tokens import Rows, Scan, Shared
from attncompiler.runtime.implementation import Tensors

LOG2E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class Layout:
    """How the numbers of a block's channels lie among a warp's threads, as `tokens.py` has it."""

    NO: int
    NI: int
    CT: int
    LN: int
    LC: int

    @property
    def channels(self) -> int:
        """Of a block."""
        return self.CT * self.LC

    @property
    def held(self) -> int:
        """Numbers of a block, padding among them."""
        return self.NO * self.NI * self.CT * self.LN * self.LC


WARP = 32
HELD = 16
"""numbers of state for a thread"""
SWEPT, REVERSED = 8, 4
"""of one channel that lie side by side: in the forward and in both sweeps, and in the backward"""


def layout_for(device: Device, N: int, side: int) -> Layout:
    """Eight numbers of two channels for a thread, or four numbers of four channels where tokens' gradients are summed.

    What tokens have once for a channel goes to two threads by a step between them, and to four through shared memory,
    for which a lone warp waits. But the more of a channel's numbers a thread has, the more of B and C it loads and
    unpacks, and the more sums over channels, of their gradients, it takes part in. Where more than 8 threads share a
    channel, a block has fewer channels than threads, and what tokens have once for a channel lies in several threads:
    of more than two channels the backward has no registers for that.
    """
    wide = power_of_2(N)
    NI = min(side, wide)
    LN = max(1, min(WARP, wide // NI))
    NO = wide // (NI * LN)
    CT = min(2 if LN > 8 else 4, LN, HELD // (NO * NI))
    return Layout(NO, NI, CT, LN, 2 if device.interpreted else WARP // LN)


@dataclass(frozen=True, slots=True)
class Groups:
    """A sequence cut into groups of so many tokens, whole chunks each."""

    count: int
    tokens: int
    chunk: int
    """tokens of one"""


ENOUGH, WANTED = 7, 12
"""Warps for each multiprocessor: so many need no groups, which cost a sweep; fewer are made so many by groups, which
is what 168 registers leave room for"""
RESIDENT = 8
"""Warps that a multiprocessor has room for in the backward, which are all: each has memory for a chunk's states"""
FEW = 2
"""for MANY where there is no GPU; FEW_ROWS are for ROWS there too"""
LEAST = 64
"""tokens of a group"""


def forward_groups(device: Device, blocks: int, T: int) -> Groups:
    """How a sequence is cut for `blocks` programs of channels: no more programs than are resident together."""
    if device.interpreted:  # short sequences have several groups too
        return _cut(T, 12, 2)
    if blocks >= ENOUGH * device.multiprocessors:
        return _cut(T, T, ROWS)
    return _cut(T, max(LEAST, parts(T, max(1, WANTED * device.multiprocessors // blocks))), ROWS)


def blocks_together(device: Device, blocks: int, T: int) -> int:
    """Blocks that a program of the backward takes, where all sequences have `blocks`: fewer where that leaves few."""
    if device.interpreted:
        return FEW
    return max(1, min(MANY, blocks * parts(T, CHUNK) // (RESIDENT * device.multiprocessors)))


def backward_groups(device: Device, slots: int, T: int) -> Groups:
    """How it is cut where `slots` programs take all channels: into as many groups as are resident together."""
    if device.interpreted:
        return _cut(T, 16, 8)
    return _cut(T, parts(T, max(1, RESIDENT * device.multiprocessors // slots)), CHUNK)


def _cut(T: int, tokens: int, chunk: int) -> Groups:
    tokens = parts(min(tokens, T), chunk) * chunk
    return Groups(parts(T, tokens), tokens, chunk)


READ, SWEEP, CARRY, BACKWARD = (
    Launcher(kernel) for kernel in (read_kernel, sweep_kernel, carry_kernel, backward_kernel)
)


class Call:
    """A call's tensors as the kernels take them."""

    def __init__(self, inputs: Tensors, options: MambaOptions):
        self.inputs = inputs
        u, a = inputs["u"], inputs["a"]
        self.B, self.T, self.E = u.shape
        self.G, self.N = inputs["b"].shape[2:]
        self.device = device_of(u.device)
        self.take = FEW_ROWS if self.device.interpreted or self.N > WIDE else ROWS
        real = inputs.get("attention_mask")
        runs = run_numbers(inputs.get("segment_ids"), real)
        nowhere = Rows(None, 0, tl.constexpr(0))
        self.operands = (
            *(rows(u), rows(inputs["dt"]), rows(inputs["z"]) if "z" in inputs else nowhere),
            *(shared(inputs["b"]), shared(inputs["c"])),
        )
        self.scan = Scan(
            (a * LOG2E).contiguous(),
            self.whole("d"),
            self.whole("dt_bias"),
            None if runs is None else runs.to(torch.int32).contiguous(),
            None if real is None else real.contiguous().view(torch.uint8),
        )
        self.initial = self.whole("initial_state")
        self.softplus = options.dt_softplus
        self.known = known_by(*(each.ptr for each in self.operands), *self.scan, self.initial)
        """all that launches are compiled for, but for constants and what is asked of a kernel"""

    def whole(self, name: str) -> Tensor | None:
        tensor = self.inputs.get(name)
        return None if tensor is None else tensor.contiguous()

    def layout(self, side: int) -> Layout:
        """Of a kernel with so many of a channel's numbers side by side."""
        return layout_for(self.device, self.N, side)

    def constants(self, layout: Layout) -> tuple[Any, ...]:
        """Of a kernel whose states lie so."""
        return self.softplus, self.take, self.E, self.G, self.N, *astuple(layout)

    def blocks(self, layout: Layout) -> int:
        """Of one sequence: no block has channels of two groups."""
        return self.G * parts(self.E // self.G, layout.channels)

    def wide(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.inputs["u"].device)

    def sweep(self, groups: Groups, count: int, dout: Tensor | None, **found: Tensor | None) -> None:
        """What the first `count` groups do to states, into the buffers of `found`."""
        named = [found.get(name) for name in ("added", "lengths", "back", "inner", "upto")]
        layout = self.layout(SWEPT)
        constants = self.constants(layout)
        SWEEP(
            (self.B * self.blocks(layout) * count,),
            (self.known, constants, known_by(dout), *(each is None for each in named)),
            *(*self.operands, self.scan, None if dout is None else rows(dout), *named),
            *(self.T, count, groups.tokens, groups.chunk, 1, *constants),
            num_warps=1,
        )

    def carry(
        self, states: Tensor, lengths: Tensor, initial: Tensor | None, groups: Groups, count: int, *, reverse: bool
    ) -> None:
        """Turn what groups add into the states behind them, or in reverse before them."""
        CARRY(
            (self.B, parts(self.E * self.N, CARRIED)),
            (self.known, self.E, self.N, known_by(initial), reverse),
            *(self.scan, states, lengths, initial, self.T, count, groups.tokens),
            *(self.E, self.N, reverse, CARRIED, TOGETHER),
            num_warps=1,
        )


CARRIED = 64
"""numbers of state that a program of one warp carries"""
TOGETHER = 4
"""groups that it loads together"""


def rows(tensor: Tensor) -> Rows:
    tensor = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
    return Rows(tensor, tensor.stride(0), tl.constexpr(tensor.stride(1)))


def shared(tensor: Tensor) -> Shared:
    tensor = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
    batch, token, group, _ = tensor.stride()
    return Shared(tensor, batch, tl.constexpr(token), group)


def forward(inputs: Tensors, options: MambaOptions) -> dict[str, Tensor]:
    """out (B, T, E) in u's dtype and final_state (B, E, N) in fp32."""
    if inputs["u"].shape[1] == 1:
        return step(inputs, options)
    call = Call(inputs, options)
    B, T, E, N = call.B, call.T, call.E, call.N
    layout = call.layout(SWEPT)
    constants, blocks = call.constants(layout), B * call.blocks(layout)
    groups = forward_groups(call.device, blocks, T)
    out = torch.empty_like(inputs["u"], memory_format=torch.contiguous_format)
    final, states = call.wide(B, E, N), None
    if groups.count > 1:
        states, lengths = call.wide(B, groups.count - 1, E, N), call.wide(B, groups.count - 1, E)
        call.sweep(groups, groups.count - 1, None, added=states, lengths=lengths)
        call.carry(states, lengths, call.initial, groups, groups.count - 1, reverse=False)
    READ(
        (blocks * groups.count,),
        (call.known, constants, states is None),
        *(*call.operands, call.scan, call.initial, states, out, final),
        *(T, groups.count, groups.tokens, 1, *constants),
        num_warps=1,
    )
    return {"out": out, "final_state": final}


def backward(grads: Tensors, inputs: Tensors, outputs: Tensors, options: MambaOptions) -> dict[str, Tensor]:
    """The gradient of every differentiable input that is present."""
    call = Call(inputs, options)
    B, T, E, G, N = call.B, call.T, call.E, call.G, call.N
    dout = grads["out"] if "out" in grads else torch.zeros_like(inputs["u"])
    final = grads["final_state"].contiguous() if "final_state" in grads else None
    layout = call.layout(REVERSED)
    constants, blocks = call.constants(layout), call.blocks(layout)
    many = blocks_together(call.device, B * blocks, T)
    slots = parts(blocks // G, many)
    groups = backward_groups(call.device, B * G * slots, T)
    count = groups.count

    chunks = groups.tokens // groups.chunk
    # of bf16, whose range a state needs, where tokens have no more digits
    kept = torch.bfloat16 if inputs["u"].dtype == torch.bfloat16 else torch.float32
    inner, upto = call.wide(B, count * (chunks - 1), E, N, dtype=kept), call.wide(B, count * (chunks - 1), E)
    states = back = lengths = None
    if count > 1:
        states, back, lengths = call.wide(B, count, E, N), call.wide(B, count, E, N), call.wide(B, count, E)
    if count > 1 or chunks > 1:
        call.sweep(groups, count, dout, added=states, lengths=lengths, back=back, inner=inner, upto=upto)
    if states is not None and back is not None and lengths is not None:
        call.carry(states, lengths, call.initial, groups, count, reverse=False)
        call.carry(back, lengths, final, groups, count, reverse=True)

    like: Mapping[str, Any] = {"memory_format": torch.contiguous_format}
    found = {name: torch.empty_like(inputs[name], **like) for name in ("u", "dt", "z") if name in inputs}
    shares = {name: call.wide(slots, B, T, G, N).zero_() for name in ("b", "c")}
    sums = {"a": call.wide(B, count, E, N) if back is None else back}
    sums |= {name: call.wide(B, count, E) for name in ("d", "dt_bias") if name in inputs}
    if call.initial is not None:
        found["initial_state"] = torch.empty_like(call.initial)
    programs = B * G * slots * count
    scratch = call.wide(programs, groups.chunk // call.take, layout.held)
    BACKWARD(
        (programs,),
        (call.known, constants, known_by(dout, final), count > 1),
        *(*call.operands, call.scan, rows(dout), Around(call.initial, states, inner, upto, final, back)),
        Grads(
            *(found["u"], found["dt"], found.get("z"), shares["b"], shares["c"]),
            *(sums["a"], sums.get("d"), sums.get("dt_bias"), found.get("initial_state")),
        ),
        *(scratch, B, T, count, groups.tokens, groups.chunk, many, 1, 0.0, *constants),
        num_warps=1,
    )
    found |= {name: part.sum(0).to(inputs[name].dtype) for name, part in shares.items()}
    found |= {name: each.sum((0, 1)) for name, each in sums.items()}
    return found
