"""State space duality by chunks in plain torch: products of matrices inside chunks, a running state between them.

With L the running sum of Δ·A inside a chunk of Q tokens, and S the state before it:

    out[i] = exp(L[i]) S C[i] + Σ_{j ≤ i} (C[i]·B[j]) exp(L[i] − L[j]) Δ[j]·x[j]

(Dao & Gu 2024, https://arxiv.org/abs/2405.21060, section 6). Only differences that the sums need are exponentiated, so
a negative A never overflows. Chunks are worked on in blocks of n that fit the cache. The layouts are tokens
(B, n, Q, H, P), heads (B, n, H, Q, P) and groups (B, n, G, Q, H/G·P); a state is (B, G, N, H/G·P), so that one product
serves all heads of a group. The backward makes the states before all chunks again, and keeps them: N / Q times x.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attncompiler.blocks.segments import run_numbers
from attncompiler.blocks.underflow import LOG2_E, exp2_
from attncompiler.mechanisms.mamba2.cost import BLOCK_ELEMENTS, CHUNK
from attncompiler.mechanisms.mamba2.op import Mamba2Options
from attncompiler.runtime.implementation import Implementation, Tensors


@dataclass(frozen=True, slots=True)
class Block:
    """n chunks, all but the state before each. Padding is 0 everywhere."""

    x: Tensor
    """tokens"""
    raw: Tensor
    """dt + dt_bias, (B, n, Q, H)"""
    delta: Tensor
    """the time steps (B, n, Q, H)"""
    b: Tensor
    """(B, n, G, Q, N)"""
    c: Tensor
    """(B, n, G, Q, N)"""
    written: Tensor
    """Δ·x, tokens"""
    within: Tensor
    """exp(L[i] − L[j]) for j ≤ i in one segment, else 0: (B, n, H, Q, Q)"""
    from_start: Tensor
    """exp(L[i]), 0 behind the start of a segment: (B, n, Q, H, 1)"""
    to_end: Tensor
    """exp(L[Q−1] − L[j]), 0 before the start of a segment: (B, n, Q, H, 1)"""

    @property
    def through(self) -> Tensor:
        """What the whole chunk leaves of the state before it: (B, n, 1, H, 1)."""
        return self.from_start[:, :, -1:]


class Call:
    """One call: its tensors and their layouts."""

    def __init__(self, inputs: Tensors, options: Mamba2Options):
        self.inputs, self.options = inputs, options
        self.B, self.T, self.H, self.P = inputs["x"].shape
        self.G, self.N = inputs["b"].shape[2:]
        self.per_group = self.H // self.G
        self.dtype = torch.promote_types(inputs["x"].dtype, torch.float32)
        self.skip = inputs["d"].view(self.H, -1) if "d" in inputs else None
        mask = inputs.get("attention_mask")
        self.padding = None if mask is None else ~mask
        self.runs = run_numbers(inputs["segment_ids"], mask) if "segment_ids" in inputs else None
        self.chunk = min(options.chunk_size, CHUNK, self.T)

    def blocks(self) -> Iterator[tuple[slice, int]]:
        """Ranges of tokens, each with its number of chunks; what is left at the end is a shorter chunk of its own."""
        whole = self.T // self.chunk
        at_once = max(1, BLOCK_ELEMENTS // (self.B * self.H * self.chunk * max(self.chunk, self.P)))
        for first in range(0, whole, at_once):
            last = min(first + at_once, whole)
            yield slice(first * self.chunk, last * self.chunk), last - first
        if self.T % self.chunk:
            yield slice(whole * self.chunk, self.T), 1

    def load(self, tensor: Tensor, rows: slice, n: int) -> Tensor:
        """A block of a tensor (B, T, …) as (B, n, Q, …), padding 0."""
        loaded = tensor[:, rows].to(self.dtype, memory_format=torch.contiguous_format, copy=self.padding is not None)
        if self.padding is not None:
            padding = self.padding[:, rows]
            loaded.masked_fill_(padding.view(*padding.shape, *[1] * (loaded.dim() - 2)), 0)
        return loaded.unflatten(1, (n, -1))

    def grouped(self, tokens: Tensor) -> Tensor:
        """tokens → groups."""
        return tokens.unflatten(3, (self.G, self.per_group)).transpose(2, 3).flatten(4)

    def tokens(self, grouped: Tensor) -> Tensor:
        """groups → tokens."""
        return grouped.unflatten(4, (self.per_group, self.P)).transpose(2, 3).flatten(3, 4)

    def scaled(self, states: Tensor, factor: Tensor) -> Tensor:
        """States (B, …, G, N, H/G·P) times a factor (B, …, 1, H, 1) of each head."""
        factor = factor.unflatten(-2, (self.G, self.per_group)).movedim(-3, -4)
        return (states.unflatten(-1, (self.per_group, self.P)) * factor).flatten(-2)

    def initial(self) -> Tensor:
        """The state before the first token (B, G, N, H/G·P)."""
        if "initial_state" in self.inputs:
            return self.inward(self.inputs["initial_state"])
        width = self.per_group * self.P
        return torch.zeros(self.B, self.G, self.N, width, dtype=self.dtype, device=self.inputs["x"].device)

    def inward(self, state: Tensor) -> Tensor:
        """A state (B, H, P, N) as (B, G, N, H/G·P)."""
        return state.reshape(self.B, self.G, -1, self.N).transpose(2, 3)

    def outward(self, state: Tensor) -> Tensor:
        """A state (B, G, N, H/G·P) as (B, H, P, N), in memory of its own."""
        rows = state.transpose(2, 3).clone(memory_format=torch.contiguous_format)
        return rows.view(self.B, self.H, self.P, self.N)

    def block(self, rows: slice, n: int) -> Block:
        inputs, options = self.inputs, self.options
        x, raw = self.load(inputs["x"], rows, n), self.load(inputs["dt"], rows, n)
        raw = raw + inputs["dt_bias"] if "dt_bias" in inputs else raw
        delta = F.softplus(raw, threshold=40) if options.dt_softplus else raw
        delta = delta.clamp(*options.dt_limit)
        if self.padding is not None:
            delta.masked_fill_(self.padding[:, rows].unflatten(1, (n, -1))[..., None], 0)
        b, c = (self.load(inputs[name], rows, n).transpose(2, 3) for name in ("b", "c"))
        log_decay = (delta * (inputs["a"] * LOG2_E)).transpose(2, 3).contiguous()
        within, from_start, to_end = self._decays(log_decay, rows, n)
        return Block(x, raw, delta, b, c, delta[..., None] * x, within, from_start, to_end)

    def _decays(self, log_decay: Tensor, rows: slice, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """`within`, `from_start` and `to_end` of a block, from the base-2 logarithm of each token's (B, n, H, Q).

        L[i] − L[j] is summed as it is: the difference of two long sums would lose what a short one has.
        """
        Q = log_decay.shape[-1]
        lower = torch.ones(Q, Q, dtype=log_decay.dtype, device=log_decay.device).tril_()
        within = exp2_((log_decay[..., None] * lower.tril(-1)).cumsum(-2)).mul_(lower)
        from_start = exp2_(log_decay.cumsum(-1))
        if self.runs is not None:
            runs = self.runs[:, rows].unflatten(1, (n, -1))[:, :, None]
            within.masked_fill_(runs[..., :, None] != runs[..., None, :], 0)
            before = self.runs[:, [max(start - 1, 0) for start in range(rows.start, rows.stop, Q)]]
            from_start.masked_fill_(runs != before[:, :, None, None], 0)
        tall = [each.transpose(2, 3).contiguous()[..., None] for each in (from_start, within[..., -1, :])]
        return within, tall[0], tall[1]

    def states(self, block: Block, state: Tensor) -> tuple[Tensor, Tensor]:
        """The states before each chunk (B, n, G, N, H/G·P) and the one after all, from the one before all."""
        added = torch.matmul(block.b.transpose(-1, -2), self.grouped(block.written * block.to_end))
        through, before = block.through, torch.empty_like(added)
        for i, write in enumerate(added.unbind(1)):
            before[:, i] = state
            state = self.scaled(state, through[:, i]).add_(write)
        return before, state

    def read(self, block: Block, before: Tensor) -> Tensor:
        """h C + D·x, tokens."""
        scores = torch.matmul(block.c, block.b.transpose(-1, -2)).unsqueeze(3)
        weights = (block.within.unflatten(2, (self.G, -1)) * scores).flatten(2, 3)
        inside = torch.matmul(weights, block.written.transpose(2, 3))
        read = self.tokens(torch.matmul(block.c, before)) * block.from_start
        read += inside.transpose(2, 3)
        return read if self.skip is None else read.addcmul_(block.x, self.skip)


def forward(inputs: Tensors, options: Mamba2Options) -> dict[str, Tensor]:
    """out (B, T, H, P) in x's dtype and final_state (B, H, P, N)."""
    call = Call(inputs, options)
    out = torch.empty_like(inputs["x"], memory_format=torch.contiguous_format)
    state = call.initial()
    for rows, n in call.blocks():
        block = call.block(rows, n)
        before, state = call.states(block, state)
        read = call.read(block, before)
        if "z" in inputs:
            read *= F.silu(call.load(inputs["z"], rows, n))
        out[:, rows] = read.flatten(1, 2)
    return {"out": out, "final_state": call.outward(state)}


