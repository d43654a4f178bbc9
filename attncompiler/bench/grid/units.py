"""In what the times of a group's rows are told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from attncompiler.bench.grid.cells import Measured, Way, median


@dataclass(frozen=True)
class Unit:
    """Its name, what a cell's seconds are in it, and what is said beside it."""

    name: str
    shown: Callable[[Measured, Way, float], float]
    note: str = ""


MILLISECONDS = Unit("ms", lambda result, way, seconds: 1e3 * seconds)


def flop_rate(results: Sequence[Measured]) -> Unit:
    """FLOPs a second, in thousands of millions, or in millions of millions where the planned kernels reach two."""
    rates = [result.count.flops["forward"] / s for result in results if (s := median(result.plan, "forward"))]
    name, scale = ("TFLOP/s", 1e12) if max(rates, default=0) > 2e12 else ("GFLOP/s", 1e9)
    return Unit(name, lambda result, way, seconds: result.count.flops[way] / scale / seconds)


def byte_rate(moved: Callable[[Measured, Way], int], what: str, copy_rate: float) -> Unit:
    """`moved` bytes a second, `what` they are in words, beside the bytes a second of a copy."""
    note = f"of {what}; a copy moves {copy_rate / 1e9:,.0f}"
    return Unit("GB/s", lambda result, way, seconds: moved(result, way) / 1e9 / seconds, note)


def _per_token(result: Measured, way: Way, seconds: float) -> float:
    assert result.count.tokens is not None
    return 1e9 * seconds / result.count.tokens


PER_TOKEN = Unit("ns a token", _per_token)
