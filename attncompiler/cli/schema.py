"""`attncompiler schema`: the grammar, for editors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from attncompiler.cli import output


def schema(
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="where to write it; standard output if absent")
    ] = None,
) -> None:
    """Print the JSON Schema (draft-07) of spec files, for completion and checks in an editor."""
    from attncompiler import spec

    if out is None:
        output.as_json(spec.schema())
        return
    out.write_text(json.dumps(spec.schema(), indent=2) + "\n", encoding="utf-8")
    output.line(f"{out}: name it in a spec's first line, `# yaml-language-server: $schema={out}`")