def backward(grads: Tensors, inputs: Tensors, outputs: Tensors, options: Mamba2Options) -> dict[str, Tensor]:
    """The gradient of every differentiable input that is present."""
    call = Call(inputs, options)
    blocks = list(call.blocks())
    state, kept = call.initial(), []
    for rows, n in blocks:
        before, state = call.states(call.block(rows, n), state)
        kept.append(before)

    found = {
        name: torch.empty_like(inputs[name], memory_format=torch.contiguous_format)
        for name in ("x", "dt", "b", "c", "z")
        if name in inputs
    }
    sums = {name: torch.zeros_like(inputs[name]) for name in ("a", "d", "dt_bias") if name in inputs}
    onward = call.inward(grads["final_state"]) if "final_state" in grads else torch.zeros_like(state)
    for rows, n in reversed(blocks):
        block, before = call.block(rows, n), kept.pop()
        d_read = call.load(grads["out"], rows, n) if "out" in grads else torch.zeros_like(block.x)
        parts = {}
        if "z" in inputs:
            parts["z"], d_read = _ungate(call.load(inputs["z"], rows, n), call.read(block, before), d_read)
        through_time, onward = _unread(call, block, before, d_read, onward)
        parts |= through_time | _unstep(call, block, through_time, rows, sums)
        if call.skip is not None:
            parts["x"].addcmul_(d_read, call.skip)
            skipped = (d_read * block.x).sum((0, 1, 2))
            sums["d"] += skipped.sum(-1) if sums["d"].dim() == 1 else skipped
        for name in found:
            found[name][:, rows] = parts[name].flatten(1, 2)
    found |= sums
    if "initial_state" in inputs:
        found["initial_state"] = call.outward(onward)
    return found


