"""What an operator is given in a row and what it gives, as data, and the bytes of it. Nothing here imports torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from attncompiler.bench.grid.rows import Row

Shape = tuple[int, ...]
FP32 = 4
"""bytes"""


@dataclass(frozen=True)
class Operands:
    """The operator's inputs by name, and its output, as shapes. Those in `wide` are fp32 in every row."""

    given: Mapping[str, Shape]
    out: Shape
    wide: frozenset[str] = frozenset()
    constant: frozenset[str] = frozenset()
    """inputs without a gradient"""
    states: frozenset[str] = frozenset()
    """inputs that are the state before a decoding step, which gives as much after it"""

    def bytes(self, names: Iterable[str], itemsize: int) -> int:
        """Of these inputs, in a dtype of `itemsize` bytes."""
        sizes = {name: max(itemsize, FP32) if name in self.wide else itemsize for name in names}
        return sum(math.prod(self.given[name]) * size for name, size in sizes.items())

    def floor(self, itemsize: int) -> dict[str, int]:
        """Bytes that must move, by way: inputs read and output written; the backward reads the inputs and the output's
        gradient, and writes gradients. Of a step the states alone, read and written: little else moves."""
        if self.states:
            return {"forward": 2 * self.bytes(self.states, itemsize)}
        inputs, out = self.bytes(self.given, itemsize), math.prod(self.out) * itemsize
        gradients = self.bytes(self.given.keys() - self.constant, itemsize)
        return {"forward": inputs + out, "both": 2 * inputs + gradients + 2 * out}


@dataclass(frozen=True)
class TimedRow(Row):
    """A row of a mixer whose time is linear in T: it is set beside a copy of what it must move, and told in ms, in its
    group `length` by the token, and as a decoding step by the bytes a second of its states."""

    T: int
    B: int = 1
    forward_only: bool = False
    """where the backward's memory would not fit"""

    @property
    def step(self) -> bool:
        """Whether it is a decoding step: one token after others."""
        return self.T == 1

    @property
    def backward(self) -> bool:
        return not self.step and not self.forward_only

    @property
    def beside_copy(self) -> bool:
        return True

    @property
    def by_length(self) -> bool:
        """Whether it is one of several that differ in T, of as many tokens."""
        return self.group.endswith("length")

    @property
    def operands(self) -> Operands:
        """What the row's operator is given."""
        raise NotImplementedError

    @property
    def counted(self) -> frozenset[str]:
        """The ways in which it is measured."""
        return frozenset({"forward", "both"} if self.backward else {"forward"})
