"""Targets: hardware as facts, one YAML file each, and `detect` for the machine at hand."""

from __future__ import annotations

import difflib
from functools import cache
from importlib import resources

from attncompiler.errors import Diagnostic, SpecError
from attncompiler.targets.target import Target


@cache
def names() -> tuple[str, ...]:
    """The built-in targets: the name of each YAML file beside this module."""
    files = resources.files(__name__).iterdir()
    return tuple(sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml")))


@cache
def get(name: str) -> Target:
    """The built-in target of that name; its file is read when first asked for. Raises SpecError (E107)."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "known targets: " + ", ".join(names())
        raise unknown(f"unknown target {name!r}", hint)
    import yaml

    text = resources.files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    return Target.model_validate(yaml.safe_load(text))


def unknown(message: str, remedy: str | None = None) -> SpecError:
    """The error (E107) for a target that is not there, to be raised."""
    return SpecError(Diagnostic("E107", message, remedy=remedy))
