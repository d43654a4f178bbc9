"""What stands on disk is never lost: not to a build, an error, a full disk or a crash."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact_models import build

import attncompiler
from attncompiler import AttnCompilerError, artifact
from attncompiler.artifact import replace, weights
from attncompiler.artifact.read import OVERTAKEN
from attncompiler.emit import CompiledModel


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def train(model: CompiledModel) -> CompiledModel:
    with torch.no_grad():
        model.norm.weight.add_(0.5)
    return model


@pytest.fixture
def trained(saved: Path) -> Path:
    """An artifact with trained weights."""
    return attncompiler.save(train(attncompiler.load(saved, device="cpu")), saved)


# --- trained weights ------------------------------------------------------------------------------------------------


def test_weights_are_trained_when_one_value_differs_from_the_seed(trained: Path, model: CompiledModel) -> None:
    assert artifact.read(trained).manifest.weights == "trained"
    assert artifact.read(artifact.write(model, trained, force=True)).manifest.weights == "initial"
    assert (
        artifact.read(attncompiler.save(attncompiler.load(trained, device="cpu"), trained)).manifest.weights
        == "initial"
    )


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_build_never_replaces_trained_weights(trained: Path, device: str) -> None:
    before = content(trained)
    with pytest.raises(AttnCompilerError, match=r"E304 .*trained weights.*--force"):
        artifact.write(build(device=device), trained)
    assert content(trained) == before
    artifact.write(build(device=device), trained, force=True)
    assert artifact.read(trained).manifest.weights == ("none" if device == "meta" else "initial")


def test_weights_that_are_trained_while_a_build_is_written_stay(
    saved: Path, model: CompiledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, trained = weights.store, [train(build())]

    def meanwhile(*arguments: Any) -> Any:
        if trained:
            attncompiler.save(trained.pop(), saved)
        return store(*arguments)

    monkeypatch.setattr(weights, "store", meanwhile)
    with pytest.raises(AttnCompilerError, match=r"E304 .*trained weights"):
        artifact.write(model, saved)
    assert torch.all(attncompiler.load(saved, device="cpu").norm.weight == 1.5)
    assert list(saved.parent.iterdir()) == [saved]


def test_weights_of_unknown_origin_count_as_trained(saved: Path, model: CompiledModel) -> None:
    (saved / "manifest.json").write_text("{}")
    before = content(saved)
    with pytest.raises(AttnCompilerError, match=r"E304 .*manifest cannot be read"):
        artifact.write(model, saved)
    assert content(saved) == before


def test_training_is_saved_over_training_and_a_build_over_a_build(
    trained: Path, saved: Path, model: CompiledModel
) -> None:
    more = train(attncompiler.load(trained, device="cpu"))
    artifact.write(more, trained)
    assert torch.equal(attncompiler.load(trained, device="cpu").norm.weight, more.norm.weight)
    other = artifact.write(model, trained.with_name("other"))
    artifact.write(model, other)


# --- other files ----------------------------------------------------------------------------------------------------


def test_other_files_in_an_artifact_stay(trained: Path, model: CompiledModel) -> None:
    (trained / "optimizer").mkdir()
    (trained / "optimizer" / "state.safetensors").write_bytes(b"moments")
    (trained / "notes.txt").write_text("mine")
    (trained / "link").symlink_to("notes.txt")
    attncompiler.save(model, trained)
    assert (trained / "optimizer" / "state.safetensors").read_bytes() == b"moments"
    assert (trained / "notes.txt").read_text() == "mine"
    assert (trained / "link").is_symlink()


def test_other_files_are_on_the_disk_before_the_old_folder_goes(
    trained: Path, model: CompiledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    (trained / "notes.txt").write_text("mine")
    synced: list[tuple[str, ...]] = []
    sync = replace._sync

    def recording(path: Path) -> None:
        if path.is_dir() and path != trained.parent:
            synced.append(tuple(entry.name for entry in path.iterdir()))
        sync(path)

    monkeypatch.setattr(replace, "_sync", recording)
    attncompiler.save(model, trained)
    assert "notes.txt" in synced[-1]


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_is_not_an_artifact_is_not_replaced(what: str, model: CompiledModel, tmp_path: Path) -> None:
    path = tmp_path / "mine"
    if what == "folder":
        path.mkdir()
        (path / "thesis.tex").write_text("years of work")
    else:
        path.write_text("years of work")
    before = content(tmp_path)
    with pytest.raises(AttnCompilerError, match=r"E301 .*not an artifact"):
        attncompiler.save(model, path, force=True)
    assert content(tmp_path) == before


def test_an_empty_folder_is_filled_and_a_link_is_followed(model: CompiledModel, tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "link").symlink_to("big")
    attncompiler.save(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert attncompiler.load(tmp_path / "big", device="cpu").spec.name == "small"


# --- errors ---------------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_made_is_an_error_of_its_own(model: CompiledModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(AttnCompilerError, match=r"E601 .*file/model cannot be written"):
        attncompiler.save(model, tmp_path / "file" / "model")
    assert content(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("stage", ["store", "_write_files", "_sync_tree", "_swap"])
def test_an_error_at_any_stage_leaves_what_was_there(
    stage: str, trained: Path, model: CompiledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    home = {"store": weights, "_write_files": artifact.write.__globals__, "_sync_tree": replace, "_swap": replace}[
        stage
    ]
    before = content(trained.parent)
    setter = monkeypatch.setitem if isinstance(home, dict) else monkeypatch.setattr
    setter(home, stage, full)
    with pytest.raises(AttnCompilerError, match=r"E601 .*disk is full"):
        attncompiler.save(model, trained)
    assert content(trained.parent) == before


@pytest.mark.parametrize("failing", [1, 2])
def test_a_rename_that_fails_leaves_what_was_there(
    failing: int, trained: Path, model: CompiledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.replace, []

    def sometimes(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == failing:
            raise PermissionError(errno.EACCES, "Permission denied")
        real(source, target)

    before = content(trained.parent)
    monkeypatch.setattr(os, "replace", sometimes)
    with pytest.raises(AttnCompilerError, match=r"E601 .*Permission denied"):
        attncompiler.save(model, trained)
    monkeypatch.undo()
    assert content(trained.parent) == before


# --- crashes --------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends: nothing touches the disk any more."""


