"""Arguments and options that verbs share."""

from __future__ import annotations

import re
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


def _device(value: str | None) -> str | None:
    if value is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", value):
        raise typer.BadParameter(f"{value!r} is not cpu, cuda or cuda:N")
    return value


Device = Annotated[
    str | None, typer.Option(callback=_device, metavar="cpu|cuda", help="where kernels run; default: a GPU, or the CPU")
]
AsFormat = Annotated[Format, typer.Option("--format", help="how to print")]
