"""The table as data: strict, frozen, finite, and never more than data."""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from attncompiler.errors import Location, UsageError, fail

FORMAT: Final = 1
"""of the JSON; a table of another format is refused"""

Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_. -]*$", max_length=64)]
Text = Annotated[str, Field(min_length=1, max_length=200)]
Seconds = Annotated[float, Field(gt=0)]


class Strict(BaseModel):
    """Base of everything a table may hold."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Bucket(Strict):
    """What decides the order of kernels: calls of one bucket are taken to have the same.

    A mechanism says which bucket a call is in. Kernels measured in other buckets of the same `dtype`, `kind` and
    `step` stand in for those that are missing, the nearest by `levels` first.
    """

    dtype: Word
    kind: Word
    step: bool = False
    """whether it is a decoding step: one query to a sequence"""
    levels: dict[Word, int]
    """sizes as powers of two, or other whole numbers that are near where calls are alike; what decides most first"""

    @property
    def key(self) -> tuple[object, ...]:
        """What makes two buckets the same, whatever the order of their levels."""
        return (self.dtype, self.kind, self.step, *sorted(self.levels.items()))

    def __str__(self) -> str:
        levels = ", ".join(f"{name} {level}" for name, level in self.levels.items())
        return f"{self.kind}{', one query' if self.step else ''} in {self.dtype} ({levels})"


class Times(Strict):
    """Seconds of one kernel, medians."""

    forward: Seconds
    both: Seconds | None = None
    """of forward and backward together; None where it has no backward, or where that was not measured"""


class Run(Strict):
    """Where and when an entry was measured."""

    device: Text
    """the device's own name, which is its target's title on the machine it was measured on"""
    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    versions: dict[Word, Text]
    """of the packages that matter"""


class Entry(Strict):
    """The kernels of a mechanism that ran in one bucket, in one process, in turns."""

    mechanism: Word
    bucket: Bucket
    run: Run
    kernels: Annotated[dict[Word, Times], Field(min_length=1)]

    @property
    def key(self) -> tuple[object, ...]:
        """What a later measurement of the same replaces."""
        return (self.run.device, self.mechanism, *self.bucket.key)


class Table(Strict):
    """All that was measured on the devices of one target."""

    format: Literal[1] = FORMAT
    target: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$", max_length=64)]
    entries: Annotated[tuple[Entry, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _no_entry_twice(self) -> Self:
        if len({entry.key for entry in self.entries}) < len(self.entries):
            raise ValueError("a bucket is there twice")
        return self

    def merged(self, entries: tuple[Entry, ...]) -> Table:
        """The table with `entries` added, each in the place of one of the same bucket and device; sorted."""
        by_key = {entry.key: entry for entry in (*self.entries, *entries)}
        kept = sorted(by_key.values(), key=lambda entry: [str(part) for part in entry.key])
        return self.model_copy(update={"entries": tuple(kept)})

    def to_json(self) -> str:
        """The table as JSON, one value a line."""
        return self.model_dump_json(indent=1, exclude_none=True) + "\n"


def read_json(text: bytes, target: str, file: str) -> Table:
    """The table that `to_json` wrote for `target`. Raises UsageError (E605) naming the place in `file`."""
    try:
        table = Table.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        inside = ".".join(map(str, first["loc"]))
        raise damaged(file, f"{inside + ': ' if inside else ''}{first['msg']}") from None
    if table.target != target:
        raise damaged(file, f"target: it is of {table.target}, not of {target}")
    return table


def damaged(file: str, why: str) -> UsageError:
    """The error (E605) for a table that cannot be used, to be raised."""
    at = re.search(r" at line (\d+) column (\d+)$", why)
    line, column = (int(at[1]), int(at[2])) if at else (None, None)
    error = fail(
        UsageError,
        "E605",
        f"this is no measured table: {why}",
        location=Location(file, line, column),
        remedy="remove the file, or put it right, and measure again with `attncompiler bench … --save`",
    )
    assert isinstance(error, UsageError)
    return error
