"""φ(q)·[S, z] of every token, and the states between chunks: the chunkwise kernel's sums.

Inside a chunk every pair of tokens is met; what came before a chunk arrives as the state. The normaliser is one more
column of v, all ones, so that S and z are one state of V + 1 columns.

Shapes: n chunks of C tokens in a span; features and values of a span are (B, H, n, C, ·), states (B, H, ·, R, V + 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attncompiler.blocks.underflow import exp2_
from attncompiler.mechanisms.linear_attention.spans import (
    Features,
    Size,
    Tokens,
    finite,
    joined,
    keys_values,
    masked,
    queries,
    settled,
)
from attncompiler.mechanisms.linear_attention.weights import Across, Inside, Weights


class State(NamedTuple):
    """The sums (B, H, R, V + 1) times 2^m, m (B, H); m is None but for favor."""

    sums: Tensor
    m: Tensor | None


class Sums(NamedTuple):
    """φ(q)·[S, z] of some rows: `values` (B, L, H, V + 1) times 2^m, m (B, L, H); m is None but for favor."""

    values: Tensor
    m: Tensor | None


def sums_of(tokens: Tokens, state: State, causal: bool) -> Iterator[tuple[slice, Sums, State]]:
    """A span's rows, its φ(q)·[S, z], and the state so far, span by span."""
    if causal:
        yield from _causal(tokens, state)
    elif tokens.runs is None:
        state = total(tokens, state)
        for start in tokens.starts():
            size = tokens.size(start)
            q, m = queries(tokens, size)
            yield size.rows, _rows(q @ state.sums[:, :, None], times(m, state), size), state
    else:
        parts = list(_causal(tokens, state))
        before = _concatenated([sums for _, sums, _ in parts])
        nothing = State(torch.zeros_like(state.sums), None if state.m is None else torch.full_like(state.m, -math.inf))
        after = _concatenated([sums for _, sums, _ in _causal(tokens.reversed(), nothing)])
        yield slice(None), _both(before, after), parts[-1][2]


def _causal(tokens: Tokens, state: State) -> Iterator[tuple[slice, Sums, State]]:
    for start in tokens.starts():
        size = tokens.size(start)
        span = load(tokens, size, state.m)
        states = states_of(span, state.sums)
        pairs = settled((span.q.values @ span.k.values.mT).mul_(span.inside.seen), span.m)
        sums = pairs @ span.v
        sums += masked(settled(span.q.values @ states[:, :, :-1], span.m), span.inside.enters)
        settled(sums, span.m)
        state = State(states[:, :, -1], None if span.across.m is None else span.across.m[..., -1])
        yield size.rows, _rows(sums, span.m, size), state


@dataclass(frozen=True)
class Span:
    """Features and values of a span, chunked, and their weights; m (B, H, n, C), of its sums, is None but for favor."""

    q: Features
    k: Features
    v: Tensor
    across: Across
    inside: Inside
    m: Tensor | None


def load(tokens: Tokens, size: Size, carried: Tensor | None) -> Span:
    """The span, M before it being `carried`."""
    q, (k, v) = queries(tokens, size), keys_values(tokens, size)
    weights = Weights(tokens, size, k.m, carried)
    across = weights.across()
    inside = weights.inside(across)
    return Span(q, k, v, across, inside, None if q.m is None or inside.m is None else q.m + inside.m)


def states_of(span: Span, carry: Tensor) -> Tensor:
    """The states (B, H, n + 1, R, V + 1) at the boundaries of the chunks, from the one before the span."""
    added = leaving(span).mT @ span.v
    return settled(passed_on(span.across.reach, torch.cat([carry[:, :, None], added], 2)), span.m)


def leaving(span: Span) -> Tensor:
    """φ(k) as it counts at the end of its chunk."""
    return settled(masked(span.k.values, span.across.leaves), span.m)


def passed_on(reach: Tensor, states: Tensor) -> Tensor:
    """Each boundary's sum of the states (B, H, n + 1, R, V + 1) that reach it, by their weights."""
    return (reach @ states.flatten(3)).unflatten(3, states.shape[3:])


def total(tokens: Tokens, state: State) -> State:
    """The state behind the last token, all being of one run and nothing decaying."""
    for start in tokens.starts():
        (k, m), v = keys_values(tokens, tokens.size(start))
        sums = state.sums
        if m is not None and state.m is not None:
            largest = torch.maximum(state.m, m.amax((-1, -2)))
            k = settled(k * whole(m, largest), m)
            sums = settled(sums * exp2_(state.m - finite(largest))[..., None, None], m)
            state = State(sums, largest)
        state = State(sums + k.flatten(2, 3).mT @ v.flatten(2, 3), state.m)
    return state


def whole(m: Tensor, largest: Tensor) -> Tensor:
    """The weight of each key (B, H, n, C, 1) in a state times 2^largest (B, H)."""
    return exp2_(m - finite(largest)[..., None, None])[..., None]


def times(m: Tensor | None, state: State) -> Tensor | None:
    """The exponents (B, H, n, C) of sums that queries of logarithm m read from one state."""
    return None if m is None or state.m is None else m + finite(state.m)[..., None, None]


def _rows(sums: Tensor, m: Tensor | None, size: Size) -> Sums:
    return Sums(joined(sums, size), None if m is None else joined(m[..., None], size)[..., 0])


def _concatenated(parts: list[Sums]) -> Sums:
    ms = [part.m for part in parts if part.m is not None]
    return Sums(torch.cat([part.values for part in parts], 1), torch.cat(ms, 1) if ms else None)


def _both(before: Sums, after: Sums) -> Sums:
    """The sums of what is before and of what is after, counted from the end."""
    first, second = before.values, after.values.flip(1)
    if before.m is None or after.m is None:
        return Sums(first + second, None)
    later = after.m.flip(1)
    m = torch.maximum(before.m, later)
    first, second = first * exp2_(before.m - finite(m))[..., None], second * exp2_(later - finite(m))[..., None]
    return Sums(first + second, m)


def scaled(x: Tensor, exponent: Tensor) -> Tensor:
    """x · 2^exponent, in range wherever the product is."""
    half = exp2_(exponent.clamp(min=0) / 2)
    return x * exp2_(exponent.clamp(max=0)) * half * half
