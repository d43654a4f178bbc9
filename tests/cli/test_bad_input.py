"""Every bad input has a code of its own and exit code 1, no traceback, and leaves the disk as it was."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runner import SPEC, fresh, run

import attncompiler
from attncompiler.cli.failures import annotation
from attncompiler.cli.output import one_line
from attncompiler.errors import AttnCompilerError, Diagnostic, Location

BAD = {
    "not YAML": ("a: [", "E002"),
    "empty": ("", "E003"),
    "a list": ("- 1", "E003"),
    "10 MB of nesting": ("[" * 10 * 2**20, "E004"),
    "400 levels": ("a: " + "[" * 400 + "]" * 400, "E004"),
    "a key twice": (SPEC + "name: again\n", "E005"),
    "an unknown key": (SPEC.replace("hidden_size", "hiden_size"), "E012"),
    "an unknown kind": (SPEC.replace("kind: attention", "kind: attentoin"), "E013"),
    "an unknown policy": (SPEC.replace("policy: near", "policy: nearer"), "E102"),
    "no layers": (SPEC.replace("[{policy: near, repeat: 2}]", "[]"), "E103"),
    "layers of nothing": (SPEC.replace("[{policy: near, repeat: 2}]", "[{repeat: 3, layers: []}]"), "E103"),
    "a name with slashes": (SPEC.replace("small", "../small"), "E104"),
    "an unknown target": (SPEC.replace("h200", "h2000"), "E107"),
    "a demand that fails": (SPEC.replace("kind: attention", "kind: attention, kernel: triton"), "E202"),
    "what is not built": (SPEC.replace("window: 4}", "window: 4}, routes: [{when: training, packing: true}]"), "E203"),
    "a list that refuses": (SPEC.replace("kind: attention", "kind: attention, kernel: [triton]"), "E201"),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a spec and the artifact it makes."""
    monkeypatch.chdir(tmp_path)
    Path("spec.yaml").write_text(SPEC)
    attncompiler.save(attncompiler.build("spec.yaml", device="cpu"), "build/small")
    return tmp_path


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def bad(code: str, *arguments: object) -> str:
    """What a verb says on stderr of a bad input: lines of which each has its code, one of them `code`."""
    result = run(*arguments)
    lines = result.stderr.splitlines()
    assert result.exit_code == 1, result.output
    assert any(f"{code} " in line for line in lines), result.stderr
    assert all(re.search(r"(^|: )E\d{3} ", line) for line in lines), result.stderr
    assert "Traceback" not in result.output
    return result.stderr


@pytest.mark.parametrize("verb", ["check", "build", "explain"])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_spec(here: Path, kind: str, verb: str) -> None:
    text, code = BAD[kind]
    Path("bad.yaml").write_text(text)
    before = content(here)
    for line in bad(code, verb, "bad.yaml").splitlines():
        assert re.match(r"bad\.yaml(:\d+:\d+)?: E\d{3} ", line), line
    assert content(here) == before


@pytest.mark.parametrize("verb", ["check", "build", "explain"])
def test_a_spec_that_is_no_file(here: Path, verb: str) -> None:
    bad("E001", verb, "nowhere.yaml")
    bad("E001", verb, here)
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00")
    bad("E001", verb, "binary.yaml")


def test_an_override_that_does_not_fit_is_cited(here: Path) -> None:
    assert "--set" in bad("E011", "check", "spec.yaml", "--set", "model.hidden_size=wide")


def test_folders_that_cannot_be_written(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("file").write_text("mine")
    before = content(here)
    bad("E601", "build", "spec.yaml", "--device", "cpu", "--out", "file/model")
    bad("E301", "build", "spec.yaml", "--device", "cpu", "--out", "file")

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", denied)
    assert "Permission denied" in bad("E601", "build", "spec.yaml", "--device", "cpu")
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert content(here) == before


def test_a_build_does_not_replace_trained_weights(here: Path) -> None:
    import torch

    model = attncompiler.load("build/small", device="cpu")
    with torch.no_grad():
        model.norm.weight.fill_(2)
    attncompiler.save(model, "build/small")
    before = content(here)
    bad("E304", "build", "spec.yaml", "--device", "cpu")
    assert content(here) == before
    assert run("build", "spec.yaml", "--device", "cpu", "--force").exit_code == 0
    assert torch.all(attncompiler.load("build/small", device="cpu").norm.weight == 1)


def test_an_error_of_the_operating_system_has_a_code(here: Path) -> None:
    assert "nowhere" in bad("E603", "schema", "--out", "nowhere/schema.json")


def test_a_device_that_is_not_here(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bad("E107", "build", "spec.yaml", "--device", "cuda")


@pytest.mark.parametrize(
    "arguments",
    [
        ("nothing",),
        ("check",),
        ("check", "a.yaml", "--format", "xml"),
        ("build", "a.yaml", "--dtype", "int8"),
        ("build", "a.yaml", "--device", "tpu"),
        ("explain", "a.yaml", "--batch", "0"),
        ("explain", "a.yaml", "--batch", "1" + "0" * 320),
        ("explain", "a.yaml", "--seq-len", "1" + "0" * 320),
        ("list", "everything"),
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_faults_as_json_and_as_annotations(here: Path) -> None:
    Path("bad.yaml").write_text(SPEC.replace("hidden_size", "hiden_size"))
    result = run("check", "bad.yaml", "--format", "json")
    data = json.loads(result.stdout)
    assert result.exit_code == 1
    assert data["ok"] is False
    found = next(each for each in data["diagnostics"] if each["code"] == "E012")
    assert (found["file"], found["line"], found["column"]) == ("bad.yaml", 5, 3)
    assert "hidden_size" in found["remedy"]
    result = run("check", "bad.yaml", "--format", "github")
    assert result.exit_code == 1
    assert any(
        line.startswith("::error file=bad.yaml,line=5,col=3,title=E012::") for line in result.stdout.splitlines()
    )


def test_text_of_a_spec_cannot_break_a_line_or_steer_a_terminal() -> None:
    assert one_line("a\nb\x1b[31m\u202e c·d") == "a\\nb\\x1b[31m\\u202e c·d"
    fault = Diagnostic("E012", "100% wrong\n::warning::x", Location("a,b:c.yaml", 1, 2))
    assert annotation(fault) == "::error file=a%2Cb%3Ac.yaml,line=1,col=2,title=E012::100%25 wrong%0A::warning::x"


def test_the_entry_point_prints_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("a: [")
    done = fresh("check", "bad.yaml", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "E002" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_full_disk_on_stdout_is_said_on_stderr(here: Path, form: str) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "attncompiler.cli", "explain", "spec.yaml", "--format", form],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (ended.returncode, ended.stderr) == (1, "E603 No space left on device\n")


def test_a_terminal_without_the_letters_is_shown_their_codes(here: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ended = subprocess.run(
        [sys.executable, "-m", "attncompiler.cli", "explain", "spec.yaml"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert ended.returncode == 0, ended.stderr
    assert "1 \\xd7 2048 tokens" in ended.stdout


def test_a_path_that_is_none_is_a_coded_error(here: Path) -> None:
    with pytest.raises(AttnCompilerError, match="E301"):
        attncompiler.load("a\0b")
    with pytest.raises(AttnCompilerError, match="E601"):
        attncompiler.save(attncompiler.load("build/small"), "a\0b")
