"""The command line: one module per verb, each of which asks the pipeline and prints.

What a verb needs beside the terminal is imported when it runs, so that `--help` and `check` answer at once.
"""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from attncompiler import __version__
from attncompiler.cli import bench, build, check, explain, fuzz, generate, info, listing, schema, verify
from attncompiler.cli.failures import Verb

app = typer.Typer(
    name="attncompiler",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        print(f"attncompiler {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version and exit")
    ] = False,
) -> None:
    """Sequence models from a YAML file, each layer on the fastest kernel that computes exactly its function."""


app.command("build", cls=Verb)(build.build)
app.command("check", cls=Verb)(check.check)
app.command("explain", cls=Verb)(explain.explain)
app.command("verify", cls=Verb)(verify.verify)
app.command("fuzz", cls=Verb)(fuzz.fuzz)
app.add_typer(bench.app, name="bench")
app.command("generate", cls=Verb)(generate.generate)
app.command("list", cls=Verb)(listing.list_)
app.command("schema", cls=Verb)(schema.schema)
app.command("info", cls=Verb)(info.info)


def main() -> None:
    """The entry point. Exit codes: 0 fine, 1 the spec or the result is bad, 2 usage."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter shows its code
    app()


__all__ = ["app", "main"]
