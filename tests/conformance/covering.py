"""Pairwise covering arrays: few rows in which every two values of two factors meet."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

Pair = tuple[tuple[str, int], tuple[str, int]]
TRIES = 30


def pairs(factors: Mapping[str, Sequence[Any]]) -> set[Pair]:
    """Every two values (by number) of two different factors."""
    return {
        ((a, i), (b, j))
        for a, b in itertools.combinations(factors, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }


def covered(row: Mapping[str, int]) -> set[Pair]:
    """The pairs that a row, factor → number of its value, covers."""
    return set(itertools.combinations(row.items(), 2))


def array(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Rows, factor → value, that cover every pair (greedily, as AETG: Cohen et al. 1997). The same at each call."""
    chance, missing, rows = random.Random(0), pairs(factors), []
    while missing:
        best: dict[str, int] = {}
        for _ in range(TRIES):
            row = dict([*chance.choice(sorted(missing))])
            for name in chance.sample([*factors], len(factors)):
                if name not in row:
                    gains = [_gain(row, name, value, missing, factors) for value in range(len(factors[name]))]
                    most = [value for value, gain in enumerate(gains) if gain == max(gains)]
                    row[name] = chance.choice(most)
            row = {name: row[name] for name in factors}
            if not best or len(covered(row) & missing) > len(covered(best) & missing):
                best = row
        missing -= covered(best)
        rows.append({name: factors[name][number] for name, number in best.items()})
    return rows


def _gain(
    row: Mapping[str, int], name: str, value: int, missing: set[Pair], factors: Mapping[str, Sequence[Any]]
) -> int:
    order = {factor: number for number, factor in enumerate(factors)}
    mine = (name, value)
    return sum(((mine, other) if order[name] < order[other[0]] else (other, mine)) in missing for other in row.items())