def kill_at(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the rename of that number on, every change to the disk is the process's end."""
    real, calls = os.replace, []

    def dying(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) >= number:
            raise Killed
        real(source, target)

    monkeypatch.setattr(os, "replace", dying)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)


def crash(number: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    with monkeypatch.context() as patched:
        kill_at(number, patched)
        with pytest.raises(Killed):
            attncompiler.save(model, path)


@pytest.mark.parametrize("number", [1, 2])
def test_after_a_crash_the_old_artifact_loads(number: int, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(trained)
    crash(number, trained, monkeypatch)
    assert trained.exists() == (number == 1)
    loaded = attncompiler.load(trained, device="cpu")
    assert torch.all(loaded.norm.weight == 1.5)
    assert content(trained) == before


def test_after_a_crash_the_next_save_is_protected_and_tidies_up(
    trained: Path, model: CompiledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash(2, trained, monkeypatch)
    with pytest.raises(AttnCompilerError, match="E304"):
        artifact.write(model, trained)
    left = [entry for entry in trained.parent.iterdir() if entry != trained]
    assert len(left) == 1
    left[0].rename(left[0].with_name(left[0].name.replace(f"-{os.getpid()}-", f"-{2**22 + 1}-")))
    attncompiler.save(model, trained)
    assert list(trained.parent.iterdir()) == [trained]


def test_after_a_crash_once_the_new_one_stands_it_is_the_new_one(
    trained: Path, model: CompiledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda *_, **__: None)
        attncompiler.save(model, trained)
    assert len(list(trained.parent.iterdir())) == 2
    assert artifact.read(trained).manifest.weights == "initial"
    attncompiler.save(model, trained)
    assert list(trained.parent.iterdir()) == [trained]


def test_a_folder_made_meanwhile_hides_no_artifact_left_aside(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder is no obstacle; one with files is kept, and so is the artifact, which the error names."""
    crash(2, trained, monkeypatch)
    trained.mkdir()
    assert torch.all(attncompiler.load(trained, device="cpu").norm.weight == 1.5)
    crash(2, trained, monkeypatch)
    trained.mkdir()
    (trained / "notes.txt").write_text("mine")
    before = content(trained.parent)
    for action in (lambda: attncompiler.load(trained), lambda: attncompiler.save(build(), trained)):
        with pytest.raises(AttnCompilerError, match=r"E301 .*interrupted save left .*attncompiler-old"):
            action()
    assert content(trained.parent) == before


def test_savers_and_readers_of_one_path_do_not_meet(trained: Path) -> None:
    """Each save stands or is replaced whole, each load finds a whole one, and nothing is left beside it."""
    models = [train(build()) for _ in range(3)]

    def save(index: int) -> None:
        for _ in range(8):
            attncompiler.save(models[index], trained)

    def load(_: int) -> None:
        for _ in range(12):
            assert torch.all(attncompiler.load(trained, device="cpu").norm.weight == 1.5)

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(work, index) for index in range(3) for work in (save, load)]:
            done.result()
    assert list(trained.parent.iterdir()) == [trained]


def saves_meanwhile(monkeypatch: pytest.MonkeyPatch, path: Path, models: list[CompiledModel]) -> None:
    """Each load is met by the save of the next of the models, between its reading of the spec and of the weights."""
    fill = artifact.Artifact.load_into

    def overtaken(stored: artifact.Artifact, model: CompiledModel) -> None:
        if models:
            attncompiler.save(models.pop(0), path)
        fill(stored, model)

    monkeypatch.setattr(artifact.Artifact, "load_into", overtaken)


def test_a_load_never_joins_the_spec_of_one_save_to_the_weights_of_another(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wider = train(train(build("policies.near.pattern.window=8")))
    saves_meanwhile(monkeypatch, trained, [wider])
    loaded = attncompiler.load(trained, device="cpu")
    assert loaded.spec == wider.spec
    assert torch.all(loaded.norm.weight == 2)


def test_a_load_that_is_overtaken_again_and_again_has_savers_wait(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves_meanwhile(monkeypatch, trained, [train(build(f"seed={seed}")) for seed in range(OVERTAKEN)])
    waited = []

    @contextlib.contextmanager
    def held(path: Path) -> Iterator[None]:
        with ThreadPoolExecutor(1) as pool, replace.held(path):
            last = pool.submit(attncompiler.save, train(build("seed=9")), path)
            yield
            waited.append(not wait([last], timeout=0.5).done)

    monkeypatch.setitem(artifact.read.__globals__, "held", held)
    assert attncompiler.load(trained, device="cpu").spec.seed == OVERTAKEN - 1
    assert waited == [True]
    assert attncompiler.load(trained, device="cpu").spec.seed == 9


def test_a_load_that_is_overtaken_does_not_warn(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file for reading that went with the old folder is not missing."""
    verify, models = artifact.read.__globals__["verify_files"], [train(build())]

    def overtaken(path: Path, manifest: Any) -> Any:
        if not models:
            return verify(path, manifest)
        (path / "report.html").unlink()
        found = verify(path, manifest)
        attncompiler.save(models.pop(), path)
        return found

    monkeypatch.setitem(artifact.read.__globals__, "verify_files", overtaken)
    attncompiler.load(trained, device="cpu")


@pytest.mark.skipif(replace.fcntl is None, reason="no locks here")
def test_a_process_forked_during_a_save_does_not_keep_the_lock(
    saved: Path, model: CompiledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child that lives on, as a data loader's worker does, holds copies of every descriptor."""
    real, copies = os.open, []

    def inherited(*arguments: Any, **named: Any) -> int:
        descriptor = real(*arguments, **named)
        if arguments[0] == saved.parent:
            copies.append(os.dup(descriptor))
        return descriptor

    monkeypatch.setattr(os, "open", inherited)
    with replace.held(saved):
        pass
    monkeypatch.undo()
    free = os.open(saved.parent, os.O_RDONLY)
    try:
        assert copies
        replace.fcntl.flock(free, replace.fcntl.LOCK_EX | replace.fcntl.LOCK_NB)
    finally:
        for descriptor in (free, *copies):
            os.close(descriptor)


def test_a_first_save_under_way_is_no_artifact_yet(tmp_path: Path) -> None:
    """It is told of by the name it was asked for."""
    (tmp_path / f"{replace._prefix(tmp_path / 'small')}{os.getppid()}-0").mkdir()
    with pytest.raises(AttnCompilerError, match=r"E301 .*/small does not exist"):
        attncompiler.load(tmp_path / "small", device="cpu")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("untied", r"lm_head\.weight \(31, 16\) instead of tied to embed_tokens\.weight"),
        ("retied", r"lm_head\.weight tied to layers\.2\.mlp\.up_proj\.weight instead of tied to embed_tokens\.weight"),
        ("resized", r"embed_tokens\.weight \(40, 16\) instead of \(31, 16\)"),
        ("extra", r"2 weights its spec does not have: extra\.bias, extra\.weight"),
        ("buffer", "1 weights its spec does not have: extra"),
        ("int8", r"norm\.weight \(16,\) of int8 instead of \(16,\)"),
        ("float8_e4m3fn", r"norm\.weight \(16,\) of float8_e4m3fn instead of \(16,\)"),
        ("complex64", r"norm\.weight \(16,\) of complex64 instead of \(16,\)"),
        ("sparse", r"norm\.weight \(16,\) of sparse_coo instead of \(16,\)"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(trained: Path, change: str, named: str) -> None:
    model = train(build("model.mlp.intermediate_size=31"))
    if change == "untied":
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    elif change == "retied":
        model.lm_head.weight = model.layers["2"].mlp.up_proj.weight
    elif change == "resized":
        model.embed_tokens.weight = model.lm_head.weight = torch.nn.Parameter(torch.zeros(40, 16))
    elif change == "extra":
        model.extra = torch.nn.Linear(2, 2)
    elif change == "buffer":
        model.register_buffer("extra", torch.ones(3))
    else:
        weight = model.norm.weight.detach()
        changed = weight.to_sparse() if change == "sparse" else weight.to(getattr(torch, change))
        model.norm.weight = torch.nn.Parameter(changed, requires_grad=False)
    before = content(trained.parent)
    with pytest.raises(AttnCompilerError, match=f"E306 .*{named}"):
        attncompiler.save(model, trained)
    assert content(trained.parent) == before


def test_a_reader_between_another_processs_renames_breaks_neither(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The artifact is read where it stands aside, and left there for the writer that is still at work."""
    crash(2, trained, monkeypatch)
    (unfinished,) = [entry for entry in trained.parent.iterdir() if f"-{os.getpid()}-" in entry.name]
    unfinished.rename(unfinished.with_name(unfinished.name.replace(f"-{os.getpid()}-", f"-{os.getppid()}-")))
    before = content(trained.parent)
    assert torch.all(attncompiler.load(trained, device="cpu").norm.weight == 1.5)
    assert content(trained.parent) == before
    assert not trained.exists()
