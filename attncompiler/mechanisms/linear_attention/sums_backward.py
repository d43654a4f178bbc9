"""The gradients of the chunkwise kernel's sums, span by span from the last to the first.

Shapes: n chunks of C tokens in a span; features and values of a span are (B, H, n, C, ·), states (B, H, ·, R, V + 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from attncompiler.blocks.underflow import LOG2_E, exp2_
from attncompiler.mechanisms.linear_attention.op import LinearAttentionOptions
from attncompiler.mechanisms.linear_attention.spans import (
    Features,
    Size,
    Tokens,
    chunked,
    finite,
    joined,
    keys_values,
    masked,
    queries,
    settled,
    through_features,
)
from attncompiler.mechanisms.linear_attention.sums import (
    Span,
    State,
    leaving,
    load,
    passed_on,
    scaled,
    states_of,
    times,
    total,
    whole,
)
from attncompiler.mechanisms.linear_attention.weights import Weights


@dataclass(frozen=True)
class Gradients:
    """Of q, k, v and log_decay in their dtypes, and of the state before the first token."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    state: Tensor

    @classmethod
    def empty(cls, tokens: Tokens, state: Tensor) -> Gradients:
        q, k, v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (tokens.q, tokens.k, tokens.v))
        g = tokens.log_decay
        return cls(q, k, v, None if g is None else torch.empty_like(g, memory_format=torch.contiguous_format), state)


@dataclass(frozen=True)
class Above:
    """What the gradient of the sums is made of, a span at a time: the gradient of `out`, or None, and both outputs."""

    grad: Tensor | None
    out: Tensor
    normalizer: Tensor
    real: Tensor | None
    options: LinearAttentionOptions

    def chunked(self, size: Size, wide: torch.dtype, m: Tensor | None) -> Tensor:
        """(B, H, n, C, V + 1), 0 on padding, of sums that are times 2^m, m (B, H, n, C)."""
        out, normalizer = self.out[:, size.rows].to(wide), self.normalizer[:, size.rows, :, None]
        if self.grad is None:
            return chunked(pad(torch.zeros_like(out), (0, 1)), size, wide)
        grad = self.grad[:, size.rows].to(wide)
        found = pad(grad * self.options.scale, (0, 1))
        if self.options.normalize:
            found[..., -1] = -torch.linalg.vecdot(grad, out)
        if m is None:
            found /= normalizer
        else:
            found = settled(scaled(found, joined(m[..., None], size) - normalizer * LOG2_E), m)
        if self.real is not None:
            found.masked_fill_(~self.real[:, size.rows, None, None], 0)
        return chunked(found, size, wide)

    def reversed(self) -> Above:
        """Of the tokens from last to first."""
        grad, real = (x if x is None else x.flip(1) for x in (self.grad, self.real))
        return Above(grad, self.out.flip(1), self.normalizer.flip(1), real, self.options)


def sums_backward(tokens: Tokens, initial: State, above: Above, final_grad: Tensor) -> Gradients:
    if above.options.causal:
        return _causal(tokens, initial, above, final_grad)
    if tokens.runs is None:
        return _of_all(tokens, initial, above, final_grad)
    sums = torch.zeros_like(initial.sums)
    nothing = State(sums, None if initial.m is None else torch.full_like(initial.m, -math.inf))
    before = _causal(tokens, initial, above, final_grad)
    after = _causal(tokens.reversed(), nothing, above.reversed(), sums)
    q, k, v = (getattr(before, name) + getattr(after, name).flip(1) for name in "qkv")
    return Gradients(q, k, v, None, before.state)


def _causal(tokens: Tokens, state: State, above: Above, state_grad: Tensor) -> Gradients:
    carries = _carries(tokens, state)
    into = Gradients.empty(tokens, state_grad)
    for start, carry in zip(reversed(tokens.starts()), reversed(carries), strict=True):
        size = tokens.size(start)
        span = load(tokens, size, carry.m)
        (q, _), (k, _), v, across, inside = span.q, span.k, span.v, span.across, span.inside
        grad = above.chunked(size, tokens.wide, span.m)
        states = states_of(span, carry.sums)[:, :, :-1]
        entering = q if inside.enters is None else settled(q * inside.enters, span.m)
        reached = torch.cat([settled(entering.mT @ grad, span.m), state_grad[:, :, None]], 2)
        added = settled(passed_on(across.reach.mT, reached), span.m)
        behind, state_grad = added[:, :, 1:], added[:, :, 0]

        products, products_grad = (settled(x, span.m) for x in (q @ k.mT, (grad @ v.mT).mul_(inside.seen)))
        from_state = settled(masked(settled(grad @ states.mT, span.m), inside.enters), span.m)
        to_state = settled(masked(settled(v @ behind.mT, span.m), across.leaves), span.m)
        if into.log_decay is not None:
            decay_grad = _decay_gradient(span, products * products_grad, from_state, to_state, states, reached)
            into.log_decay[:, size.rows] = joined(decay_grad[..., None], size)[..., 0]
        dv = (settled(products.mul_(inside.seen), span.m).mT @ grad).add_(leaving(span) @ behind)
        dq, dk = from_state.add_(products_grad @ k), to_state.add_(products_grad.mT @ q)
        _write(tokens, size, span.q, span.k, (dq, dk, dv), into)
    if into.log_decay is not None and tokens.real is not None:
        into.log_decay.masked_fill_(~tokens.real[..., None], 0)
    return Gradients(into.q, into.k, into.v, into.log_decay, state_grad)


