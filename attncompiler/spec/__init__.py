"""YAML text → a frozen, validated `ModelSpec`. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from attncompiler.errors import Diagnostic, Location, SpecError
from attncompiler.spec.dump import dump
from attncompiler.spec.expand import ResolvedLayer
from attncompiler.spec.loader import MAX_BYTES, load, too_large
from attncompiler.spec.model import ModelSpec
from attncompiler.spec.normalise import normalise
from attncompiler.spec.overrides import apply
from attncompiler.spec.schema import schema
from attncompiler.spec.validate import validate

__all__ = ["ModelSpec", "ResolvedLayer", "dump", "parse", "read", "schema"]


def parse(text: str, *, filename: str = "<spec>", overrides: Sequence[str] = ()) -> ModelSpec:
    """The spec that YAML `text` describes, with `overrides` ("model.norm.eps=1e-6") laid over it.

    Raises SpecError (E0xx, E1xx) with every fault at once, each with its place in `filename` or its override.
    """
    root, faults = load(text, filename)
    root, refused = apply(root, overrides)
    root, doubled = normalise(root)
    return validate(root, [*faults, *refused, *doubled])


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
