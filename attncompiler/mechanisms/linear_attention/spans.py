"""A call's tokens, and spans of them as features in chunks: what the chunkwise kernel computes with.

Shapes: n chunks of C tokens in a span of L; features and values of a span are (B, H, n, C, ·).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from attncompiler.blocks.segments import run_numbers
from attncompiler.blocks.underflow import LOG2_E, exp2_, flush_signed_
from attncompiler.mechanisms.linear_attention.op import LinearAttentionOptions
from attncompiler.runtime.implementation import Tensors

NEVER = -1e30
"""The least logarithm of a decay that is told apart from −∞: times 0 it is 0, and so are its sums' exponentials."""


@dataclass(frozen=True)
class Tokens:
    """q, k (B, T, H, D), v (B, T, H, V), log_decay (B, T, H), None where nothing decays.

    `real` (B, T) is None where all tokens are; `runs` (B, T) where there is one; `projection` (R, D) is of favor.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    real: Tensor | None
    runs: Tensor | None
    projection: Tensor | None
    feature_map: str
    chunk_size: int
    span_size: int
    """tokens that are handled at once, whole chunks"""
    strict: bool = False
    """a token does not see itself"""

    @classmethod
    def of(cls, inputs: Tensors, options: LinearAttentionOptions, chunk_size: int, span_size: int) -> Tokens:
        """The tokens of a call."""
        real = inputs.get("attention_mask")
        return cls(
            q=inputs["q"],
            k=inputs["k"],
            v=inputs["v"],
            log_decay=inputs.get("log_decay"),
            real=real,
            runs=run_numbers(inputs.get("segment_ids"), real),
            projection=inputs.get("projection"),
            feature_map=options.feature_map,
            chunk_size=chunk_size,
            span_size=span_size,
        )

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.q.dtype, torch.float32)

    @property
    def favor(self) -> bool:
        return self.feature_map == "favor"

    @property
    def R(self) -> int:
        """The number of features."""
        return self.q.shape[-1] if self.projection is None else len(self.projection)

    def reversed(self) -> Tokens:
        """The tokens from last to first, none seeing itself: what each had after it. Nothing may decay."""
        q, k, v = (x.flip(1) for x in (self.q, self.k, self.v))
        real, runs = (x if x is None else x.flip(1) for x in (self.real, self.runs))
        return replace(self, q=q, k=k, v=v, real=real, runs=runs, strict=True)

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


class Features(NamedTuple):
    """φ(x)·2⁻ᵐ (B, H, n, C, R), and m (B, H, n, C) for favor, whose largest feature it is the logarithm of."""

    values: Tensor
    m: Tensor | None


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


def queries(tokens: Tokens, size: Size) -> Features:
    """φ(q) of a span."""
    return features(chunked(tokens.q[:, size.rows], size, tokens.wide), tokens)


def keys_values(tokens: Tokens, size: Size) -> tuple[Features, Tensor]:
    """φ(k) of a span and v with a column of ones. Padding and what is behind the last token have φ = 0, or m = −∞."""
    k, m = features(chunked(tokens.k[:, size.rows], size, tokens.wide), tokens)
    rest = size.n * size.C - size.L
    if tokens.real is not None:
        mask = chunked(tokens.real[:, size.rows, None, None], size, torch.bool)
        if m is None:
            k *= mask
        else:
            m.masked_fill_(~mask[..., 0], -math.inf)
    elif rest and m is None:
        k[:, :, -1, -rest:] = 0
    elif rest and m is not None:
        m[:, :, -1, -rest:] = -math.inf
    return Features(k, m), chunked(tokens.v[:, size.rows], size, tokens.wide, ones=True)


def decays(tokens: Tokens, size: Size) -> Tensor | None:
    """The base-2 logarithm of each token's decay (B, H, n, C), 0 on padding; None where nothing decays."""
    if tokens.log_decay is None:
        return None
    found = tokens.log_decay[:, size.rows].clamp(min=NEVER) * LOG2_E
    if tokens.real is not None:
        found.masked_fill_(~tokens.real[:, size.rows, None], 0)
    return chunked(found[..., None], size, tokens.wide)[..., 0]


def runs_and_bounds(runs: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """Runs (B, n, C) of a span's tokens, the last repeated, and (B, n + 1) of the token before each boundary."""
    inside = runs[:, size.rows]
    rest = inside[:, -1:].expand(-1, size.n * size.C - size.L)
    inside = torch.cat([inside, rest], 1).unflatten(1, (size.n, size.C))
    before = runs[:, max(size.rows.start - 1, 0), None]
    return inside, torch.cat([before, inside[..., -1]], 1)


def features(x: Tensor, tokens: Tokens) -> Features:
    """φ(x) of a tensor that may be overwritten. φ of the Linear Transformer is exp(min(x, 0)) + max(x, 0)."""
    if tokens.projection is not None:
        R, D = tokens.projection.shape
        logarithm = x @ (tokens.projection.mT * (LOG2_E * D**-0.25))
        largest = logarithm.amax(-1, keepdim=True)
        half = torch.linalg.vecdot(x, x).mul_(LOG2_E * D**-0.5 / 2).add_(math.log2(R) / 2)
        return Features(exp2_(logarithm.sub_(largest)), largest[..., 0] - half)
    if tokens.feature_map == "elu":
        return Features(x.clamp(max=0).exp_().add_(x.clamp_(min=0)), None)
    return Features(x.relu_() if tokens.feature_map == "relu" else x, None)


def through_features(grad: Tensor, features: Tensor, x: Tensor, size: Size, tokens: Tokens) -> Tensor:
    """The gradient behind φ, from φ's value; x (B, L, H, D) is what φ was taken of, which only favor asks.

    The slope is min(φ, 1) for elu, and 0 or 1 for relu; that of φ = exp(a), a = w·x·D^-¼ − |x|²·D^-½/2, is φ.
    """
    if tokens.projection is not None:
        D, grad = x.shape[-1], flush_signed_(grad * features)
        found = grad @ (tokens.projection * D**-0.25)
        return found.sub_(chunked(x, size, tokens.wide).mul_(grad.sum(-1, keepdim=True).mul_(D**-0.5)))
    if tokens.feature_map == "elu":
        return grad * features.clamp(max=1)
    return grad * (features > 0) if tokens.feature_map == "relu" else grad


def masked(x: Tensor, weight: Tensor | None) -> Tensor:
    """x times a mask or a weight, if there is one."""
    return x if weight is None else x * weight


def finite(m: Tensor) -> Tensor:
    """m, and the least number where it is −∞, which −∞ − m would make NaN of."""
    return m.clamp(min=torch.finfo(m.dtype).min)


def settled(x: Tensor, m: Tensor | None) -> Tensor:
    """x, without what is too small to count where features are favor's (`m` is there): in place, before a product.

    Other features are far from the smallest number, and so is what a decay leaves of them; a product of two of favor's,
    and of a weight, is not.
    """
    return x if m is None else flush_signed_(x)
