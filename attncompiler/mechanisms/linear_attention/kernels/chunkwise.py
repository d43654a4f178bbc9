"""Chunks of the sequence and a running state, in plain torch: memory linear in the length, in both directions.

Inside a chunk every pair of tokens is met, as in the reference; what came before a chunk arrives as the state
(Katharopoulos et al. 2020, section 3.3; chunks as in Hua et al. 2022, https://arxiv.org/abs/2202.10447, section 3.2).
The normaliser is one more column of v, all ones, so that S and z are one state of V + 1 columns. Chunks are handled a
span at a time, so that what lies between input and output stays small.

With packed segments a state is that of one run: it reaches a later chunk only where the run goes on, which the matrix
`reach` says for every pair of chunk boundaries. The backward goes over the spans in reverse with the same matrix.

Shapes: n chunks of C tokens in a span; features and values of a span are (B, H, n, C, ·), states (B, H, ·, D, V + 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from attncompiler.blocks.segments import run_numbers
from attncompiler.mechanisms.linear_attention.op import LinearAttentionOptions
from attncompiler.mechanisms.linear_attention.spans import (
    Size,
    Span,
    Tokens,
    chunked,
    joined,
    keys_values,
    load,
    masked,
    queries,
    runs_and_bounds,
    through_features,
)
from attncompiler.runtime.implementation import Implementation, Tensors

CHUNK = 64
SPAN = 16 * CHUNK


def forward(inputs: Tensors, options: LinearAttentionOptions) -> dict[str, Tensor]:
    """Every output of the operator; `out` in q's dtype, the rest in fp32 (fp64 for fp64)."""
    tokens = _tokens(inputs, options)
    B, T, H, _ = tokens.q.shape
    V = tokens.v.shape[-1]
    out = torch.empty(B, T, H, V, dtype=tokens.q.dtype, device=tokens.q.device)
    normalizer = torch.ones(B, T, H, dtype=tokens.wide, device=tokens.q.device)
    state = initial = _initial(inputs, tokens)
    for rows, sums, after in _sums(tokens, initial, options.causal):
        state = after
        result = sums[..., :V] * options.scale
        if options.normalize:
            normalizer[:, rows] = sums[..., V] + options.eps
            result /= normalizer[:, rows, :, None]
        out[:, rows] = result
    if tokens.real is not None:
        out.masked_fill_(~tokens.real[..., None, None], 0)
        normalizer.masked_fill_(~tokens.real[..., None], 1)
    return {
        "out": out,
        "normalizer": normalizer,
        "final_s": state[..., :V].clone(memory_format=torch.contiguous_format),
        "final_z": state[..., V].clone(memory_format=torch.contiguous_format),
        "final_m": state.new_zeros(B, H),
    }


def backward(grads: Tensors, inputs: Tensors, outputs: Tensors, options: LinearAttentionOptions) -> dict[str, Tensor]:
    """Gradients of q, k, v and, when it is given, of the initial state."""
    tokens = _tokens(inputs, options)
    V = tokens.v.shape[-1]
    initial = _initial(inputs, tokens)
    final_grad = torch.zeros_like(initial)
    if "final_s" in grads:
        final_grad[..., :V] = grads["final_s"]
    if "final_z" in grads:
        final_grad[..., V] = grads["final_z"]
    above = _Above(grads.get("out"), outputs["out"], outputs["normalizer"], tokens.real, options)
    dq, dk, dv, state_grad = _sums_backward(tokens, initial, above, final_grad)
    found = {"q": dq, "k": dk, "v": dv}
    if "initial_s" in inputs:
        state_grad = state_grad * inputs["initial_m"].exp()[..., None, None]
        found["initial_s"] = state_grad[..., :V].clone(memory_format=torch.contiguous_format)
        found["initial_z"] = state_grad[..., V].clone(memory_format=torch.contiguous_format)
    return found


KERNEL = Implementation(forward, backward)


