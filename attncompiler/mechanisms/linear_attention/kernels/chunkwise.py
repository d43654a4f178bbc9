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

from attncompiler.mechanisms.linear_attention.op import LinearAttentionOptions
from attncompiler.mechanisms.linear_attention.runs import run_numbers
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
    for start, sums, after in _sums(tokens, initial, options.causal):
        state = after
        span = slice(start, start + sums.shape[1])
        result = sums[..., :V] * options.scale
        if options.normalize:
            normalizer[:, span] = sums[..., V] + options.eps
            result /= normalizer[:, span, :, None]
        out[:, span] = result
    if tokens.real is not None:
        out.mul_(tokens.real[..., None, None])
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
    sums_grad = _sums_grad(grads, outputs, options, tokens)
    dq, dk, dv, state_grad = _sums_backward(tokens, initial, sums_grad, final_grad, options.causal)
    found = {"q": dq, "k": dk, "v": dv}
    if "initial_s" in inputs:
        state_grad = state_grad * inputs["initial_m"].exp()[..., None, None]
        found["initial_s"] = state_grad[..., :V].clone(memory_format=torch.contiguous_format)
        found["initial_z"] = state_grad[..., V].clone(memory_format=torch.contiguous_format)
    return found


KERNEL = Implementation(forward, backward)


# --- the tokens of a call, and of a span ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tokens:
    """q, k (B, T, H, D), v (B, T, H, V); `real` (B, T), None where all are; `runs` (B, T), None where there is one."""

    q: Tensor
    k: Tensor
    v: Tensor
    real: Tensor | None
    runs: Tensor | None
    feature_map: str
    strict: bool = False
    """a token does not see itself"""

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.q.dtype, torch.float32)

    def reversed(self) -> _Tokens:
        """The tokens from last to first, none seeing itself: what each had after it."""
        q, k, v = (x.flip(1) for x in (self.q, self.k, self.v))
        real, runs = (x if x is None else x.flip(1) for x in (self.real, self.runs))
        return _Tokens(q, k, v, real, runs, self.feature_map, strict=True)


@dataclass(frozen=True)
class _Span:
    """Features and values of a span, chunked, and the masks that follow from its runs.

    q, k (B, H, n, C, D), k being 0 on padding; v (B, H, n, C, V + 1); `seen` (C, C) or (B, 1, n, C, C): the pairs of a
    chunk that meet; `enters` and `leaves` (B, 1, n, C, 1): whether a token is of the run that a chunk is entered or
    left by, None where all are; `reach` ([B, 1,] n + 1, n + 1): whether the state added at boundary j is part of the
    state at boundary i.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    seen: Tensor
    enters: Tensor | None
    leaves: Tensor | None
    reach: Tensor


def _tokens(inputs: Tensors, options: LinearAttentionOptions) -> _Tokens:
    real = inputs.get("attention_mask")
    runs = run_numbers(inputs.get("segment_ids"), real)
    return _Tokens(inputs["q"], inputs["k"], inputs["v"], real, runs, options.feature_map)


def _initial(inputs: Tensors, tokens: _Tokens) -> Tensor:
    """The state (B, H, D, V + 1) before the first token."""
    B, _, H, D = tokens.q.shape
    if "initial_s" not in inputs:
        return torch.zeros(B, H, D, tokens.v.shape[-1] + 1, dtype=tokens.wide, device=tokens.q.device)
    state = torch.cat([inputs["initial_s"], inputs["initial_z"][..., None]], -1)
    return state * inputs["initial_m"].exp()[..., None, None]


def _starts(tokens: _Tokens) -> range:
    return range(0, tokens.q.shape[1], SPAN)


def _sizes(tokens: _Tokens, start: int) -> tuple[int, int, int]:
    """Tokens in the span, chunks, and tokens a chunk."""
    length = min(SPAN, tokens.q.shape[1] - start)
    C = min(CHUNK, length)
    return length, -(-length // C), C


def _chunked(x: Tensor, count: int, wide: torch.dtype, ones: bool = False) -> Tensor:
    """A copy (B, H, n, C, ·) of (B, L, H, ·), with zeros behind the last token, and a last column of ones if asked."""
    B, length, H, width = x.shape
    C = min(CHUNK, length)
    copy = torch.empty(B, H, count * C, width + ones, dtype=wide, device=x.device)
    copy[:, :, :length, :width] = x.transpose(1, 2)
    copy[:, :, length:] = 0
    if ones:
        copy[..., width] = 1
    return copy.unflatten(2, (count, C))


def _joined(x: Tensor, length: int) -> Tensor:
    """(B, H, n, C, ·) → a view (B, L, H, ·)."""
    return x.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :length]


def _keys_values(tokens: _Tokens, start: int) -> tuple[Tensor, Tensor]:
    length, n, _ = _sizes(tokens, start)
    span = slice(start, start + length)
    k = _features(_chunked(tokens.k[:, span], n, tokens.wide), tokens.feature_map)
    v = _chunked(tokens.v[:, span], n, tokens.wide, ones=True)
    if tokens.real is not None:
        k *= _chunked(tokens.real[:, span, None, None], n, tokens.wide)
    rest = n * k.shape[3] - length
    if rest:
        k[:, :, -1, -rest:] = 0
    return k, v


def _load(tokens: _Tokens, start: int) -> _Span:
    length, n, C = _sizes(tokens, start)
    q = _features(_chunked(tokens.q[:, start : start + length], n, tokens.wide), tokens.feature_map)
    k, v = _keys_values(tokens, start)
    seen = torch.ones(C, C, dtype=torch.bool, device=q.device).tril(-1 if tokens.strict else 0)
    reach = torch.ones(n + 1, n + 1, dtype=torch.bool, device=q.device).tril()
    enters = leaves = None
    if tokens.runs is not None:
        runs, bounds = _runs(tokens.runs, start, n, C)
        seen = seen & (runs[..., :, None] == runs[..., None, :])[:, None]
        reach = reach & (bounds[:, :, None] == bounds[:, None, :])[:, None]
        enters = (runs == bounds[:, :-1, None])[:, None, ..., None]
        leaves = (runs == bounds[:, 1:, None])[:, None, ..., None]
    return _Span(q, k, v, seen, enters, leaves, reach.to(tokens.wide))


def _runs(runs: Tensor, start: int, n: int, C: int) -> tuple[Tensor, Tensor]:
    """Runs (B, n, C) of a span's tokens, the last repeated, and (B, n + 1) of the token before each boundary."""
    inside = runs[:, start : start + n * C]
    rest = n * C - inside.shape[1]
    inside = torch.cat([inside, inside[:, -1:].expand(-1, rest)], 1).unflatten(1, (n, C))
    before = runs[:, max(start - 1, 0), None]
    return inside, torch.cat([before, inside[..., -1]], 1)


