"""Tables on disk: those that come with the package, and a user's own."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from attncompiler import targets
from attncompiler.errors import Location, UsageError, fail
from attncompiler.measured.table import Entry, Table, damaged, read_json
from attncompiler.targets.target import Target


def entries(target: Target, *, here: bool) -> tuple[Entry, ...]:
    """What was measured on `target`, by the tables of the package.

    For a GPU without a table that of another of its architecture stands in, the first by name: what orders kernels is
    how they use the multiprocessors, more than how many there are. Each entry names its device.

    With `here` it is the machine at hand: the user's own entries for a device of this name come before those of the
    package. A process reads each file once. Raises UsageError (E605) on a table that is damaged.
    """
    return _entries(target.name, target.compute_capability, target.title if here else None)


def folder() -> Path:
    """Where a user's own tables are kept: the application's data folder."""
    import typer

    return Path(typer.get_app_dir("attncompiler")) / "measured"


def save(entries: Iterable[Entry], target: str, into: Path | None = None) -> Path:
    """Put `entries` into the table of `target` in the folder `into`, default the user's own, and give its path.

    What stands there is kept, but for entries of the same bucket and device; the file is replaced in one step, and a
    process that has read it goes on with what it read. Raises UsageError: E605 where the table that stands there is
    damaged, E601 where it cannot be written.
    """
    into = folder() if into is None else into
    path = into / f"{target}.json"
    table = (_read(path, target) or Table(target=target)).merged(tuple(entries))
    try:
        into.mkdir(parents=True, exist_ok=True)
        _replace(path, table.to_json())
    except OSError as error:
        why = error.strerror or str(error)
        raise fail(UsageError, "E601", f"the table cannot be written: {why}", location=Location(str(path))) from None
    return path


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@cache
def _entries(target: str, architecture: tuple[int, int] | None, device: str | None) -> tuple[Entry, ...]:
    packaged = _packaged(target, architecture)
    if device is None:
        return packaged
    table = _read(folder() / f"{target}.json", target)
    own = [entry for entry in table.entries if entry.run.device == device] if table is not None else []
    known = {(entry.mechanism, entry.bucket.key) for entry in own}
    return (*own, *(entry for entry in packaged if (entry.mechanism, entry.bucket.key) not in known))


def _tables() -> Traversable:
    """The folder of those that come with the package."""
    return resources.files("attncompiler.measured").joinpath("tables")


def _packaged(target: str, architecture: tuple[int, int] | None) -> tuple[Entry, ...]:
    alike = [name for name in targets.names() if architecture and targets.get(name).compute_capability == architecture]
    for name in (target, *alike):
        file = _tables().joinpath(f"{name}.json")
        if file.is_file():
            return read_json(file.read_bytes(), name, str(file)).entries
    return ()


def _read(path: Path, target: str) -> Table | None:
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise damaged(str(path), error.strerror or str(error)) from None
    return read_json(text, target, str(path))
