"""By how much tokens, chunks and states count for one another: masks, or weights where something decays or grows.

A token's key has the logarithm m (0 but for favor), and counts at token t as 2^(m + Σ decays between the two). Favor
states every sum as a multiple of 2^M, M[t] being the largest such exponent that token t sees: it runs with the tokens,
so that what comes later moves nothing. Every exponent that is taken is of a number of at most 0 (where decays are), and
sums of decays are made of what lies between two tokens alone: the difference of two long sums would lose a short one.

Shapes: n chunks of C tokens; boundary i lies before chunk i, boundary n behind the last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from attncompiler.blocks.underflow import exp2_
from attncompiler.mechanisms.linear_attention.spans import Size, Tokens, decays, finite, runs_and_bounds


@dataclass(frozen=True)
class Across:
    """From token to boundary, and from boundary to boundary."""

    leaves: Tensor | None
    """(B, H or 1, n, C, 1): what a token counts for at the end of its chunk; None where that is 1"""
    reach: Tensor
    """([B, H or 1,] n + 1, n + 1): what the state added at boundary j counts for at boundary i"""
    through: Tensor | None
    """(B, H, n): what a chunk leaves of the state before it; None where nothing decays"""
    m: Tensor | None
    """(B, H, n + 1): M at the boundaries; None but for favor"""


@dataclass(frozen=True)
class Inside:
    """From token to token of a chunk, and from the boundary before it to its tokens."""

    seen: Tensor
    """(C, C) or (B, H or 1, n, C, C)"""
    enters: Tensor | None
    """(B, H or 1, n, C, 1); None where it is 1"""
    m: Tensor | None
    """(B, H, n, C): M of every token; None but for favor"""


class Weights:
    """The weights of one span, made when they are asked for.

    `m` (B, H, n, C) are favor's logarithms of the keys, and `carried` (B, H) is M before the span.
    """

    def __init__(self, tokens: Tokens, size: Size, m: Tensor | None, carried: Tensor | None):
        self.tokens, self.size, self.m, self.carried = tokens, size, m, carried
        self.decays = decays(tokens, size)
        self.plain = self.decays is None and m is None
        self.runs = self.bounds = None
        if tokens.runs is not None:
            self.runs, self.bounds = runs_and_bounds(tokens.runs, size)

    def across(self) -> Across:
        """The weights that the states at the boundaries need."""
        n = self.size.n
        device, wide = self.tokens.q.device, self.tokens.wide
        reached = torch.ones(n + 1, n + 1, dtype=torch.bool, device=device).tril()
        leaving = None
        if self.runs is not None and self.bounds is not None:
            reached = reached & (self.bounds[:, :, None] == self.bounds[:, None, :])[:, None]
            leaving = (self.runs == self.bounds[:, 1:, None])[:, None]
        if self.plain:
            return Across(None if leaving is None else leaving[..., None], reached.to(wide), None, None)

        after, crossed = self._after(), self._crossed()
        out = after if self.m is None else after + self.m
        if leaving is not None:
            out = out.masked_fill(~leaving, -math.inf)
        between = (crossed[..., None] * _strictly_lower(n + 1, crossed)).cumsum(-2).masked_fill_(~reached, -math.inf)
        once = between.diagonal(-1, -2, -1)
        if self.carried is None:
            through = exp2_(once.clone())
            return Across(exp2_(out.clone())[..., None], exp2_(between), through, None)
        largest = out.amax(-1)
        between = between + torch.cat([self.carried[:, :, None], largest], -1)[:, :, None]
        m = between.amax(-1)
        through = exp2_(m[..., :-1] + once - finite(m[..., 1:]))
        leaves = exp2_(out - finite(largest)[..., None])
        return Across(leaves[..., None], exp2_(between.sub_(finite(m)[..., None])), through, m)

    def inside(self, across: Across) -> Inside:
        """The weights that outputs need beside the states."""
        C, device = self.size.C, self.tokens.q.device
        seen = torch.ones(C, C, dtype=torch.bool, device=device).tril(-1 if self.tokens.strict else 0)
        entering = None
        if self.runs is not None and self.bounds is not None:
            seen = seen & (self.runs[..., :, None] == self.runs[..., None, :])[:, None]
            entering = (self.runs == self.bounds[:, :-1, None])[:, None]
        if self.plain:
            return Inside(seen, None if entering is None else entering[..., None], None)

        pairs, into = self._pairs(), self._into()
        pairs = pairs.masked_fill(~seen, -math.inf)
        if entering is not None:
            into = into.masked_fill(~entering, -math.inf)
        if across.m is None:
            return Inside(exp2_(pairs), exp2_(into.clone())[..., None], None)
        into = across.m[..., :-1, None] + into
        m = torch.maximum(pairs.amax(-1), into)
        below = finite(m)
        return Inside(exp2_(pairs.sub_(below[..., None])), exp2_(into.sub_(below))[..., None], m)

    def _pairs(self) -> Tensor:
        """The exponent of each pair of a chunk (B, H, n, t, s)."""
        if self.decays is None:
            assert self.m is not None
            return self.m[..., None, :].expand(*self.m.shape, self.size.C)
        between = (self.decays[..., None] * _strictly_lower(self.size.C, self.decays)).cumsum(-2)
        return between if self.m is None else between + self.m[..., None, :]

    def _into(self) -> Tensor:
        """From the boundary before the chunk to each token, (B, H, n, C)."""
        if self.decays is not None:
            return self.decays.cumsum(-1)
        assert self.m is not None
        return torch.zeros_like(self.m)

    def _after(self) -> Tensor:
        """From behind each token to the end of its chunk, (B, H, n, C)."""
        if self.decays is not None:
            return pad(self.decays[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)
        assert self.m is not None
        return torch.zeros_like(self.m)

    def _crossed(self) -> Tensor:
        """The decay that lies before each boundary, behind the one before it: (B, H, n + 1), 0 first."""
        if self.decays is not None:
            return pad(self.decays.sum(-1), (1, 0))
        assert self.m is not None
        return self.m.new_zeros(*self.m.shape[:2], self.size.n + 1)


def _strictly_lower(size: int, like: Tensor) -> Tensor:
    return torch.ones(size, size, dtype=like.dtype, device=like.device).tril_(-1)
