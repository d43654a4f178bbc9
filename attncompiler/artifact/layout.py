"""The names of an artifact's files."""

from __future__ import annotations

import errno
import re
from pathlib import Path

SPEC = "spec.resolved.yaml"
PLAN = "plan.json"
SOURCE = "modeling.py"
REPORT = "report.html"
MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

FOR_READING = frozenset({SOURCE, REPORT})
"""files that nothing is loaded from"""
NAMES = frozenset({SPEC, PLAN, SOURCE, REPORT, MANIFEST, WEIGHTS, INDEX})
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def shard(number: int, count: int) -> str:
    """The name of weight file `number` of `count`, from 1, as HF names them."""
    return WEIGHTS if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def holds_weights(name: str) -> bool:
    return name == WEIGHTS or _SHARD.fullmatch(name) is not None


def is_ours(name: str) -> bool:
    """Whether a file of that name is one that `write` makes; any other in the folder is its user's."""
    return name in NAMES or holds_weights(name)


def resolved(path: Path) -> Path:
    """The absolute path without links. Raises OSError, also for what is no path at all, and for a root."""
    try:
        found = path.resolve()
    except ValueError as error:  # a NUL byte
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    if not found.name:
        raise OSError(errno.EINVAL, "it is a root folder, with nothing beside it", str(path))
    return found


def is_artifact(path: Path) -> bool:
    return (path / MANIFEST).is_file()
