"""How rows are named and chosen. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

from attncompiler.errors import UsageError, fail


@dataclass(frozen=True)
class Row:
    """One row: a call, by its group and its name there. What is called, each mechanism's rows say."""

    group: str
    name: str

    @property
    def id(self) -> str:
        """How `--rows` names it."""
        return f"{self.group}/{self.name}"

    @property
    def step(self) -> bool:
        """Whether it is a decoding step."""
        return False

    @property
    def backward(self) -> bool:
        """Whether it is measured with its backward: a decoding step has none."""
        return not self.step

    @property
    def beside_copy(self) -> bool:
        """Whether its time is set beside that of a copy on the same device."""
        return self.step


AnyRow = TypeVar("AnyRow", bound=Row)


def select(rows: Sequence[AnyRow], patterns: Sequence[str]) -> tuple[AnyRow, ...]:
    """The rows that a pattern names: a group, a row, or either with wildcards; all where there are no patterns.

    Raises UsageError (E602) on a pattern that names none.
    """
    for pattern in patterns:
        if not any(_named(row, pattern) for row in rows):
            known = ", ".join(row.id for row in rows)
            raise fail(UsageError, "E602", f"no row is named {pattern!r}", remedy=f"there are {known}")
    return tuple(row for row in rows if not patterns or any(_named(row, pattern) for pattern in patterns))


def _named(row: Row, pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in (row.group, row.id))