def _tokens(inputs: Tensors, options: LinearAttentionOptions) -> Tokens:
    real = inputs.get("attention_mask")
    runs = run_numbers(inputs.get("segment_ids"), real)
    return Tokens(inputs["q"], inputs["k"], inputs["v"], real, runs, options.feature_map, CHUNK, SPAN)


def _initial(inputs: Tensors, tokens: Tokens) -> Tensor:
    """The state (B, H, D, V + 1) before the first token."""
    B, _, H, D = tokens.q.shape
    if "initial_s" not in inputs:
        return torch.zeros(B, H, D, tokens.v.shape[-1] + 1, dtype=tokens.wide, device=tokens.q.device)
    state = torch.cat([inputs["initial_s"], inputs["initial_z"][..., None]], -1)
    return state * inputs["initial_m"].exp()[..., None, None]


# --- sums over the tokens that each token sees ------------------------------------------------------------------


def _sums(tokens: Tokens, state: Tensor, causal: bool) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """A span's rows, its φ(q)·[S, z] (B, L, H, V + 1), and the state so far, span by span."""
    if causal:
        yield from _causal(tokens, state)
    elif tokens.runs is None:
        state = _total(tokens, state)
        for start in tokens.starts():
            size = tokens.size(start)
            yield size.rows, joined(queries(tokens, size) @ state[:, :, None], size), state
    else:
        parts = list(_causal(tokens, state))
        before = torch.cat([sums for _, sums, _ in parts], 1)
        after = torch.cat([sums for _, sums, _ in _causal(tokens.reversed(), torch.zeros_like(state))], 1)
        yield slice(None), before + after.flip(1), parts[-1][2]


def _causal(tokens: Tokens, state: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    for start in tokens.starts():
        size = tokens.size(start)
        span = load(tokens, size)
        states = _states(span, state)
        sums = (span.q @ span.k.mT).mul_(span.seen) @ span.v
        sums += masked(span.q @ states[:, :, :-1], span.enters)
        state = states[:, :, -1]
        yield size.rows, joined(sums, size), state


def _states(span: Span, carry: Tensor) -> Tensor:
    """The states (B, H, n + 1, D, V + 1) at the boundaries of the chunks, from the one before the span."""
    added = masked(span.k, span.leaves).mT @ span.v
    return _reached(span.reach, torch.cat([carry[:, :, None], added], 2))


def _reached(reach: Tensor, states: Tensor) -> Tensor:
    return (reach @ states.flatten(3)).unflatten(3, states.shape[3:])


def _total(tokens: Tokens, state: Tensor) -> Tensor:
    for start in tokens.starts():
        k, v = keys_values(tokens, tokens.size(start))
        state = state + k.flatten(2, 3).mT @ v.flatten(2, 3)
    return state


# --- and their gradients ----------------------------------------------------------------------------------------

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
"""of q, k, v in their dtypes, and of the state before the first token"""


@dataclass(frozen=True)
class _Above:
    """What the gradient of the sums is made of, a span at a time: the gradient of `out`, or None, and both outputs."""

    grad: Tensor | None
    out: Tensor
    normalizer: Tensor
    real: Tensor | None
    options: LinearAttentionOptions

    def chunked(self, size: Size, wide: torch.dtype) -> Tensor:
        """(B, H, n, C, V + 1), 0 on padding."""
        out, normalizer = self.out[:, size.rows].to(wide), self.normalizer[:, size.rows]
        if self.grad is None:
            return chunked(pad(torch.zeros_like(out), (0, 1)), size, wide)
        grad = self.grad[:, size.rows].to(wide)
        found = pad(grad * (self.options.scale / normalizer[..., None]), (0, 1))
        if self.options.normalize:
            found[..., -1] = -torch.linalg.vecdot(grad, out) / normalizer
        if self.real is not None:
            found.masked_fill_(~self.real[:, size.rows, None, None], 0)
        return chunked(found, size, wide)

    def reversed(self) -> _Above:
        """Of the tokens from last to first."""
        grad, real = (x if x is None else x.flip(1) for x in (self.grad, self.real))
        return _Above(grad, self.out.flip(1), self.normalizer.flip(1), real, self.options)


def _sums_backward(tokens: Tokens, initial: Tensor, above: _Above, final_grad: Tensor) -> Gradients:
    if above.options.causal:
        return _causal_backward(tokens, initial, above, final_grad)
    if tokens.runs is None:
        return _total_backward(tokens, initial, above, final_grad)
    nothing = torch.zeros_like(initial)
    *before, state_grad = _causal_backward(tokens, initial, above, final_grad)
    after = _causal_backward(tokens.reversed(), nothing, above.reversed(), nothing)
    dq, dk, dv = (x + y.flip(1) for x, y in zip(before, after[:3], strict=True))
    return dq, dk, dv, state_grad


def _causal_backward(tokens: Tokens, state: Tensor, above: _Above, state_grad: Tensor) -> Gradients:
    carries = _carries(tokens, state)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (tokens.q, tokens.k, tokens.v))
    for start, carry in zip(reversed(tokens.starts()), reversed(carries), strict=True):
        size = tokens.size(start)
        span = load(tokens, size)
        grad = above.chunked(size, tokens.wide)
        q_in, k_out = masked(span.q, span.enters), masked(span.k, span.leaves)
        states = _states(span, carry)[:, :, :-1]
        reached = torch.cat([q_in.mT @ grad, state_grad[:, :, None]], 2)
        added = _reached(span.reach.mT, reached)
        state_grad, added = added[:, :, 0], added[:, :, 1:]
        weights = (span.q @ span.k.mT).mul_(span.seen)
        weights_grad = (grad @ span.v.mT).mul_(span.seen)
        dq_span = (weights_grad @ span.k).add_(masked(grad @ states.mT, span.enters))
        dk_span = (weights_grad.mT @ span.q).add_(masked(span.v @ added.mT, span.leaves))
        dv_span = (weights.mT @ grad).add_(k_out @ added)
        _write(tokens, size, span.q, span.k, (dq_span, dk_span, dv_span), (dq, dk, dv))
    return dq, dk, dv, state_grad


