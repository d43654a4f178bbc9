"""A model → a folder."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from attncompiler import __version__
from attncompiler import spec as specs
from attncompiler.artifact import layout, plans, weights
from attncompiler.artifact.manifest import FORMAT, FileRecord, Manifest, Weights, read_manifest
from attncompiler.artifact.replace import recover, replacing
from attncompiler.artifact.source import source
from attncompiler.emit import CompiledModel
from attncompiler.errors import ArtifactError, InputError, UsageError, fail
from attncompiler.planning import Plan, plan
from attncompiler.planning.explanation import explain
from attncompiler.report import html
from attncompiler.spec.model import ModelSpec


def write(model: CompiledModel, path: Path, *, force: bool = False) -> Path:
    """Write `model` into the folder `path`, replacing in one step an artifact that stands there; the folder written.

    Without `force`, trained weights that stand there are replaced by trained ones alone. Raises InputError (E403) for
    what is not an emitted model; ArtifactError: E301 when something else stands at `path`, E304 when trained weights
    would be lost, E306 when the model's weights are not whole or not those of its spec; UsageError (E601) when the
    folder cannot be written. Whatever is raised, what stood there still does.
    """
    if not isinstance(model, CompiledModel) or model.spec is None or model.plan is None:
        raise fail(
            InputError, "E403", f"only a model that `build` or `load` gave can be saved, not {type(model).__name__}"
        )
    try:
        path = layout.resolved(path)
        recover(path)
        weights.refuse_others(model)
        found = weights.origin(model, model.spec.seed)
        allow = _allow_all if force or found == "trained" else _refuse_to_lose_training
        allow(path)
        with replacing(path, allow) as folder:
            _write_files(model, model.spec, model.plan, found, folder)
    except OSError as error:
        cause = "its disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise fail(UsageError, "E601", f"{path} cannot be written: {cause}") from error
    return path


def _allow_all(_: Path) -> None:
    pass


def _refuse_to_lose_training(path: Path) -> None:
    if not layout.is_artifact(path):
        return
    try:
        found: Weights | None = read_manifest(path).weights
    except ArtifactError:
        found = None
    if found in ("trained", None):
        what = "trained weights" if found else "weights whose manifest cannot be read"
        message = f"{path} holds {what}, which would be replaced by initial ones"
        raise fail(ArtifactError, "E304", message, remedy="give another folder, or replace them with --force")


def _write_files(model: CompiledModel, spec: ModelSpec, emitted: Plan, found: Weights, folder: Path) -> None:
    listed = {made.target.name: made for made in (plan(spec, target) for target in spec.targets)}
    explained = [explain(spec, each) for each in (emitted, *listed.values())]
    texts = {
        layout.SPEC: specs.dump(spec),
        layout.PLAN: plans.to_json(listed, emitted),
        layout.SOURCE: source(model),
        layout.REPORT: html.page(explained),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    if found != "none":
        for file in weights.store(model, folder):
            shutil.copymode(folder / layout.SPEC, file)  # safetensors keeps others from reading what it writes
    manifest = Manifest(
        format=FORMAT,
        attncompiler=__version__,
        name=spec.name,
        weights=found,
        seed=spec.seed,
        dtype=weights.dtype_of(model, spec.model.dtype),
        emitted_for=emitted.target.name,
        files={entry.name: FileRecord.of(entry) for entry in sorted(folder.iterdir())},
    )
    (folder / layout.MANIFEST).write_text(manifest.to_json(), encoding="utf-8", newline="\n")
