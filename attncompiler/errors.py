"""Errors a person can act on: each has a code, a place, a cause and a remedy.

`CATALOGUE` names every code once; a diagnostic with a code that is not in it cannot be made. The first digit is the
stage that found the fault: 0 the text of a spec, 1 relations inside a spec, 2 planning, 3 artifacts, 4 operator
inputs, 5 run time, 6 files and the command line.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

CATALOGUE: dict[str, str] = {
    # 0: the text of a spec
    "E001": "the file cannot be read",
    "E002": "the text is not YAML",
    "E003": "the document is empty or not a mapping",
    "E004": "the document is too large or too deep",
    "E005": "a key is given twice",
    "E010": "a required key is missing",
    "E011": "a value has the wrong type",
    "E012": "unknown key",
    "E013": "unknown kind",
    "E014": "a value is not allowed",
    "E015": "an override cannot be applied",
    # 1: relations inside a spec
    "E101": "sizes do not fit one another",
    "E102": "unknown policy",
    "E103": "the model has no layers",
    "E104": "the name is not usable as a file name",
    "E105": "options contradict one another",
    "E106": "unknown kernel",
    "E107": "unknown target",
    "E108": "a route condition is not valid",
    "E150": "understood, but not offered",
    # 2: planning
    "E201": "no kernel can serve a layer",
    "E202": "the demanded kernel refuses",
    "E203": "an option of the grammar is not built yet",
    # 3: artifacts
    "E301": "this is not an artifact",
    "E302": "the artifact is damaged",
    "E303": "the artifact was written by another version",
    "E304": "trained weights would be overwritten",
    "E305": "the artifact is locked to other hardware",
    "E306": "the weights do not fit the spec",
    "E307": "the artifact holds no weights",
    # 4: operator inputs
    "E401": "shapes do not fit",
    "E402": "dtypes do not fit",
    "E403": "an argument is not supported",
    "E404": "tensors are on different devices",
    # 5: run time
    "E501": "no kernel could run",
    "E502": "the state is full",
    "E503": "this model cannot be run step by step",
    "E504": "the device can do no more work in this process",
    # 6: files and the command line
    "E601": "a folder cannot be written",
    "E602": "a command's arguments do not fit together",
    "E603": "the operating system refused an operation",
    "E604": "the device has no room",
    "E605": "a measured table is damaged",
}


@dataclass(frozen=True, slots=True)
class Location:
    """Where a fault is: a file position (1-based), or the option that set the value."""

    file: str | None = None
    line: int | None = None
    column: int | None = None
    option: str | None = None

    def __str__(self) -> str:
        if self.option is not None:
            return self.option
        parts = [self.file or "<spec>", self.line, self.column]
        return ":".join(str(part) for part in parts if part is not None)


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One fault: a code of `CATALOGUE`, what is wrong, where, and what to do about it."""

    code: str
    message: str
    location: Location | None = None
    remedy: str | None = None

    def __post_init__(self) -> None:
        if self.code not in CATALOGUE:
            raise ValueError(f"{self.code} is not in the catalogue of codes")

    def __str__(self) -> str:
        place = f"{self.location}: " if self.location else ""
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{place}{self.code} {self.message}{remedy}"


class AttnCompilerError(Exception):
    """Base of all errors of this package. `diagnostics` lists every fault found, at least one."""

    def __init__(self, diagnostics: Diagnostic | Iterable[Diagnostic]):
        if isinstance(diagnostics, Diagnostic):
            diagnostics = (diagnostics,)
        self.diagnostics: Sequence[Diagnostic] = tuple(diagnostics)
        super().__init__("\n".join(str(diagnostic) for diagnostic in self.diagnostics))

    def __reduce__(self) -> tuple[Any, ...]:
        """Made again from its diagnostics, not from its text, in another process."""
        return type(self), (self.diagnostics,), self.__dict__


class SpecError(AttnCompilerError):
    """The spec is wrong: codes E0xx and E1xx."""


class PlanError(AttnCompilerError):
    """A spec that is valid but cannot be served as asked: codes E2xx."""


class ArtifactError(AttnCompilerError):
    """An artifact cannot be read or written: codes E3xx."""


class InputError(AttnCompilerError, ValueError):
    """An operator or a model was called with arguments that do not fit: codes E4xx and E50x."""


class KernelError(AttnCompilerError, RuntimeError):
    """Every kernel of a chain refused or failed, or the device did: codes E501 and E504."""


class UsageError(AttnCompilerError):
    """Files or arguments of a command are not usable: codes E6xx."""


def fail(
    error: type[AttnCompilerError],
    code: str,
    message: str,
    *,
    remedy: str | None = None,
    location: Location | None = None,
) -> AttnCompilerError:
    """Make (not raise) `error` with a single diagnostic: `raise fail(InputError, "E401", "...")`."""
    return error(Diagnostic(code, message, location, remedy))
