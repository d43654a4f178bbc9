"""Nodes → ModelSpec, or every fault at once."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import ValidationError

from attncompiler.errors import Diagnostic, SpecError
from attncompiler.spec import relations
from attncompiler.spec.diagnose import faults, nearest
from attncompiler.spec.model import Model, ModelSpec
from attncompiler.spec.nodes import Node, locate, plain, readable
from attncompiler.spec.parts import salvage, whole
from attncompiler.spec.scalars import Unreadable


def validate(root: Node, earlier: Iterable[Diagnostic] = ()) -> ModelSpec:
    """The spec of a document. Raises SpecError with `earlier` faults and all that is found, in file order."""
    diagnostics = list(earlier)
    data = plain(root)
    if isinstance(data, Unreadable):
        raise SpecError(diagnostics)
    if not isinstance(data, dict):
        raise SpecError([*diagnostics, Diagnostic("E003", "the document is not a mapping", root.location)])
    spec, found = None, []
    try:
        spec = ModelSpec.model_validate(data).came_from(root)
        parts = whole(spec)
    except ValidationError as error:
        found = faults(error, ModelSpec)
        parts = salvage(data, _holes(fault.path for fault, _ in found))
    found += relations.check(parts)
    for fault, at_key in found:
        if not at_key and not readable(root, fault.path):
            continue  # the loader has said what is wrong there
        place = locate(root, fault.path, key=at_key)
        diagnostics.append(Diagnostic(fault.code, fault.message, place, fault.remedy))
    if diagnostics or spec is None:
        unique = dict.fromkeys(diagnostics)
        raise SpecError(sorted(unique, key=lambda found: _order(found)))
    return spec


def _holes(paths: Iterable[tuple[str | int, ...]]) -> set[str]:
    """The fields of the model section that are wrong, and those an unknown key there was probably meant for."""
    keys = {str(path[1]) for path in paths if len(path) > 1 and path[0] == "model"}
    return keys | {meant for key in keys if (meant := nearest(key, Model.model_fields)) is not None}


def _order(diagnostic: Diagnostic) -> tuple[bool, int, int]:
    place = diagnostic.location
    if place is None or place.line is None:
        return (True, 0, 0)
    return (False, place.line, place.column or 0)