def _ungate(z: Tensor, read: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of z and of what it gates, all tokens."""
    sigmoid = torch.sigmoid(z)
    gate = z * sigmoid
    return d_out * read * (sigmoid + gate * (1 - sigmoid)), d_out * gate


def _unread(
    call: Call, block: Block, before: Tensor, d_read: Tensor, onward: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of b and c (B, n, Q, G, N), of Δ·x (tokens) and of the logarithm of each token's decay (B, n, H, Q).

    Beside them the gradient of the state before the block, from `onward`, that of the state behind it.
    """
    from_state = call.grouped(d_read * block.from_start)
    d_before = torch.matmul(block.c.transpose(-1, -2), from_state)
    behind, through = torch.empty_like(before), block.through
    for i in range(before.shape[1] - 1, -1, -1):
        behind[:, i] = onward
        onward = call.scaled(onward, through[:, i]).add_(d_before[:, i])

    heads, d_heads = block.written.transpose(2, 3), d_read.transpose(2, 3).contiguous()
    scores = torch.matmul(block.c, block.b.transpose(-1, -2)).unsqueeze(3)
    within = block.within.unflatten(2, (call.G, -1))
    d_inside = torch.matmul((within * scores).flatten(2, 3).transpose(-1, -2), d_heads)
    d_weights = torch.matmul(d_heads, heads.transpose(-1, -2)).unflatten(2, (call.G, -1)).mul_(within)
    d_scores = d_weights.sum(3)
    # the decay of token k lies between all pairs (i, j) with j < k ≤ i: summed for k − 1, without a difference of sums
    between = d_weights.mul_(scores).flatten(2, 3).cumsum(-1).tril_(-1).sum(-2)

    to_state = call.grouped(block.written * block.to_end)
    d_written = call.tokens(torch.matmul(block.b, behind)) * block.to_end
    ended = (d_written * block.written).sum(-1).transpose(2, 3)
    d_written += d_inside.transpose(2, 3)
    started = (call.tokens(torch.matmul(block.c, before) * from_state)).sum(-1).transpose(2, 3)
    kept = (behind * before).unflatten(-1, (call.per_group, call.P)).sum((3, 5)).flatten(2) * through[:, :, 0, :, 0]
    d_decay = started.flip(-1).cumsum(-1).flip(-1) + kept[..., None]
    d_decay += F.pad((between + ended.cumsum(-1))[..., :-1], (1, 0))
    d_b = torch.matmul(d_scores.transpose(-1, -2), block.c) + torch.matmul(to_state, behind.transpose(-1, -2))
    d_c = torch.matmul(d_scores, block.b) + torch.matmul(from_state, before.transpose(-1, -2))
    return {"b": d_b.transpose(2, 3), "c": d_c.transpose(2, 3), "written": d_written, "decay": d_decay}, onward


def _unstep(
    call: Call, block: Block, gradients: dict[str, Tensor], rows: slice, sums: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The gradients of x and dt in a block; those of a and dt_bias are added to `sums`."""
    d_written, d_decay = gradients["written"], gradients["decay"].transpose(2, 3)
    sums["a"] += (d_decay * block.delta).sum((0, 1, 2))
    d_raw = (d_written * block.x).sum(-1) + d_decay * call.inputs["a"]
    low, high = call.options.dt_limit
    stepped = F.softplus(block.raw, threshold=40) if call.options.dt_softplus else block.raw
    d_raw = torch.where((stepped >= low) & (stepped <= high), d_raw, 0)
    if call.options.dt_softplus:
        d_raw *= torch.sigmoid(block.raw)
    if call.padding is not None:
        d_raw.masked_fill_(call.padding[:, rows].unflatten(1, d_raw.shape[1:3])[..., None], 0)
    if "dt_bias" in sums:
        sums["dt_bias"] += d_raw.sum((0, 1, 2))
    return {"x": d_written * block.delta[..., None], "dt": d_raw}


KERNEL = Implementation(forward, backward)
