"""A folder replaced in one step: at every moment the old one or the new one stands, whole.

The new folder is written beside the old one, which is then renamed aside, the new one renamed in, and the old one
deleted. After a crash between the two renames the old one is found aside, and `recover` puts it back. Renames are made
under a lock on the parent folder, so that savers and readers of one path do not undo one another's.
"""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from attncompiler.artifact import layout
from attncompiler.errors import ArtifactError, fail

try:
    import fcntl
except ImportError:  # not POSIX: savers of one path must not overlap there
    fcntl = None  # type: ignore[assignment]


@contextmanager
def replacing(path: Path, allow: Callable[[Path], None]) -> Iterator[Path]:
    """A new folder that becomes `path` when the block ends well, and vanishes when it does not.

    `allow` raises where what stands at `path` by then must stay: another saver may have put it there. Files of the old
    folder that are not an artifact's own are kept. Raises ArtifactError (E301) when something other than an artifact or
    an empty folder stands at `path`, and OSError; both leave what was there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path):
        _recover(path)
        if path.exists() and not layout.is_artifact(path) and not _is_empty(path):
            what = "a folder of other files" if path.is_dir() else "a file"
            raise fail(ArtifactError, "E301", f"{path} is {what}, not an artifact, and is not replaced")
        _remove_leftovers(path)
    new = path.with_name(f"{_prefix(path)}{os.getpid()}-{secrets.token_hex(4)}")
    new.mkdir()
    try:
        yield new
        _sync_tree(new)
        with _alone(path):
            allow(path)
            if path.exists():
                _keep_others(path, new)
                _sync_tree(new)
            _swap(new, path)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def stamp(path: Path) -> tuple[tuple[int, int] | None, ...]:
    """What tells one save to `path` from the next, also while one is between its renames."""
    try:
        path = layout.resolved(path)
    except OSError:
        return ()
    return tuple(_identity(folder / layout.MANIFEST) for folder in (path, _aside(path)))


def _identity(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


@contextmanager
def held(path: Path) -> Iterator[None]:
    """A block in which nobody replaces the artifact at `path`, put back first if a crash left it aside.

    Raises ArtifactError (E301) when it cannot be put back or reached.
    """
    with contextlib.ExitStack() as stack:
        try:
            path = layout.resolved(path)
            stack.enter_context(_alone(path))
        except OSError as error:
            raise fail(ArtifactError, "E301", f"{path} cannot be read: {error.strerror or error}") from error
        _recover(path)
        yield


def standing(path: Path) -> Path:
    """Where a reader finds the artifact of `path`: there, put back first if a crash left it aside.

    While another process is between its two renames it is read where it stands, aside: to put it back would break
    that save. Raises ArtifactError (E301) when it cannot be put back.
    """
    writers = () if layout.is_artifact(path) else _writers(path)
    if _aside(path).is_dir() and any(_is_alive(writer) and writer != os.getpid() for writer in writers):
        return _aside(path)
    recover(path)
    return path


def recover(path: Path) -> None:
    """Put back an artifact that a crash left aside. Raises ArtifactError (E301) when it cannot be put back."""
    if _aside(path).is_dir() and not layout.is_artifact(path):
        with _alone(path):
            _recover(path)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """A block that no other process or thread is in for an artifact of this parent folder, where the system locks."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # to close is not enough: a child forked meanwhile has a copy
        os.close(descriptor)


def _recover(path: Path) -> None:
    aside = _aside(path)
    if not aside.is_dir() or layout.is_artifact(path):
        return
    try:
        os.replace(aside, path)
    except OSError as error:
        message = f"an interrupted save left {path} as {aside}, and it cannot be put back: {error.strerror or error}"
        raise fail(ArtifactError, "E301", message, remedy=f"rename {aside.name} to {path.name}") from None


def _swap(new: Path, path: Path) -> None:
    aside = _aside(path)
    if path.exists():
        os.replace(path, aside)
    try:
        os.replace(new, path)
    finally:
        if aside.exists() and not path.exists():
            os.replace(aside, path)
    _sync(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.attncompiler-old")


def _prefix(path: Path) -> str:
    return f".{path.name}.attncompiler-new-{platform.node()}-"


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _remove_leftovers(path: Path) -> None:
    """What crashes left: an old folder whose successor stands, and new ones whose process is gone."""
    shutil.rmtree(_aside(path), ignore_errors=True)
    for process, folders in _writers(path).items():
        if not _is_alive(process):
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)


def _writers(path: Path) -> dict[int, list[Path]]:
    """The processes that have begun to write an artifact for `path`, and their unfinished folders."""
    found: dict[int, list[Path]] = {}
    prefix = _prefix(path)
    for folder in path.parent.iterdir() if path.parent.is_dir() else ():
        process = folder.name.removeprefix(prefix).partition("-")[0]
        if folder.name.startswith(prefix) and process.isdecimal():
            found.setdefault(int(process), []).append(folder)
    return found


def _is_alive(process: int) -> bool:
    if os.name != "posix":
        return True  # elsewhere os.kill(process, 0) ends the process instead of asking
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _keep_others(old: Path, new: Path) -> None:
    """Give the new folder what its user put into the old one, by links where the file system has them."""
    for entry in old.iterdir():
        if layout.is_ours(entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(entry, new / entry.name)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _sync_tree(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_file():
            _sync(entry)
    _sync(folder)


def _sync(path: Path) -> None:
    """Have the operating system write a file or folder out, so that a rename never overtakes its content."""
    if os.name != "posix" and path.is_dir():
        return  # a folder cannot be opened there
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
