"""Which further blocks a block of queries sees under `random` (BigBird, Zaheer et al. 2020,
https://arxiv.org/abs/2007.14062, section 2): drawn by integers alone, the same on every machine and for every head.

The candidates of block I are the blocks that it does not see already: those from `global_blocks` on that are at least
`local_blocks` away, before it when causal, on both sides of it (of N blocks) when not; numbered 0 … C − 1 from the
first. Of them min(r, C) distinct ones are drawn by Floyd's method (Bentley & Floyd 1987, "A sample of brilliance"):
for s = 0, 1, …, r − 1, with m = C − r + s, candidate `hash(seed, layer, I, s) mod (m + 1)`, or m if that one is taken.
With at most r candidates all are seen.

    hash(a, b, …) = mix(… mix(mix(a) + b) … ) without its top bit, in 64-bit integers that wrap around, mix being
    the finaliser of SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators").
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from attncompiler.mechanisms.attention.pattern import Random

NONE = -1
"""In a table of drawn blocks, for a row that has fewer candidates than draws."""


def _signed(constant: int) -> int:
    return constant - 2**64 if constant >= 2**63 else constant


MULTIPLIERS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 on int64, read as unsigned."""
    for shift, multiplier in zip((30, 27), MULTIPLIERS, strict=True):
        x = (x ^ _shifted(x, shift)) * multiplier
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, count: int) -> Tensor:
    """x >> count, zeros moving in: torch's own shift is that of signed integers."""
    return (x >> count) & (2 ** (64 - count) - 1)


def drawn(pattern: Random, layer: int, rows: Tensor, blocks: Tensor | int, *, trimmed: bool = True) -> Tensor:
    """The blocks (n, r') that the blocks `rows` (n,) of queries see by chance, `NONE` behind the last of each.

    `blocks` (n,) is how many blocks of keys there are; it matters when the pattern is not causal. Columns that are
    `NONE` for all rows are left out where `trimmed`, which reads the rows; else r' is r.
    """
    before = (rows - pattern.local_blocks + 1 - pattern.global_blocks).clamp(min=0)
    if pattern.causal:
        candidates = before
    else:
        beyond = blocks - rows - pattern.local_blocks
        candidates = torch.where(rows < pattern.global_blocks, 0, before + beyond.clamp(min=0))
    count = pattern.random_blocks
    if trimmed:
        count = min(count, int(candidates.max()) if len(rows) else 0)
    start = torch.full((), pattern.seed, dtype=torch.int64, device=rows.device)
    state = mix(mix(mix(start) + layer) + rows)
    chosen = torch.full((len(rows), count), NONE, dtype=torch.int64, device=rows.device)
    for s in range(count):
        last = (candidates - pattern.random_blocks).clamp(min=0) + s
        pick = (mix(state + s) & (2**63 - 1)) % (last + 1)
        taken = (chosen[:, :s] == pick[:, None]).any(1)
        chosen[:, s] = torch.where(last < candidates, torch.where(taken, last, pick), NONE)
    # from the number of a candidate to its block: over the global blocks, and over the local ones
    behind = chosen - before[:, None]
    found = torch.where(behind < 0, chosen + pattern.global_blocks, behind + (rows + pattern.local_blocks)[:, None])
    return torch.where(chosen == NONE, NONE, found)


ROWS = 256
"""Blocks of queries whose draws are made, and kept, at once."""


def drawn_range(pattern: Random, layer: int, first: int, last: int, blocks: int) -> Tensor:
    """As `drawn`, for the blocks first … last of queries, on the CPU; what was asked before is not made again."""
    # values, not the pattern, whose own hash costs more than the rest
    fields, blocks = tuple(pattern.__dict__.items()), 0 if pattern.causal else blocks
    parts = [_part(fields, layer, part, blocks) for part in range(first // ROWS, last // ROWS + 1)]
    width = max(part.shape[1] for part in parts)
    table = torch.cat([pad(part, (0, width - part.shape[1]), value=NONE) for part in parts]) if parts[1:] else parts[0]
    return table[first % ROWS : first % ROWS + last - first + 1]


@lru_cache(maxsize=256)
def _part(fields: tuple[tuple[str, Any], ...], layer: int, part: int, blocks: int) -> Tensor:
    rows = torch.arange(part * ROWS, (part + 1) * ROWS)
    return drawn(Random(**dict(fields)), layer, rows, torch.full_like(rows, blocks))
