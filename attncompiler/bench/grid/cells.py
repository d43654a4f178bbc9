"""What was found in a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from attncompiler.bench.grid.contestants import AUTO
from attncompiler.bench.measure import Samples

Way = Literal["forward", "both"]
"""the forward alone, or forward and backward"""
WAYS: tuple[Way, ...] = ("forward", "both")


@dataclass(frozen=True)
class Problem:
    """Why a cell has no time."""

    kind: Literal["refused", "absent", "no memory", "too slow", "another function", "failed"]
    reason: str


@dataclass(frozen=True)
class Cell:
    """One contestant in one row."""

    role: Literal["member", "peer"]
    forward: Samples | Problem | None = None
    both: Samples | Problem | None = None
    """forward and backward; None in a row without backward"""
    peak_bytes: int | None = None
    """what forward and backward hold beside the inputs; the forward alone, where that is all that runs"""
    host: Mapping[Way, float] = field(default_factory=dict)
    """seconds of the host, which count where the device has nothing else to do meanwhile; not there on a CPU, nor
    where the device takes many times as long"""

    def given(self, way: Way, taken: Samples | Problem) -> Cell:
        """The cell with its time that way."""
        return replace(self, forward=taken) if way == "forward" else replace(self, both=taken)


@dataclass(frozen=True)
class Count:
    """What a row comes to, whoever computes it."""

    flops: Mapping[Way, float]
    floor: Mapping[Way, int] = field(default_factory=dict)
    """bytes that must be read or written, in a row whose time is set beside that of a copy of as many"""
    tokens: int | None = None
    """of all sequences, in a row that is told per token"""


@dataclass(frozen=True)
class Measured:
    """One row's cells by contestant, and what was planned for it."""

    row: Any
    """the bench's own kind of `Row`"""
    itemsize: int
    """bytes of an element of what comes in the row's dtype"""
    count: Count
    chain: tuple[str, ...]
    """the kernels that would serve a call of this row, the planned one first"""
    cells: dict[str, Cell] = field(default_factory=dict)
    lost: str | None = None
    """why the device can do no more, where that happened in this row"""
    backward: tuple[str, ...] = ()
    """the same as `chain` in the order in which their backwards would be tried; empty where the row has none"""
    copies: Mapping[Way, float] = field(default_factory=dict)
    """seconds of a copy that reads and writes as many bytes as the row must, in a row that is set beside one"""

    @property
    def plan(self) -> Cell | None:
        """The cell of what `kernel="auto"` runs."""
        return self.cells.get(AUTO) or (self.cells.get(self.chain[0]) if self.chain else None)


def median(cell: Cell | None, way: str) -> float | None:
    """Seconds, where there are some."""
    taken = getattr(cell, way, None)
    return taken.median if isinstance(taken, Samples) else None
