"""The scan chunk by chunk in plain torch: what a chunk needs is made when its turn comes, and fits the cache.

Inside a chunk time is the first axis and the channels of a group the last: k tokens, B sequences, G groups, N numbers
of state, F = E / G channels. A token's step is then one fused multiply-add over contiguous memory. The backward runs
the scan once more for the states between chunks, then goes through the chunks from the last, making the states inside
each again: memory for all tokens is that of the results and of one state per chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attncompiler.blocks.segments import run_numbers
from attncompiler.mechanisms.mamba.cost import BUFFER_ELEMENTS
from attncompiler.mechanisms.mamba.op import MambaOptions
from attncompiler.runtime.implementation import Implementation, Tensors


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk's tokens, ready for the scan. Padding is 0 everywhere."""

    u: Tensor
    """(k, B, G, F)"""
    raw: Tensor
    """dt + dt_bias, (k, B, G, F)"""
    delta: Tensor
    """the time steps (k, B, G, F)"""
    written: Tensor
    """Δ·u, (k, B, G, F)"""
    b: Tensor
    """(k, B, G, N)"""
    c: Tensor
    """(k, B, G, N)"""
    decay: Tensor
    """exp(Δ·A), 0 where a segment begins: (k, B, G, N, F), in a buffer that the next chunk takes"""
    states: Tensor
    """before the first token and after each: (k + 1, B, G, N, F), in such a buffer"""

    def read(self) -> Tensor:
        """C·h: (k, B, G, F)."""
        return torch.matmul(self.c.unsqueeze(-2), self.states[1:]).squeeze(-2)