def _decay_gradient(
    span: Span, pairs: Tensor, from_state: Tensor, to_state: Tensor, states: Tensor, reached: Tensor
) -> Tensor:
    """The gradient of each token's log_decay (B, H, n, C): all that passes it, what is weighed times its gradient.

    `pairs` (B, H, n, C, C) are the pairs of a chunk; `from_state` and `to_state` the gradients of φ(q) and φ(k) across
    the boundaries of chunks, `states` before each chunk, and `reached` the gradients of the states by what reads them.
    Each sum holds what passes the token and nothing else: no difference of two long sums.
    """
    assert span.across.through is not None
    between = pairs.cumsum(-1).tril_(-1).sum(-2)  # of token s: from s and before it to behind s, so that it passes s+1
    ended = torch.linalg.vecdot(span.k.values, to_state).cumsum(-1)
    started = torch.linalg.vecdot(span.q.values, from_state).flip(-1).cumsum(-1).flip(-1)
    onward = torch.empty_like(states)  # the gradient of the whole state at the boundary behind each chunk
    carried = reached[:, :, -1]
    for chunk in range(states.shape[2] - 1, -1, -1):
        onward[:, :, chunk] = carried
        carried = reached[:, :, chunk] + span.across.through[:, :, chunk, None, None] * carried
    kept = torch.linalg.vecdot(states.flatten(3), onward.flatten(3)) * span.across.through
    return started + kept[..., None] + pad((between + ended)[..., :-1], (1, 0))


def _carries(tokens: Tokens, state: State) -> list[State]:
    """The states before each span."""
    carries = [state]
    for start in tokens.starts()[:-1]:
        size = tokens.size(start)
        (k, m), v = keys_values(tokens, size)
        weights = Weights(tokens, size, m, state.m)
        if not weights.plain or tokens.runs is not None:
            across = weights.across()
            to_end = across.reach[..., -1, :, None, None]
            k = settled(masked(k, across.leaves) * to_end[..., 1:, :, :], m)
            state = State(state.sums * to_end[..., 0, :, :], None if across.m is None else across.m[..., -1])
        state = State(state.sums + k.flatten(2, 3).mT @ v.flatten(2, 3), state.m)
        carries.append(state)
    return carries


def _of_all(tokens: Tokens, initial: State, above: Above, state_grad: Tensor) -> Gradients:
    state = total(tokens, initial)
    into = Gradients.empty(tokens, state_grad)

    for start in tokens.starts():
        size = tokens.size(start)
        q = queries(tokens, size)
        grad = above.chunked(size, tokens.wide, times(q.m, state))
        state_grad = state_grad + q.values.flatten(2, 3).mT @ grad.flatten(2, 3)
    for start in tokens.starts():
        size = tokens.size(start)
        q, (k, v) = queries(tokens, size), keys_values(tokens, size)
        grad = above.chunked(size, tokens.wide, times(q.m, state))
        added = state_grad[:, :, None]
        weight = None if k.m is None or state.m is None else whole(k.m, state.m)
        dk, dv = masked(v @ added.mT, weight), masked(k.values, weight) @ added
        _write(tokens, size, q, k, (grad @ state.sums[:, :, None].mT, dk, dv), into)
    if initial.m is not None and state.m is not None:
        state_grad = state_grad * exp2_(initial.m - finite(state.m))[..., None, None]
    return Gradients(into.q, into.k, into.v, None, state_grad)


def _write(
    tokens: Tokens, size: Size, q: Features, k: Features, found: tuple[Tensor, Tensor, Tensor], into: Gradients
) -> None:
    """Put a span's gradients of features and values, through the feature map, where they belong."""
    rows = size.rows
    into.q[:, rows] = joined(through_features(found[0], q.values, tokens.q[:, rows], size, tokens), size)
    into.k[:, rows] = joined(through_features(found[1], k.values, tokens.k[:, rows], size, tokens), size)
    into.v[:, rows] = joined(found[2][..., :-1], size)
    if tokens.real is not None:
        into.k[:, rows].masked_fill_(~tokens.real[:, rows, None, None], 0)
