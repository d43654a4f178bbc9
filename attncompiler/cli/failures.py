"""How a verb ends when something is wrong: one line per fault on stderr, and an exit code."""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Iterable
from typing import Any

import typer
from typer.core import TyperCommand

from attncompiler.cli import output
from attncompiler.errors import AttnCompilerError, Diagnostic, Location


class Verb(TyperCommand):
    """A command whose coded errors, and the operating system's, are printed without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AttnCompilerError as error:
            found = error.diagnostics
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            place = Location(str(error.filename)) if error.filename else None
            found = (Diagnostic("E603", error.strerror or str(error), place),)
        report(found, ctx.params.get("format"))
        raise typer.Exit(1)


def report(diagnostics: Iterable[Diagnostic], form: str | None) -> None:
    """Print every fault as a line on stderr, and where asked as JSON or as GitHub annotations on stdout."""
    diagnostics = list(diagnostics)
    for each in diagnostics:
        print(output.one_line(str(each)), file=sys.stderr)
    with contextlib.suppress(OSError):  # stdout may be what failed, which stderr has said
        if form == "json":
            output.as_json({"ok": False, "diagnostics": [as_data(each) for each in diagnostics]})
        elif form == "github":
            for each in diagnostics:
                print(annotation(each))
        sys.stdout.flush()


def as_data(diagnostic: Diagnostic) -> dict[str, Any]:
    place = diagnostic.location or Location()
    return {
        "code": diagnostic.code,
        "message": diagnostic.message,
        "remedy": diagnostic.remedy,
        "file": place.file,
        "line": place.line,
        "column": place.column,
        "option": place.option,
    }


def annotation(diagnostic: Diagnostic) -> str:
    """GitHub's workflow command for a fault: `::error file=…,line=…,col=…,title=E012::…`."""
    place = diagnostic.location or Location()
    given = {"file": place.file, "line": place.line, "col": place.column, "title": diagnostic.code}
    properties = ",".join(f"{key}={_escape(str(value), ':,')}" for key, value in given.items() if value is not None)
    text = f"{diagnostic.message}; {diagnostic.remedy}" if diagnostic.remedy else diagnostic.message
    prefix = f"{place.option}: " if place.option else ""
    return f"::error {properties}::{_escape(prefix + text)}"


def _escape(text: str, more: str = "") -> str:
    for character in "%\r\n" + more:
        text = text.replace(character, f"%{ord(character):02X}")
    return output.one_line(text)
