"""The verbs `verify` and `fuzz`: what they print, for people and machines, their exit codes, and what they refuse."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_runner import SPEC, run

from attncompiler.testing import fuzz as fuzzing
from attncompiler.testing.budget import Verdict
from attncompiler.testing.conformance import Trial
from attncompiler.testing.model_laws import Broken, Subject


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC)
    return path


SHORT = ("--set", "model.max_position_embeddings=24", "--device", "cpu")


def test_verify_prints_a_table_and_says_that_all_is_well(spec: Path) -> None:
    result = run("verify", spec, *SHORT)
    assert result.exit_code == 0, result.output
    assert "small on cpu, float32: batches of 2 × 24 of 24 tokens" in result.stdout
    for kernel in ("chunkwise", "sdpa", "eager"):
        [first, *_] = [line for line in result.stdout.splitlines() if f" {kernel} " in line and " out " in line]
        assert first.split()[:4] == ["0-1", "near", "cpu", kernel]
        assert first.split()[-1] == "fine"
    assert "grad q" in result.stdout
    count = sum("fine" in line for line in result.stdout.splitlines())
    assert f"all {count} tensors within the budget" in result.stdout.splitlines()[-1]


def test_verify_for_machines_says_the_same(spec: Path) -> None:
    result = run("verify", spec, *SHORT, "--target", "cpu", "--target", "h200", "--format", "json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["ok"]
    assert {row["target"] for row in found["rows"]} == {"cpu", "h200"}
    judged = [row for row in found["rows"] if row["ok"] is not None]
    assert all(row["max_error"] <= row["max_budget"] and row["rms_error"] <= row["rms_budget"] for row in judged)
    assert any("not built in this version" in (row["reason"] or "") for row in found["rows"] if row["target"] == "h200")


def test_verify_fails_where_one_tensor_is_over_the_budget(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its largest error, or by its root mean square alone."""
    sound = Trial.verdicts
    for errors, said in (((2.0, 1.0, 0.5, 1.0), "OVER"), ((0.5, 1.0, 3.0, 1.0), "OVER (rms)")):

        def over(self: Trial, *arguments: Any, errors: Any = errors) -> tuple[Verdict, ...]:
            first, *rest = sound(self, *arguments)
            return (Verdict(first.name, *errors), *rest)

        monkeypatch.setattr(Trial, "verdicts", over)
        result = run("verify", spec, *SHORT)
        assert result.exit_code == 1
        assert said in result.stdout
        assert "tensors over the budget" in result.stdout.splitlines()[-1]
        assert not json.loads(run("verify", spec, *SHORT, "--format", "json").stdout)["ok"]


def test_verify_refuses_what_is_no_spec_with_its_line(spec: Path) -> None:
    spec.write_text(SPEC.replace("window: 4", "window: 0"))
    result = run("verify", spec)
    assert result.exit_code == 1
    assert "spec.yaml:8" in result.stderr
    assert "E" in result.stderr


def test_fuzz_says_what_it_did(spec: Path) -> None:
    result = run("fuzz", "--examples", 3, "--seed", 7, "--base", spec, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "3 examples with seed 7 on cpu" in result.stdout
    assert result.stdout.splitlines()[-1] == "every law holds"
    found = json.loads(run("fuzz", "--seconds", 1, "--base", spec, "--device", "cpu", "--format", "json").stdout)
    assert found["ok"]
    assert found["failure"] is None
    assert found["examples"] >= 1
    assert not Path("fuzz-failures").exists()


def test_fuzz_writes_a_failure_down_and_its_command_replays_it(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def windows(subject: Subject) -> Iterator[Broken]:
        if any(getattr(layer.policy, "pattern", None) for layer in subject.spec.resolved_layers):
            yield Broken("kernels", "layers.0", "planted")

    monkeypatch.setattr(fuzzing, "LAWS", {"kernels": windows})
    monkeypatch.setattr(fuzzing, "SHRINKING_SECONDS", 2.0)
    result = run("fuzz", "--examples", 5, "--seed", 0, "--base", spec, "--device", "cpu")
    assert result.exit_code == 1
    assert "kernels: layers.0: planted" in result.stdout
    [path] = Path("fuzz-failures").iterdir()
    command = shlex.split(result.stdout.splitlines()[-1])
    assert command[:2] == ["attncompiler", "fuzz"]
    again = run(*command[1:])
    assert again.exit_code == 1
    assert again.stdout.strip() == f"{path}: kernels: layers.0: planted"
    assert json.loads(run(*command[1:], "--format", "json").stdout)["broken"]["law"] == "kernels"
    monkeypatch.setattr(fuzzing, "LAWS", {})
    mended = run(*command[1:])
    assert mended.exit_code == 0
    assert mended.stdout.strip() == f"{path}: holds now"
    found = json.loads(run("fuzz", "--examples", 1, "--base", spec, "--format", "json").stdout)
    assert found["ok"], "what is written is kept out of the next run"


@pytest.mark.parametrize(
    "arguments",
    [
        ("fuzz", "--replay", "spec.yaml", "--examples", 3),
        ("fuzz", "--examples", 0),
        ("fuzz", "--seed", -1),
        ("fuzz", "--device", "tpu"),
        ("verify",),
        ("verify", "spec.yaml", "--device", "tpu"),
    ],
)
def test_usage_that_makes_no_sense_exits_with_2(spec: Path, arguments: tuple[object, ...]) -> None:
    assert run(*arguments).exit_code == 2


def test_a_file_that_fuzz_did_not_write_is_not_replayed(spec: Path) -> None:
    result = run("fuzz", "--replay", spec)
    assert result.exit_code == 1
    assert "E602" in result.stderr
