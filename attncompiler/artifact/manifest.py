"""The manifest: what an artifact is, and the hash and size of each of its files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from attncompiler.artifact import layout
from attncompiler.errors import ArtifactError, fail
from attncompiler.mechanisms.base import StrictModel

FORMAT = 1
"""of the folder; an artifact of another format is refused"""
MAX_TEXT = 64 * 2**20
"""bytes of a text file that are read at most; nothing that `write` makes comes near it"""

RESTORE = "restore it from a copy; building the spec again gives untrained weights"
"""what to do about a file that is not as it was written"""
OTHER_VERSION = "load it with the attncompiler that wrote it; building the spec again gives untrained weights"

Weights = Literal["initial", "trained", "none"]
DType = Literal["float64", "float32", "bfloat16", "float16"]


class ArtifactWarning(UserWarning):
    """A file of an artifact that nothing is loaded from is not as it was written."""


class FileRecord(StrictModel):
    """One file, as it was written."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    size: Annotated[int, Field(ge=0)]

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        with path.open("rb") as file:
            return cls(sha256=hashlib.file_digest(file, "sha256").hexdigest(), size=path.stat().st_size)


class Manifest(StrictModel):
    """What `manifest.json` holds."""

    format: int
    attncompiler: str
    """the version of this package that wrote it"""
    name: str
    weights: Weights
    """initial: as drawn from the seed; trained: anything else; none: built on meta, to be drawn when loaded"""
    seed: int
    dtype: DType
    """of the parameters, those that always stay in fp32 aside"""
    emitted_for: str
    """the target's name"""
    files: dict[str, FileRecord]

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"

    @property
    def weight_files(self) -> tuple[str, ...]:
        return tuple(sorted(name for name in self.files if layout.holds_weights(name)))


def read_manifest(path: Path) -> Manifest:
    """The manifest of the artifact at `path`. Raises ArtifactError: E301 absent, E302 damaged, E303 another format."""
    if not path.exists():
        raise fail(ArtifactError, "E301", f"{path} does not exist", remedy="`attncompiler build` makes an artifact")
    if not layout.is_artifact(path):
        what = f"it has no {layout.MANIFEST}" if path.is_dir() else "it is not a folder"
        raise fail(ArtifactError, "E301", f"{path} is not an artifact: {what}")
    data = read_json(path / layout.MANIFEST)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else None
        message = f"{path} has format {found!r}, and this version reads {FORMAT}"
        raise fail(ArtifactError, "E303", message, remedy=OTHER_VERSION)
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise damaged(path / layout.MANIFEST, f"{place}: {first['msg']}") from None
    strange = sorted(name for name in manifest.files if not layout.is_ours(name) or name == layout.MANIFEST)
    wanted = {layout.SPEC, layout.PLAN} - set(manifest.files)
    if strange or wanted:
        raise damaged(path / layout.MANIFEST, f"it names {strange[0]!r}" if strange else f"it lacks {min(wanted)}")
    if (manifest.weights == "none") == bool(manifest.weight_files):
        raise damaged(path / layout.MANIFEST, f"weights are {manifest.weights!r}, and it names {manifest.weight_files}")
    return manifest


def verify_files(path: Path, manifest: Manifest) -> tuple[str, ...]:
    """How files that are only for reading differ from what was written: weights are worth more than they.

    Raises ArtifactError naming every other file that is missing (E301), or truncated or changed (E302).
    """
    loaded = {name: record for name, record in manifest.files.items() if name not in layout.FOR_READING}
    missing = [name for name in loaded if not (path / name).is_file()]
    if missing:
        raise fail(ArtifactError, "E301", f"{path} lacks {', '.join(missing)}", remedy=RESTORE)
    causes = [how for name, record in loaded.items() if (how := _changed(path / name, record)) is not None]
    if causes:
        raise damaged(path, "; ".join(causes))
    for_reading = [(path / name, record) for name, record in manifest.files.items() if name in layout.FOR_READING]
    return tuple(how for file, record in for_reading if (how := _altered(file, record)) is not None)


def _altered(path: Path, record: FileRecord) -> str | None:
    try:
        return _changed(path, record) if path.is_file() else f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror or error})"


def _changed(path: Path, record: FileRecord) -> str | None:
    """How a file differs from what was written, or None where it does not."""
    size = path.stat().st_size
    if size != record.size:
        return f"{path.name} has {size} bytes and was written with {record.size}"
    return None if FileRecord.of(path) == record else f"{path.name} was changed after it was written"


def read_text(path: Path) -> str:
    """A text file of an artifact. Raises ArtifactError (E302) when it is not UTF-8 or far too large."""
    with path.open("rb") as file:
        content = file.read(MAX_TEXT + 1)
    if len(content) > MAX_TEXT:
        raise damaged(path, f"it is larger than {MAX_TEXT} bytes")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise damaged(path, "it is not UTF-8") from None


def read_json(path: Path) -> Any:
    """A JSON file of an artifact. Raises ArtifactError (E302) when it is not JSON."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"it is not JSON ({type(error).__name__})") from None


def damaged(path: Path, cause: str) -> ArtifactError:
    """The error (E302) for a file that is not as it was written, to be raised."""
    error = fail(ArtifactError, "E302", f"{path} is damaged: {cause}", remedy=RESTORE)
    assert isinstance(error, ArtifactError)
    return error
