"""YAML text → a frozen, validated `ModelSpec`. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from attncompiler.errors import Diagnostic, Location, SpecError
from attncompiler.spec.dump import dump
from attncompiler.spec.expand import ResolvedLayer
from attncompiler.spec.loader import MAX_BYTES, load, too_large
from attncompiler.spec.model import ModelSpec
from attncompiler.spec.nodes import Node
from attncompiler.spec.normalise import normalise
from attncompiler.spec.overrides import apply, option
from attncompiler.spec.schema import schema
from attncompiler.spec.validate import validate

__all__ = ["ModelSpec", "ResolvedLayer", "dump", "parse", "read", "schema"]


def parse(text: str, *, filename: str = "<spec>", overrides: Sequence[str] = ()) -> ModelSpec:
    """The spec that YAML `text` describes, with `overrides` ("model.norm.eps=1e-6") laid over it.

    Raises SpecError (E0xx, E1xx) with every fault at once, each with its place in `filename` or its override.
    """
    root, noted = load(text, filename)
    try:
        spec = _validated(root, noted, overrides)
    except SpecError as error:
        raise SpecError(_cited(error.diagnostics, root, noted, overrides)) from None
    if len(dump(spec)) > MAX_BYTES:
        message = f"the spec is larger than {MAX_BYTES // 1024} KiB with its defaults written out, as artifacts hold it"
        raise SpecError(Diagnostic("E004", message, Location(filename)))
    return spec


def _validated(root: Node, noted: Sequence[Diagnostic], overrides: Sequence[str]) -> ModelSpec:
    root, refused = apply(root, overrides)
    root, doubled = normalise(root)
    return validate(root, [*noted, *refused, *doubled])


def _cited(
    faults: Sequence[Diagnostic], root: Node, noted: Sequence[Diagnostic], overrides: Sequence[str]
) -> Sequence[Diagnostic]:
    """The faults, those that would not be there without some override placed at it, and not where the file is right."""
    causes: dict[Diagnostic, list[str]] = {}
    for index in range(len(overrides) if len(overrides) <= CITED else 0):
        try:
            _validated(root, noted, [*overrides[:index], *overrides[index + 1 :]])
            left: Sequence[Diagnostic] = ()
        except SpecError as error:
            left = error.diagnostics
        for fault in faults:
            if fault not in left and (fault.location is None or fault.location.option is None):
                causes.setdefault(fault, []).append(option(overrides[index]))
    return [
        replace(fault, location=Location(option=" ".join(causes[fault]))) if fault in causes else fault
        for fault in faults
    ]


CITED = 32
"""overrides that are told apart: each takes a validation of the whole spec"""


def read(path: str | os.PathLike[str], *, overrides: Sequence[str] = ()) -> ModelSpec:
    """The spec in the file at `path`. Raises SpecError: E001 where the file cannot be read, else as `parse`."""
    filename = os.fspath(path)
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SpecError(Diagnostic("E001", f"cannot be read: {reason}", Location(filename))) from None
    if len(content) > MAX_BYTES:
        raise SpecError(too_large(filename))
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        message = f"the byte 0x{content[error.start]:02x} is not UTF-8"
        raise SpecError(Diagnostic("E001", message, Location(filename, line, column))) from None
    return parse(text, filename=filename, overrides=overrides)
