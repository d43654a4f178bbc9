"""`attncompiler check`: is the spec valid, and can every target it lists serve it?"""

from __future__ import annotations

from typing import Annotated

import typer

from attncompiler.cli import output
from attncompiler.cli.options import CheckFormat, Overrides, SpecFile


def check(
    spec: SpecFile,
    set_: Overrides = None,
    format: Annotated[CheckFormat, typer.Option("--format", help="how to print")] = CheckFormat.text,
) -> None:
    """Check a spec, every fault at once: its text, its relations, and that each listed target can serve it."""
    from attncompiler import pipeline

    plans = pipeline.plan(pipeline.read(spec, set_ or ()))
    layers = len(next(iter(plans.values())).layers)
    if format == "json":
        output.as_json({"ok": True, "spec": str(spec), "layers": layers, "targets": list(plans)})
    elif format == "text":
        output.line(f"{spec}: fine, {layers} layers, served on {', '.join(plans)}")