def _features(x: Tensor, feature_map: str) -> Tensor:
    """φ(x) of a tensor that may be overwritten. φ of the Linear Transformer is exp(min(x, 0)) + max(x, 0)."""
    if feature_map == "elu":
        return x.clamp(max=0).exp_().add_(x.clamp_(min=0))
    return x.relu_() if feature_map == "relu" else x


def _through_features(grad: Tensor, features: Tensor, feature_map: str) -> Tensor:
    """The gradient behind φ, from φ's value: its slope is min(φ, 1) for elu, and 0 or 1 for relu."""
    if feature_map == "elu":
        return grad * features.clamp(max=1)
    return grad * (features > 0) if feature_map == "relu" else grad


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


# --- sums over the tokens that each token sees ------------------------------------------------------------------


def _sums(tokens: _Tokens, state: Tensor, causal: bool) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Start of a span, its φ(q)·[S, z] (B, L, H, V + 1), and the state so far, span by span."""
    if causal:
        yield from _causal(tokens, state)
    elif tokens.runs is None:
        state = _total(tokens, state)
        for start in _starts(tokens):
            length, n, _ = _sizes(tokens, start)
            q = _features(_chunked(tokens.q[:, start : start + length], n, tokens.wide), tokens.feature_map)
            yield start, _joined(q @ state[:, :, None], length), state
    else:
        parts = list(_causal(tokens, state))
        before = torch.cat([sums for _, sums, _ in parts], 1)
        after = torch.cat([sums for _, sums, _ in _causal(tokens.reversed(), torch.zeros_like(state))], 1)
        yield 0, before + after.flip(1), parts[-1][2]


def _causal(tokens: _Tokens, state: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    for start in _starts(tokens):
        length, _, _ = _sizes(tokens, start)
        span = _load(tokens, start)
        states = _states(span, state)
        sums = (span.q @ span.k.mT).mul_(span.seen) @ span.v
        sums += _masked(span.q @ states[:, :, :-1], span.enters)
        state = states[:, :, -1]
        yield start, _joined(sums, length), state


def _states(span: _Span, carry: Tensor) -> Tensor:
    """The states (B, H, n + 1, D, V + 1) at the boundaries of the chunks, from the one before the span."""
    added = _masked(span.k, span.leaves).mT @ span.v
    return _reached(span.reach, torch.cat([carry[:, :, None], added], 2))


def _reached(reach: Tensor, states: Tensor) -> Tensor:
    return (reach @ states.flatten(3)).unflatten(3, states.shape[3:])


def _total(tokens: _Tokens, state: Tensor) -> Tensor:
    for start in _starts(tokens):
        k, v = _keys_values(tokens, start)
        state = state + k.flatten(2, 3).mT @ v.flatten(2, 3)
    return state


# --- and their gradients ----------------------------------------------------------------------------------------

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
"""of q, k, v in their dtypes, and of the state before the first token"""


def _sums_grad(grads: Tensors, outputs: Tensors, options: LinearAttentionOptions, tokens: _Tokens) -> Tensor | None:
    """The gradient of the sums (B, T, H, V + 1), None where `out` has none. Padding has none."""
    if "out" not in grads:
        return None
    grad = grads["out"].to(tokens.wide)
    over = options.scale / outputs["normalizer"][..., None]
    found = pad(grad * over, (0, 1))
    if options.normalize:
        found[..., -1] = -torch.linalg.vecdot(grad, outputs["out"].to(tokens.wide)) / outputs["normalizer"]
    return found if tokens.real is None else found * tokens.real[..., None, None]


def _sums_backward(
    tokens: _Tokens, initial: Tensor, sums_grad: Tensor | None, final_grad: Tensor, causal: bool
) -> Gradients:
    if sums_grad is None:
        B, T, H, _ = tokens.q.shape
        sums_grad = torch.zeros(1, 1, 1, 1, dtype=tokens.wide, device=tokens.q.device).expand(
            B, T, H, initial.shape[-1]
        )
    if causal:
        return _causal_backward(tokens, initial, sums_grad, final_grad)
    if tokens.runs is None:
        return _total_backward(tokens, initial, sums_grad, final_grad)
    nothing = torch.zeros_like(initial)
    *before, state_grad = _causal_backward(tokens, initial, sums_grad, final_grad)
    after = _causal_backward(tokens.reversed(), nothing, sums_grad.flip(1), nothing)
    dq, dk, dv = (x + y.flip(1) for x, y in zip(before, after[:3], strict=True))
    return dq, dk, dv, state_grad


def _causal_backward(tokens: _Tokens, state: Tensor, sums_grad: Tensor, state_grad: Tensor) -> Gradients:
    carries = _carries(tokens, state)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (tokens.q, tokens.k, tokens.v))
    for start, carry in zip(reversed(_starts(tokens)), reversed(carries), strict=True):
        length, n, _ = _sizes(tokens, start)
        rows = slice(start, start + length)
        span = _load(tokens, start)
        grad = _chunked(sums_grad[:, rows], n, tokens.wide)
        q_in, k_out = _masked(span.q, span.enters), _masked(span.k, span.leaves)
        states = _states(span, carry)[:, :, :-1]
        reached = torch.cat([q_in.mT @ grad, state_grad[:, :, None]], 2)
        added = _reached(span.reach.mT, reached)
        state_grad, added = added[:, :, 0], added[:, :, 1:]
        weights = (span.q @ span.k.mT).mul_(span.seen)
        weights_grad = (grad @ span.v.mT).mul_(span.seen)
        dq_span = (weights_grad @ span.k).add_(_masked(grad @ states.mT, span.enters))
        dk_span = (weights_grad.mT @ span.q).add_(_masked(span.v @ added.mT, span.leaves))
        dv_span = (weights.mT @ grad).add_(k_out @ added)
        _write(tokens, rows, span.q, span.k, (dq_span, dk_span, dv_span), (dq, dk, dv))
    return dq, dk, dv, state_grad


def _carries(tokens: _Tokens, state: Tensor) -> list[Tensor]:
    """The states before each span."""
    carries = [state]
    for start in _starts(tokens)[:-1]:
        k, v = _keys_values(tokens, start)
        if tokens.runs is not None:
            _, n, C = _sizes(tokens, start)
            runs, bounds = _runs(tokens.runs, start, n, C)
            k = k * (runs == bounds[:, -1:, None])[:, None, ..., None]
            state = state * (bounds[:, 0] == bounds[:, -1])[:, None, None, None]
        state = state + k.flatten(2, 3).mT @ v.flatten(2, 3)
        carries.append(state)
    return carries


def _total_backward(tokens: _Tokens, state: Tensor, sums_grad: Tensor, state_grad: Tensor) -> Gradients:
    state = _total(tokens, state)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (tokens.q, tokens.k, tokens.v))

    def part(start: int) -> tuple[slice, Tensor, Tensor]:
        length, n, _ = _sizes(tokens, start)
        rows = slice(start, start + length)
        q = _features(_chunked(tokens.q[:, rows], n, tokens.wide), tokens.feature_map)
        return rows, q, _chunked(sums_grad[:, rows], n, tokens.wide)

    for start in _starts(tokens):
        _, q, grad = part(start)
        state_grad = state_grad + q.flatten(2, 3).mT @ grad.flatten(2, 3)
    for start in _starts(tokens):
        rows, q, grad = part(start)
        k, v = _keys_values(tokens, start)
        added = state_grad[:, :, None]
        found = (grad @ state[:, :, None].mT, v @ added.mT, k @ added)
        _write(tokens, rows, q, k, found, (dq, dk, dv))
    return dq, dk, dv, state_grad


def _write(
    tokens: _Tokens,
    rows: slice,
    q: Tensor,
    k: Tensor,
    found: tuple[Tensor, Tensor, Tensor],
    into: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Put a span's gradients of features and values, through the feature map, where they belong."""
    length = rows.stop - rows.start
    dq, dk, dv = into
    dq[:, rows] = _joined(_through_features(found[0], q, tokens.feature_map), length)
    dk[:, rows] = _joined(_through_features(found[1], k, tokens.feature_map), length)
    dv[:, rows] = _joined(found[2][..., :-1], length)
    if tokens.real is not None:
        dk[:, rows] *= tokens.real[:, rows, None, None]
