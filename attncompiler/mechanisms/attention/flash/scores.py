"""Device functions: what becomes of q·k before the softmax, in base 2, and which probabilities dropout keeps."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attncompiler.mechanisms.attention.dropout import MULTIPLIERS

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
FIRST_MULTIPLIER = tl.constexpr(MULTIPLIERS[0] % 2**32)
SECOND_MULTIPLIER = tl.constexpr(MULTIPLIERS[1] % 2**32)


class Scoring(NamedTuple):
    """The options of scores; None where a call does not have them."""

    scale: Any
    softcap: Any
    slopes: Any
    """ALiBi's, (H,) fp32"""
    seed: Any
    """of dropout, (1,) int64"""
    threshold: Any
    """a probability is dropped when 31 bits of its number are below it"""
    kept_share: Any
    """1 / (1 − dropout)"""


@triton.jit
def tanh(x):
    """Correct to fp32: by the exponential, and near 0, where that loses everything, by the series to x⁹."""
    e = tl.exp2(tl.abs(x) * (-2 * LOG2_E))
    far = (1 - e) / (1 + e)
    y = x * x
    near = 1 + y * (-1.0 / 3 + y * (2.0 / 15 + y * (-17.0 / 315 + y * (62.0 / 2835))))
    return tl.where(tl.abs(x) < 0.25, x * near, tl.where(x < 0, -far, far))


@triton.jit
def logits(products, scoring: Scoring, slope, distance):
    """q·k → its score in base 2, and the tanh of a softcap, which its derivative needs."""
    capped = products
    if scoring.softcap is None:
        score = products * (scoring.scale * LOG2_E)
    else:
        capped = tanh(products * (scoring.scale / scoring.softcap))
        score = capped * (scoring.softcap * LOG2_E)
    if scoring.slopes is not None:
        score -= slope * LOG2_E * tl.abs(distance).to(tl.float32)
    return score, capped


@triton.jit
def mix(x):
    """The finaliser of `attention/dropout.py`, on uint32."""
    x ^= x >> 16
    x *= FIRST_MULTIPLIER
    x ^= x >> 15
    x *= SECOND_MULTIPLIER
    return x ^ (x >> 16)


@triton.jit
def kept(scoring: Scoring, b, head, heads, row, column):
    """What dropout multiplies the probabilities of these indices with; head and row have the same axes."""
    seed = tl.load(scoring.seed)
    key = mix(mix(seed.to(tl.uint32)) + (seed >> 32).to(tl.uint32))
    key = mix(key + (b * heads + head).to(tl.uint32))
    key = mix(key + row.to(tl.uint32))
    number = mix(key ^ mix(column.to(tl.uint32)))
    return tl.where((number >> 1).to(tl.int32) >= scoring.threshold, scoring.kept_share, 0.0)
