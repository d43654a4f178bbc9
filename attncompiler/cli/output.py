"""The one printer: lines, tables, JSON and progress."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 120
"""columns where the output is not a terminal, and more where the numbers of a table need more"""
LONGEST = 40
"""characters of a word that is not broken there"""


def one_line(text: str) -> str:
    """Text that cannot break its line or steer a terminal: what is not printable is shown escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def line(text: str = "") -> None:
    print(one_line(text))


def as_json(data: Any) -> None:
    print(json.dumps(data, indent=2))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """Rows under column heads, those named in `right`, numbers, set to the right; long cells wrap.

    Where the output is not a terminal it is as wide as its numbers and words need.
    """
    from rich.box import SIMPLE_HEAD
    from rich.cells import cell_len
    from rich.table import Table

    lines = [[one_line(cell) for cell in row] for row in rows]
    terminal = sys.stdout.isatty()
    made = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1), show_header=any(columns))
    needed = 0
    for place, column in enumerate(columns):
        number = column in right
        parts = [
            part for cell in (column, *(line[place] for line in lines)) for part in ([cell] if number else cell.split())
        ]
        least = min(max(map(cell_len, parts), default=0), LONGEST)
        needed += least + len("   ")
        made.add_column(
            column,
            justify="right" if number else "left",
            overflow="fold",
            min_width=None if terminal else least,
            no_wrap=number and not terminal,
        )
    for line in lines:
        made.add_row(*line)
    printer = console()
    if not terminal:
        printer.width = max(WIDTH, needed)
    with printer.capture() as captured:
        printer.print(made)
    for text in captured.get().splitlines():
        print(text.rstrip())


@contextmanager
def progress(first: str) -> Iterator[Callable[[str], None]]:
    """What is being done, with a spinner, on stderr where that is a terminal; the function given names the next."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console

    with Console(stderr=True, markup=False).status(one_line(first)) as status:
        yield lambda text: status.update(one_line(text))


def console() -> Console:
    from rich.console import Console

    width = None if sys.stdout.isatty() else WIDTH
    return Console(width=width, markup=False, emoji=False, highlight=False)
