"""An artifact from a stranger is data: damaged or hostile, it is refused in words, and nothing in it runs."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
import struct
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact_models import SPEC, build
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import attncompiler
from attncompiler import AttnCompilerError, artifact
from attncompiler.artifact.manifest import ArtifactWarning, FileRecord

FILES = ("spec.resolved.yaml", "plan.json", "model.safetensors", "manifest.json")
FOR_READING = ("modeling.py", "report.html")


def forge(path: Path, **changes: Any) -> None:
    """Make the manifest fit what the files are now, as an attacker would."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest |= changes
    for name in manifest["files"]:
        if (path / name).is_file():
            manifest["files"][name] = FileRecord.of(path / name).model_dump()
    (path / "manifest.json").write_text(json.dumps(manifest))


def refused(path: Path, pattern: str) -> AttnCompilerError:
    with pytest.raises(AttnCompilerError, match=pattern) as caught:
        attncompiler.load(path, device="cpu")
    return caught.value


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    refused(saved, rf"E301 .*{name}")


@pytest.mark.parametrize("name", FILES[:-1])
@pytest.mark.parametrize("how", ["truncated", "edited", "emptied"])
def test_a_changed_file_is_named(saved: Path, name: str, how: str) -> None:
    whole = (saved / name).read_bytes()
    edited = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
    (saved / name).write_bytes({"truncated": whole[:-1], "edited": edited, "emptied": b""}[how])
    refused(saved, rf"E302 .*{name} .*(bytes|changed)")


def test_every_damaged_file_is_named_at_once(saved: Path) -> None:
    for name in ("plan.json", "spec.resolved.yaml"):
        (saved / name).write_text("")
    refused(saved, r"plan\.json .*spec\.resolved\.yaml .*restore it from a copy; building .* gives untrained weights")


@pytest.mark.parametrize("name", FOR_READING)
@pytest.mark.parametrize("how", ["edited", "deleted", "unreadable"])
def test_what_is_for_reading_is_warned_of_and_keeps_no_weights_from_their_owner(
    saved: Path, name: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.open

    def denied(path: Path, *arguments: Any, **named: Any) -> Any:
        if path.name == name:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *arguments, **named)

    if how == "unreadable":
        monkeypatch.setattr(Path, "open", denied)
    elif how == "edited":
        (saved / name).write_text((saved / name).read_text() + "raise SystemExit\n")
    else:
        (saved / name).unlink()
    with pytest.warns(ArtifactWarning, match=rf"{name} .*nothing is loaded from it"):
        attncompiler.load(saved, device="cpu")