def _carries(tokens: Tokens, state: Tensor) -> list[Tensor]:
    """The states before each span."""
    carries = [state]
    for start in tokens.starts()[:-1]:
        size = tokens.size(start)
        k, v = keys_values(tokens, size)
        if tokens.runs is not None:
            runs, bounds = runs_and_bounds(tokens.runs, size)
            k = k * (runs == bounds[:, -1:, None])[:, None, ..., None]
            state = state * (bounds[:, 0] == bounds[:, -1])[:, None, None, None]
        state = state + k.flatten(2, 3).mT @ v.flatten(2, 3)
        carries.append(state)
    return carries


def _total_backward(tokens: Tokens, state: Tensor, above: _Above, state_grad: Tensor) -> Gradients:
    state = _total(tokens, state)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (tokens.q, tokens.k, tokens.v))

    for start in tokens.starts():
        size = tokens.size(start)
        q, grad = queries(tokens, size), above.chunked(size, tokens.wide)
        state_grad = state_grad + q.flatten(2, 3).mT @ grad.flatten(2, 3)
    for start in tokens.starts():
        size = tokens.size(start)
        q, grad = queries(tokens, size), above.chunked(size, tokens.wide)
        k, v = keys_values(tokens, size)
        added = state_grad[:, :, None]
        found = (grad @ state[:, :, None].mT, v @ added.mT, k @ added)
        _write(tokens, size, q, k, found, (dq, dk, dv))
    return dq, dk, dv, state_grad


def _write(
    tokens: Tokens,
    size: Size,
    q: Tensor,
    k: Tensor,
    found: tuple[Tensor, Tensor, Tensor],
    into: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Put a span's gradients of features and values, through the feature map, where they belong."""
    dq, dk, dv = (x[:, size.rows] for x in into)
    dq[:] = joined(through_features(found[0], q, tokens.feature_map), size)
    dk[:] = joined(through_features(found[1], k, tokens.feature_map), size)
    dv[:] = joined(found[2][..., :-1], size)
    if tokens.real is not None:
        dk.masked_fill_(~tokens.real[:, size.rows, None, None], 0)