class Scan:
    """One call: its tensors, its chunks and the buffers they share."""

    def __init__(self, inputs: Tensors, options: MambaOptions):
        self.inputs, self.options = inputs, options
        u, a = inputs["u"], inputs["a"]
        self.B, self.T, E = u.shape
        self.G, self.N = inputs["b"].shape[2:]
        self.width = E // self.G
        self.dtype = torch.promote_types(u.dtype, torch.float32)
        self.a = a.unflatten(0, (self.G, self.width)).transpose(1, 2).contiguous()
        self.bias = self._per_channel("dt_bias")
        self.skip = self._per_channel("d")
        mask = inputs.get("attention_mask")
        self.padding = None if mask is None else ~mask.T[..., None, None]
        self.starts: Tensor | None = None
        if "segment_ids" in inputs:
            runs = run_numbers(inputs["segment_ids"], mask).T
            self.starts = F.pad(runs[1:] != runs[:-1], (0, 0, 1, 0))[..., None, None, None]
        self.size = min(self.T, max(8, min(64, BUFFER_ELEMENTS // (self.B * E * self.N))))
        self._decay, self._states = self.buffer(self.size), self.buffer(self.size + 1)

    def _per_channel(self, name: str) -> Tensor | None:
        return self.inputs[name].view(self.G, self.width) if name in self.inputs else None

    def buffer(self, tokens: int) -> Tensor:
        """Uninitialised states (tokens, B, G, N, F)."""
        shape = (tokens, self.B, self.G, self.N, self.width)
        return torch.empty(shape, dtype=self.dtype, device=self.a.device)

    def chunks(self) -> Iterator[slice]:
        return (slice(start, min(start + self.size, self.T)) for start in range(0, self.T, self.size))

    def channels(self, tensor: Tensor, rows: slice) -> Tensor:
        """The chunk of a tensor (B, T, E) as (k, B, G, F), padding 0."""
        return self._load(tensor[:, rows].unflatten(-1, (self.G, self.width)), rows)

    def _load(self, tensor: Tensor, rows: slice) -> Tensor:
        loaded = tensor.transpose(0, 1).to(self.dtype, memory_format=torch.contiguous_format, copy=True)
        return loaded if self.padding is None else loaded.masked_fill_(self.padding[rows], 0)

    def initial(self) -> Tensor:
        """The state before the first token (B, G, N, F)."""
        return (
            self.inward(self.inputs["initial_state"]) if "initial_state" in self.inputs else self.buffer(1)[0].zero_()
        )

    def inward(self, state: Tensor) -> Tensor:
        """A state (B, E, N) as (B, G, N, F)."""
        return state.unflatten(1, (self.G, self.width)).transpose(2, 3)

    def outward(self, state: Tensor) -> Tensor:
        """A state (B, G, N, F) as (B, E, N), in memory of its own."""
        return state.transpose(2, 3).flatten(1, 2).clone(memory_format=torch.contiguous_format)

    def advance(self, rows: slice, state: Tensor) -> Chunk:
        """Run the scan over a chunk from the state (B, G, N, F) before it."""
        u = self.channels(self.inputs["u"], rows)
        b, c = (self._load(self.inputs[name][:, rows], rows) for name in ("b", "c"))
        raw = self.channels(self.inputs["dt"], rows)
        raw = raw if self.bias is None else raw.add_(self.bias)
        delta = F.softplus(raw, threshold=40) if self.options.dt_softplus else raw.clone()
        if self.padding is not None:
            delta.masked_fill_(self.padding[rows], 0)
        decay, states = self._decay[: u.shape[0]], self._states[: u.shape[0] + 1]
        states[0].copy_(state)  # first of all: it may be the last of these buffers' states
        torch.mul(delta.unsqueeze(-2), self.a, out=decay).exp_()
        if self.starts is not None:
            decay.masked_fill_(self.starts[rows], 0)
        written = delta * u
        torch.mul(written.unsqueeze(-2), b.unsqueeze(-1), out=states[1:])
        before, *steps = states.unbind(0)
        for factor, after in zip(decay.unbind(0), steps, strict=True):
            torch.addcmul(after, factor, before, out=after)
            before = after
        return Chunk(u, raw, delta, written, b, c, decay, states)


def forward(inputs: Tensors, options: MambaOptions) -> dict[str, Tensor]:
    """out (B, T, E) in u's dtype and final_state (B, E, N)."""
    scan = Scan(inputs, options)
    out = torch.empty_like(inputs["u"], memory_format=torch.contiguous_format)
    state = scan.initial()
    for rows in scan.chunks():
        chunk = scan.advance(rows, state)
        read = chunk.read()
        if scan.skip is not None:
            read.addcmul_(chunk.u, scan.skip)
        if "z" in inputs:
            read.mul_(F.silu(scan.channels(inputs["z"], rows)))
        out[:, rows] = read.flatten(2).transpose(0, 1)
        state = chunk.states[-1]
    return {"out": out, "final_state": scan.outward(state)}


def backward(grads: Tensors, inputs: Tensors, outputs: Tensors, options: MambaOptions) -> dict[str, Tensor]:
    """The gradient of every differentiable input that is present."""
    scan = Scan(inputs, options)
    chunks = list(scan.chunks())
    between = scan.buffer(len(chunks))
    state = scan.initial()
    for rows, kept in zip(chunks, between.unbind(0), strict=True):
        kept.copy_(state)
        if rows.stop < scan.T:
            state = scan.advance(rows, state).states[-1]

    found = {
        name: torch.empty_like(inputs[name], memory_format=torch.contiguous_format)
        for name in ("u", "dt", "b", "c", "z")
        if name in inputs
    }
    sums = {"a": torch.zeros_like(scan.a)}
    sums |= {name: scan.a.new_zeros(scan.G, scan.width) for name in ("d", "dt_bias") if name in inputs}
    onward = scan.inward(grads["final_state"]) if "final_state" in grads else scan.buffer(1)[0].zero_()
    buffer = scan.buffer(scan.size)
    for rows, state in zip(reversed(chunks), reversed(between.unbind(0)), strict=True):
        chunk = scan.advance(rows, state)
        d_out = scan.channels(grads["out"], rows) if "out" in grads else torch.zeros_like(chunk.u)
        parts, d_read = _ungate(scan, chunk, rows, d_out)
        parts["c"] = _over_channels(d_read, chunk.states[1:])
        d_states = torch.mul(chunk.c.unsqueeze(-1), d_read.unsqueeze(-2), out=buffer[: d_read.shape[0]])
        onward = _carry_back(chunk, d_states, onward)
        parts |= _unwrite(scan, chunk, rows, d_states, sums)
        if scan.skip is not None:
            parts["u"].addcmul_(d_read, scan.skip)
            sums["d"] += (d_read * chunk.u).sum((0, 1))
        for name, part in parts.items():
            found[name][:, rows] = part.transpose(0, 1).reshape(found[name][:, rows].shape)

    found["a"] = sums["a"].transpose(1, 2).flatten(0, 1).contiguous()
    found |= {name: sums[name].flatten() for name in ("d", "dt_bias") if name in sums}
    if "initial_state" in inputs:
        found["initial_state"] = scan.outward(onward)
    return found


def _over_channels(x: Tensor, states: Tensor) -> Tensor:
    """Σ over channels of x (k, B, G, F) · states (k, B, G, N, F): (k, B, G, N).

    A row times a matrix: the BLAS at hand takes ten times as long over a matrix times a column.
    """
    return torch.matmul(x.unsqueeze(-2), states.transpose(-1, -2)).squeeze(-2)


def _ungate(scan: Scan, chunk: Chunk, rows: slice, d_out: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The gradient of z, where there is one, and that of C·h + D·u (k, B, G, F)."""
    if "z" not in scan.inputs:
        return {}, d_out
    z = scan.channels(scan.inputs["z"], rows)
    read = chunk.read()
    if scan.skip is not None:
        read.addcmul_(chunk.u, scan.skip)
    sigmoid = torch.sigmoid(z)
    gate = z * sigmoid
    slope = sigmoid.add_(gate * (1 - sigmoid))
    return {"z": slope.mul_(read).mul_(d_out)}, d_out * gate


def _carry_back(chunk: Chunk, d_states: Tensor, onward: Tensor) -> Tensor:
    """Add to each state's own gradient what comes back from later ones; gives what goes on to the chunk before.

    `onward` (B, G, N, F) is the gradient of the chunk's last state that comes from behind it.
    """
    steps, decays = d_states.unbind(0), chunk.decay.unbind(0)
    steps[-1].add_(onward)
    for t in range(len(steps) - 2, -1, -1):
        torch.addcmul(steps[t], decays[t + 1], steps[t + 1], out=steps[t])
    return decays[0] * steps[0]


def _unwrite(scan: Scan, chunk: Chunk, rows: slice, d_states: Tensor, sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of u, dt and b in a chunk; those of a and dt_bias are added to `sums`. Uses up both buffers."""
    d_written = torch.matmul(chunk.b.unsqueeze(-2), d_states).squeeze(-2)
    d_b = _over_channels(chunk.written, d_states)
    d_exponent = chunk.decay.mul_(chunk.states[:-1]).mul_(d_states)
    sums["a"] += torch.mul(d_exponent, chunk.delta.unsqueeze(-2), out=d_states).sum((0, 1))
    d_raw = d_exponent.mul_(scan.a).sum(-2).addcmul_(d_written, chunk.u)
    if scan.options.dt_softplus:
        d_raw.mul_(torch.sigmoid(chunk.raw))
    if scan.padding is not None:
        d_raw.masked_fill_(scan.padding[rows], 0)
    if "dt_bias" in sums:
        sums["dt_bias"] += d_raw.sum((0, 1))
    return {"u": d_written.mul_(chunk.delta), "dt": d_raw, "b": d_b}


KERNEL = Implementation(forward, backward)
