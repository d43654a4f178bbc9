"""What the bench of a mechanism gives; the grid does the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from attncompiler.bench.grid.cells import Count, Measured, Way
from attncompiler.bench.grid.contestants import Contestant, Inputs
from attncompiler.bench.grid.rows import Row
from attncompiler.bench.grid.units import Unit
from attncompiler.mechanisms.base import Direction


@dataclass(frozen=True)
class Comparison:
    """How the planned kernels of several rows compare, in words and as a ratio either way."""

    what: str
    ratio: Mapping[Way, float]


def nothing_compared(results: Sequence[Measured]) -> tuple[Comparison, ...]:
    """For a bench whose rows stand for themselves."""
    return ()


@dataclass(frozen=True)
class Bench:
    """The rows of one verb, their inputs, who takes part in them, and what they count."""

    rows: Callable[[str], tuple[Row, ...]]
    """device type → what is measured there"""
    inputs: Callable[[Any, str, torch.dtype], Inputs]
    """(row, device, dtype) → its tensors"""
    members: Callable[[str, Any], tuple[Contestant, ...]]
    """(device type, row) → our kernels, best first"""
    peers: Callable[[str], tuple[Contestant, ...]]
    """device type → the peers there; one that cannot take part says so when it is asked"""
    auto: Contestant
    """our operator as users call it, by the kernel or the pair of kernels that it chooses"""
    planned: Callable[[Any, Direction], tuple[str, ...]]
    """(inputs, direction) → the kernels that `auto` would try, the first of which it runs"""
    count: Callable[[Any, int], Count]
    """(row, bytes of an element) → what it comes to"""
    unit: Callable[[Sequence[Measured], float | None], Unit]
    """(a group's results, bytes a second of a copy where it was measured) → in what they are told"""
    facts: Callable[[Measured], dict[str, Any]]
    """result → what is said of its row to machines"""
    packages: Mapping[str, str] = field(default_factory=dict)
    """modules whose version times depend on → their distributions, on a GPU"""
    rival: str | None = None
    """the peer whose ratio is given beside that to the best"""
    compared: Callable[[Sequence[Measured]], Iterable[Comparison]] = nothing_compared
    """results → what they are to one another"""
