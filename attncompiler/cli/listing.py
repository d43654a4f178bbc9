"""`attncompiler list`: what there is."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from importlib import import_module
from typing import Annotated, Any, get_args

import typer

from attncompiler.cli import output
from attncompiler.cli.options import AsFormat, Format

Row = dict[str, str]


class What(StrEnum):
    """What can be listed."""

    mechanisms = "mechanisms"
    kernels = "kernels"
    patterns = "patterns"
    targets = "targets"
    errors = "errors"


def list_(
    what: Annotated[What, typer.Argument(help="what to list", show_default=False)], format: AsFormat = Format.text
) -> None:
    """List mechanisms, kernels, patterns, targets or error codes."""
    tables = {
        What.mechanisms: mechanisms,
        What.kernels: kernels,
        What.patterns: patterns,
        What.targets: targets,
        What.errors: errors,
    }
    rows = list(tables[what]())
    if format == "json":
        output.as_json(rows)
    else:
        output.table(list(rows[0]), [list(row.values()) for row in rows])


def mechanisms() -> Iterator[Row]:
    """Kinds of mixer, with the kernels of each, best first on a CPU."""
    from attncompiler.mechanisms.base import discover

    for mechanism in discover().values():
        yield {
            "mechanism": mechanism.name,
            "kernels": ", ".join(kernel.name for kernel in mechanism.kernels),
            "what it is": _summary(import_module(mechanism.policy.__module__.rpartition(".")[0])),
        }


def kernels() -> Iterator[Row]:
    """Every kernel name that a spec may use; one that is only reserved is said not to be built."""
    from attncompiler.mechanisms.base import discover

    for mechanism in discover().values():
        for name in mechanism.names:
            kernel = mechanism.kernel(name)
            yield {
                "mechanism": mechanism.name,
                "kernel": name,
                "devices": ", ".join(kernel.needs.device_types) if kernel else "",
                "dtypes": ", ".join(kernel.needs.dtypes) if kernel else "",
                "what it is": kernel.summary if kernel else "not built in this version",
            }


def patterns() -> Iterator[Row]:
    """Which keys a query may see, with the kernels that serve each."""
    from attncompiler.mechanisms.base import discover

    for mechanism in discover().values():
        field = mechanism.policy.model_fields.get("pattern")
        for pattern in _members(field.annotation) if field is not None else ():
            kind = pattern.model_fields["kind"].default
            serving = [kernel.name for kernel in mechanism.kernels if _serves(kernel.needs.features, kind)]
            yield {
                "pattern": kind,
                "options": ", ".join(name for name in pattern.model_fields if name != "kind"),
                "kernels": ", ".join(serving) or "not built in this version",
                "a query sees": _summary(pattern),
            }


def targets() -> Iterator[Row]:
    """Built-in targets."""
    from attncompiler import targets as built_in
    from attncompiler.report.units import gib, si

    for name in built_in.names():
        target = built_in.get(name)
        yield {
            "target": name,
            "title": target.title,
            "memory": gib(target.memory_bytes),
            "bandwidth": f"{si(target.bandwidth)}B/s",
            "float32": f"{si(target.matrix_flops['float32'])}FLOP/s",
            "bfloat16": f"{si(target.matrix_flops.get('bfloat16', 0.0))}FLOP/s",
        }


def errors() -> Iterator[Row]:
    """Error codes."""
    from attncompiler.errors import CATALOGUE

    for code, meaning in CATALOGUE.items():
        yield {"code": code, "meaning": meaning}


def _members(annotation: Any) -> tuple[Any, ...]:
    """The models of a (possibly annotated) union."""
    if hasattr(annotation, "model_fields"):
        return (annotation,)
    return tuple(member for part in get_args(annotation) for member in _members(part))


def _serves(features: Any, kind: str) -> bool:
    needed = features.get("pattern", ())
    return needed is None or (needed != () and needed.refuses(kind) is None)


def _summary(documented: Any) -> str:
    """The first sentence or line of a docstring."""
    return (documented.__doc__ or "").strip().partition("\n")[0]
