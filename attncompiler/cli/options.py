"""Arguments and options that verbs share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Format(StrEnum):
    """For people, or for machines."""

    text = "text"
    json = "json"


class CheckFormat(StrEnum):
    """For people, for machines, or as annotations of a GitHub workflow."""

    text = "text"
    json = "json"
    github = "github"


SpecFile = Annotated[Path, typer.Argument(metavar="SPEC", help="the YAML file of the model", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="a value that replaces the file's, such as model.norm.eps=1e-6"),
]
AsFormat = Annotated[Format, typer.Option("--format", help="how to print")]
