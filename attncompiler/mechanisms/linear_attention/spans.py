"""A call's tokens, and spans of them as features in chunks: what the chunkwise kernel computes with.

Shapes: n chunks of C tokens in a span of L; features and values of a span are (B, H, n, C, ·).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """q, k (B, T, H, D), v (B, T, H, V); `real` (B, T), None where all are; `runs` (B, T), None where there is one."""

    q: Tensor
    k: Tensor
    v: Tensor
    real: Tensor | None
    runs: Tensor | None
    feature_map: str
    chunk_size: int
    span_size: int
    """tokens that are handled at once, whole chunks"""
    strict: bool = False
    """a token does not see itself"""

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.q.dtype, torch.float32)

    def reversed(self) -> Tokens:
        """The tokens from last to first, none seeing itself: what each had after it."""
        q, k, v = (x.flip(1) for x in (self.q, self.k, self.v))
        real, runs = (x if x is None else x.flip(1) for x in (self.real, self.runs))
        return Tokens(q, k, v, real, runs, self.feature_map, self.chunk_size, self.span_size, strict=True)

    def starts(self) -> range:
        """The first token of every span."""
        return range(0, self.q.shape[1], self.span_size)

    def size(self, start: int) -> Size:
        """The size of the span that begins at `start`."""
        length = min(self.span_size, self.q.shape[1] - start)
        C = min(self.chunk_size, length)
        return Size(slice(start, start + length), length, -(-length // C), C)


class Size(NamedTuple):
    """A span's rows in the sequence, its length L, its chunks n and the tokens C of each: n·C is L or more."""

    rows: slice
    L: int
    n: int
    C: int


@dataclass(frozen=True)
class Span:
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


def chunked(x: Tensor, size: Size, wide: torch.dtype, ones: bool = False) -> Tensor:
    """A copy (B, H, n, C, ·) of (B, L, H, ·), with zeros behind the last token, and a last column of ones if asked."""
    B, L, H, width = x.shape
    copy = torch.empty(B, H, size.n * size.C, width + ones, dtype=wide, device=x.device)
    copy[:, :, :L, :width] = x.transpose(1, 2)
    copy[:, :, L:] = 0
    if ones:
        copy[..., width] = 1
    return copy.unflatten(2, (size.n, size.C))


def joined(x: Tensor, size: Size) -> Tensor:
    """(B, H, n, C, ·) → a view (B, L, H, ·)."""
    return x.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, : size.L]


def queries(tokens: Tokens, size: Size) -> Tensor:
    """φ(q) of a span."""
    return features(chunked(tokens.q[:, size.rows], size, tokens.wide), tokens.feature_map)


def keys_values(tokens: Tokens, size: Size) -> tuple[Tensor, Tensor]:
    """φ(k) of a span, 0 on padding and behind its last token, and v with a column of ones."""
    k = features(chunked(tokens.k[:, size.rows], size, tokens.wide), tokens.feature_map)
    if tokens.real is not None:
        k *= chunked(tokens.real[:, size.rows, None, None], size, tokens.wide)
    elif rest := size.n * size.C - size.L:
        k[:, :, -1, -rest:] = 0
    return k, chunked(tokens.v[:, size.rows], size, tokens.wide, ones=True)


def load(tokens: Tokens, size: Size) -> Span:
    """The span, with its masks."""
    q, (k, v) = queries(tokens, size), keys_values(tokens, size)
    seen = torch.ones(size.C, size.C, dtype=torch.bool, device=q.device).tril(-1 if tokens.strict else 0)
    reach = torch.ones(size.n + 1, size.n + 1, dtype=torch.bool, device=q.device).tril()
    enters = leaves = None
    if tokens.runs is not None:
        runs, bounds = runs_and_bounds(tokens.runs, size)
        seen = seen & (runs[..., :, None] == runs[..., None, :])[:, None]
        reach = reach & (bounds[:, :, None] == bounds[:, None, :])[:, None]
        enters = (runs == bounds[:, :-1, None])[:, None, ..., None]
        leaves = (runs == bounds[:, 1:, None])[:, None, ..., None]
    return Span(q, k, v, seen, enters, leaves, reach.to(tokens.wide))


def runs_and_bounds(runs: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """Runs (B, n, C) of a span's tokens, the last repeated, and (B, n + 1) of the token before each boundary."""
    inside = runs[:, size.rows]
    rest = inside[:, -1:].expand(-1, size.n * size.C - size.L)
    inside = torch.cat([inside, rest], 1).unflatten(1, (size.n, size.C))
    before = runs[:, max(size.rows.start - 1, 0), None]
    return inside, torch.cat([before, inside[..., -1]], 1)


def features(x: Tensor, feature_map: str) -> Tensor:
    """φ(x) of a tensor that may be overwritten. φ of the Linear Transformer is exp(min(x, 0)) + max(x, 0)."""
    if feature_map == "elu":
        return x.clamp(max=0).exp_().add_(x.clamp_(min=0))
    return x.relu_() if feature_map == "relu" else x


def through_features(grad: Tensor, features: Tensor, feature_map: str) -> Tensor:
    """The gradient behind φ, from φ's value: its slope is min(φ, 1) for elu, and 0 or 1 for relu."""
    if feature_map == "elu":
        return grad * features.clamp(max=1)
    return grad * (features > 0) if feature_map == "relu" else grad


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """x, 0 where the mask, if there is one, is False."""
    return x if mask is None else x * mask
