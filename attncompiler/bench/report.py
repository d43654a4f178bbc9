"""How results are shown: a table for people, JSON for machines."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from attncompiler.bench.measure import Comparison, Samples


class Format(StrEnum):
    """What a script prints."""

    text = "text"
    json = "json"


FormatOption = Annotated[Format, typer.Option("--format", help="text for people, json for machines")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", help="threads torch may use (default: its own choice)")]

Row = Mapping[str, Any]


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    return {"machine": platform.machine(), "torch": torch.__version__, "threads": torch.get_num_threads()}


def show(title: str, rows: Sequence[Row], format: Format) -> None:
    """Print rows that share their columns. Samples, comparisons and numbers are shortened for people, whole in JSON."""
    if format is Format.json:
        plain = [{name: _plain(value) for name, value in row.items()} for row in rows]
        typer.echo(json.dumps({"title": title, **machine(), "rows": plain}, indent=1))
        return
    about = machine()
    table = Table(
        title=title,
        caption=f"torch {about['torch']}, {about['threads']} threads, {about['machine']}; median (fastest–slowest)",
    )
    for index, name in enumerate(rows[0] if rows else ()):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def comparison_row(name: str, comparison: Comparison, **more: Any) -> dict[str, Any]:
    """The row of two sides: both in milliseconds, the ratio of their medians, and the ratio's spread over the turns."""
    return {
        "case": name,
        "ours, ms": comparison.ours.scaled(1e3),
        "peer, ms": comparison.peer.scaled(1e3),
        "times faster": comparison.ratio,
        "in a turn": comparison.spread,
        **more,
    }


def pattern_label(pattern: Mapping[str, Any]) -> str:
    """A pattern as a spec holds it, in words."""
    return f"{pattern['kind']} {', '.join(f'{name} {value}' for name, value in pattern.items() if name != 'kind')}"


def mib(size: int) -> float:
    """Bytes as MiB."""
    return size / 2**20


def _text(value: Any) -> str:
    if isinstance(value, Samples):
        return f"{value.median:,.4g} ({value.fastest:,.4g}–{value.slowest:,.4g})"
    if isinstance(value, tuple):
        return "–".join(_text(part) for part in value)
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Samples):
        return {"median": value.median, "fastest": value.fastest, "slowest": value.slowest, "samples": value.seconds}
    return value
