"""A folder → what it says, validated as if by a stranger. Nothing in it is executed or imported."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from attncompiler import spec as specs
from attncompiler.artifact import layout, plans, weights
from attncompiler.artifact.manifest import ArtifactWarning, Manifest, damaged, read_manifest, read_text, verify_files
from attncompiler.artifact.replace import held, stamp, standing
from attncompiler.errors import ArtifactError, fail
from attncompiler.planning import Plan
from attncompiler.spec.model import ModelSpec

T = TypeVar("T")

OVERTAKEN = 3
"""times that a use of an artifact begins again because it was replaced meanwhile, before savers have to wait"""


@dataclass(frozen=True)
class Artifact:
    """An artifact whose files are whole and whose spec and plans are valid."""

    path: Path
    manifest: Manifest
    spec: ModelSpec
    plans: Mapping[str, Plan]
    """of each listed target"""
    plan: Plan
    """that the model was emitted for"""
    altered: tuple[str, ...] = ()
    """how files that nothing is loaded from differ from what was written"""

    @property
    def has_weights(self) -> bool:
        return self.manifest.weights != "none"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model had when it was saved."""
        dtype: torch.dtype = getattr(torch, self.manifest.dtype)
        return dtype

    def load_into(self, model: nn.Module) -> None:
        """Fill the model's parameters in place, ties once, in its own dtypes. Raises ArtifactError (E302, E306)."""
        weights.fill(model, [self.path / name for name in self.manifest.weight_files])


def read(path: Path) -> Artifact:
    """The artifact at `path`, put back first if an interrupted save left it aside.

    Raises ArtifactError: E301 not an artifact or a file is missing, E302 damaged, E303 of another version; SpecError
    when its spec is not valid.
    """
    try:
        path = standing(layout.resolved(path))
        manifest = read_manifest(path)
        altered = verify_files(path, manifest)
        spec = specs.parse(read_text(path / layout.SPEC), filename=str(path / layout.SPEC))
        listed, emitted = plans.read_plans(path / layout.PLAN)
    except OSError as error:
        raise fail(ArtifactError, "E301", f"{path} cannot be read: {error.strerror or error}") from error
    if len(emitted.layers) != len(spec.resolved_layers) or emitted.spec != spec.name:
        raise damaged(path / layout.PLAN, f"it is for {emitted.spec!r} with {len(emitted.layers)} layers")
    return Artifact(path, manifest, spec, listed, emitted, altered)


def undisturbed(path: Path, use: Callable[[Artifact], T]) -> T:
    """What `use` makes of the artifact at `path`, all of it of one save.

    It begins again where another save was made meanwhile, at last while savers wait. Of altered files that are only for
    reading it warns (ArtifactWarning). Raises what `read` and `use` raise.
    """
    for _ in range(OVERTAKEN):
        before = stamp(path)
        try:
            stored = read(path)
            made = use(stored)
        except ArtifactError:
            if stamp(path) == before:
                raise
            continue
        if stamp(path) == before:
            break
    else:
        with held(path):
            stored = read(path)
            made = use(stored)
    for what in stored.altered:
        warnings.warn(
            f"{stored.path}: {what}; it is for reading, and nothing is loaded from it", ArtifactWarning, stacklevel=4
        )
    return made