def test_what_is_no_artifact_is_told(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", r"E301 .*does not exist")
    refused(tmp_path, r"E301 .*no manifest\.json")
    refused(Path("/"), r"E301 / cannot be read: it is a root")
    with pytest.raises(AttnCompilerError, match=r"E601 / cannot be written: it is a root"):
        attncompiler.save(build(), "/")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", r"E301 .*not a folder")


@pytest.mark.parametrize(
    "text",
    ["", "nonsense", "[]", "\udcff", "[" * 100_000, '{"format": 1}', "NaN", '{"format": 1, "files": {"a": 1}}'],
)
def test_a_manifest_of_nonsense_is_refused(saved: Path, text: str) -> None:
    (saved / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(saved, "E30[23]")


def test_another_version_is_named(saved: Path) -> None:
    forge(saved, format=2)
    refused(saved, r"E303 .*format 2.*reads 1.*load it with the attncompiler that wrote it.*untrained weights")


@pytest.mark.parametrize("which", ["emitted", "listed"])
def test_a_plan_of_another_version_is_named(saved: Path, which: str) -> None:
    plans = json.loads((saved / "plan.json").read_text())
    (plans["emitted"] if which == "emitted" else plans["listed"]["h200"])["format"] = 99
    (saved / "plan.json").write_text(json.dumps(plans))
    forge(saved)
    refused(saved, "E303 .*99")


def test_a_plan_of_another_model_is_refused(saved: Path, tmp_path: Path) -> None:
    other = attncompiler.save(build(text=SPEC.replace("repeat: 2", "repeat: 3")), tmp_path / "other")
    shutil.copy(other / "plan.json", saved)
    forge(saved)
    refused(saved, r"E302 .*plan\.json .*4 layers")


# --- weights that do not fit ----------------------------------------------------------------------------------------


def rewrite_weights(path: Path, change: Any) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")
    forge(path)


def test_weights_that_do_not_fit_the_spec_are_all_listed(saved: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["norm.weight"]
        tensors["layers.7.extra"] = torch.zeros(1)
        tensors["layers.2.mixer.q_proj.weight"] = torch.zeros(3, 3)
        tensors["layers.2.mixer.q_proj.bias"] = torch.zeros(16, dtype=torch.int64)

    rewrite_weights(saved, change)
    error = refused(saved, "E306")
    assert {each.code for each in error.diagnostics} == {"E306"}
    for words in (
        "norm.weight",
        "layers.7.extra",
        "q_proj.weight (3, 3) instead of (16, 16)",
        "q_proj.bias I64 for float32",
    ):
        assert words in str(error)


def test_weights_of_another_dtype_convert_and_of_another_model_are_refused(saved: Path, tmp_path: Path) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].double()

    expected = attncompiler.load(saved, device="cpu").state_dict()
    rewrite_weights(saved, widen)
    found = attncompiler.load(saved, device="cpu").state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    wider = attncompiler.save(build("model.hidden_size=32"), tmp_path / "wider")
    shutil.copy(wider / "model.safetensors", saved)
    forge(saved)
    refused(saved, "E306 .*other shapes")


def test_nothing_is_copied_when_something_does_not_fit(saved: Path) -> None:
    rewrite_weights(saved, lambda tensors: tensors.pop("norm.weight"))
    model = build("seed=4")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(AttnCompilerError, match="E306"):
        artifact.read(saved).load_into(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# --- a stranger's ---------------------------------------------------------------------------------------------------


class _Bomb:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def test_nothing_of_the_folder_is_executed(saved: Path, tmp_path: Path) -> None:
    """Code where code is expected, pickles under every likely name, and tags in the YAML: none leaves a mark."""
    mark = tmp_path / "executed"
    code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
    for name in ("modeling.py", "__init__.py", "conftest.py", "sitecustomize.py", "attncompiler.py", "torch.py"):
        (saved / name).write_text(code)
    for name in ("model.pkl", "pytorch_model.bin", "model.pt", "optimizer.pt"):
        (saved / name).write_bytes(pickle.dumps(_Bomb(mark)))
    forge(saved)
    before, path = set(sys.modules), list(sys.path)
    attncompiler.load(saved, device="cpu")
    assert not [name for name in set(sys.modules) - before if "modeling" in name]
    assert sys.path == path
    spec = (saved / "spec.resolved.yaml").read_text()
    (saved / "spec.resolved.yaml").write_text(f"{spec}extra: !!python/object/apply:pathlib.Path.touch [{mark}]\n")
    forge(saved)
    refused(saved, r"E0\d\d")
    (saved / "spec.resolved.yaml").write_text(spec)
    (saved / "model.safetensors").write_bytes(pickle.dumps(_Bomb(mark)))
    forge(saved)
    refused(saved, r"E302 .*model\.safetensors")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "model.pkl", "manifest.json", ""])
def test_a_manifest_names_no_file_but_the_artifacts_own(saved: Path, name: str) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"]["plan.json"]
    (saved / "manifest.json").write_text(json.dumps(manifest))
    refused(saved, "E302 .*it names")


def test_a_spec_is_validated_again(saved: Path) -> None:
    spec = saved / "spec.resolved.yaml"
    spec.write_text(spec.read_text().replace("num_attention_heads: 2", "num_attention_heads: 3"))
    forge(saved)
    refused(saved, r"spec\.resolved\.yaml:\d+:\d+: E101")


def test_a_header_that_promises_too_much_is_refused(saved: Path) -> None:
    for head in (struct.pack("<Q", 2**62) + b"{}", struct.pack("<Q", 2) + b"[]", b"\0" * 8, b""):
        (saved / "model.safetensors").write_bytes(head)
        forge(saved)
        refused(saved, r"E302 .*model\.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return attncompiler.save(build(), tmp_path_factory.mktemp("whole") / "small")


@settings(max_examples=60)
@given(data=st.data(), name=st.sampled_from([*FILES, *FOR_READING]), forged=st.booleans())
def test_any_change_is_refused_in_words_or_harmless(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, name: str, forged: bool
) -> None:
    """Whatever bytes stand in a file, with a manifest that admits them or not, loading ends well or in coded errors."""
    path = tmp_path_factory.mktemp("changed") / "small"
    shutil.copytree(whole, path)
    content = (path / name).read_bytes()
    start = data.draw(st.integers(0, min(len(content), 3000)))
    end = data.draw(st.integers(start, min(len(content), start + 40)))
    changed = content[:start] + data.draw(st.binary(max_size=40)) + content[end:]
    (path / name).write_bytes(changed)
    if forged and name != "manifest.json":
        forge(path)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            attncompiler.load(path, device="cpu")
        loaded = True
    except AttnCompilerError:
        loaded = False
    unseen = loaded and not any(issubclass(each.category, ArtifactWarning) for each in caught)
    assert not unseen or forged or changed == content or name == "manifest.json"
    shutil.rmtree(path.parent)
