"""The training example at a tiny size: it learns, dies, resumes, and refuses to resume another run."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from scripts import load_example
from typer.testing import CliRunner

import attncompiler

SPEC = """
spec_version: 1
name: tiny
model:
  vocab_size: 256
  hidden_size: 32
  mlp: {kind: gated, intermediate_size: 64}
policies:
  full: {kind: attention, num_attention_heads: 2, pattern: {kind: causal}, rope_parameters: {rope_theta: 10000.0}}
  ssm: {kind: mamba2, state_size: 8, head_dim: 16, expand: 2, chunk_size: 16}
layers:
  - {policy: ssm, mlp: {kind: none}}
  - {policy: full}
targets: [cpu]
"""
ARGUMENTS = ["--batch-size", "2", "--seq-len", "32", "--eval-windows", "4", "--max-files", "40", "--warmup", "2"]


@pytest.fixture(scope="module")
def train_lm() -> ModuleType:
    return load_example("train_lm")


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(SPEC)
    return path


def run(train_lm: ModuleType, *arguments: object) -> Any:
    app = typer.Typer()
    app.command()(train_lm.main)
    return CliRunner().invoke(app, [*map(str, arguments), *ARGUMENTS])


def losses(folder: Path) -> list[float]:
    return [point["loss"] for point in json.loads((folder / "loss.json").read_text())["train"]]


def test_training_learns_and_leaves_a_model_and_a_log(train_lm: ModuleType, spec: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = run(train_lm, spec, "--steps", 30, "--eval-every", 10, "--save-every", 20, "--lr", 0.01, "--out", out)
    assert result.exit_code == 0, result.output
    log = json.loads((out / "loss.json").read_text())
    assert [point["step"] for point in log["held_out"]] == [0, 10, 20, 30]
    assert [point["step"] for point in log["train"]] == list(range(1, 31))
    held_out = [point["loss"] for point in log["held_out"]]
    assert held_out[0] == pytest.approx(5.545, abs=0.2), "before training every byte is as likely: ln 256"
    assert held_out[-1] < held_out[0] - 1
    assert [path.name for path in sorted(out.iterdir())] == ["loss.json", "step-30"]
    corpus = load_example("corpus").read_standard_library(max_files=40)
    model = attncompiler.load(out / "step-30" / "model")
    assert train_lm.evaluate(model, *corpus.held_out_windows(4, 32), batch_size=2) == held_out[-1]
    input_ids, labels = corpus.all_held_out(32)
    assert log["final"] == {"bytes": labels.numel(), "loss": train_lm.evaluate(model, input_ids, labels, 16)}
    assert 0 <= len(corpus.held_out) - 1 - labels.numel() < 32
    assert log["corpus"]["bigram_loss"] == corpus.bigram_loss(input_ids, labels)


def test_a_run_that_died_resumes_with_the_losses_of_an_unbroken_one(
    train_lm: ModuleType, spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = (spec, "--steps", 8, "--eval-every", 2, "--save-every", 3)
    assert run(train_lm, *common, "--out", tmp_path / "unbroken").exit_code == 0

    evaluate, calls = train_lm.evaluate, []

    def die(*arguments: Any) -> float:
        calls.append(1)
        if len(calls) == 3:  # at step 4, one step after the checkpoint
            raise KeyboardInterrupt
        return evaluate(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(train_lm, "evaluate", die)
        assert run(train_lm, *common, "--out", tmp_path / "broken").exit_code != 0
    assert train_lm.newest_checkpoint(tmp_path / "broken").name == "step-3"
    torch.manual_seed(1)  # the order of the data must not hang on torch's own generator
    result = run(train_lm, *common, "--out", tmp_path / "broken", "--resume")
    assert result.exit_code == 0, result.output
    assert losses(tmp_path / "broken") == losses(tmp_path / "unbroken")
    logs = [json.loads((tmp_path / name / "loss.json").read_text()) for name in ("broken", "unbroken")]
    assert [(p["step"], p["loss"]) for p in logs[0]["held_out"]] == [
        (p["step"], p["loss"]) for p in logs[1]["held_out"]
    ]


def test_the_optimizer_comes_back_whole(train_lm: ModuleType, spec: Path, tmp_path: Path) -> None:
    model = attncompiler.build(spec)
    optimizer = torch.optim.AdamW(attncompiler.param_groups(model, 0.1), lr=1e-3, fused=True)
    ids = torch.randint(256, (2, 16))
    model.loss(ids, ids).backward()
    optimizer.step()
    folder = train_lm.save_checkpoint(tmp_path / "run", model, optimizer, 1, 0.0, {})
    again = attncompiler.load(folder / "model")
    restored = torch.optim.AdamW(attncompiler.param_groups(again, 0.1), lr=1e-3, fused=True)
    train_lm.restore_optimizer(restored, again, folder / "optimizer.safetensors")
    parameters = dict(again.named_parameters())
    assert len(optimizer.state) == len(parameters)
    for name, parameter in model.named_parameters():
        saved, found = optimizer.state[parameter], restored.state[parameters[name]]
        assert saved.keys() == found.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(saved[key], found[key]) for key in saved)


def test_another_run_is_not_resumed_nor_replaced(train_lm: ModuleType, spec: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(train_lm, spec, "--steps", 1, "--out", out).exit_code == 0
    before = sorted((path.relative_to(out), path.read_bytes()) for path in out.rglob("*") if path.is_file())
    replaced = run(train_lm, spec, "--steps", 1, "--out", out)
    assert replaced.exit_code == 2
    assert "--resume" in replaced.output
    for change, named in (
        (("--steps", 2, "--lr", 0.1), "--lr"),
        (("--steps", 1, "--set", "model.hidden_size=64"), "the spec"),
    ):
        refused = run(train_lm, spec, *change, "--out", out, "--resume")
        assert refused.exit_code == 2
        assert named in refused.output
    for bad in (("--steps", 1, "--minutes", 1), ("--minutes", 0), ("--steps", 0)):
        assert run(train_lm, spec, *bad, "--out", tmp_path / "other").exit_code == 2
    after = sorted((path.relative_to(out), path.read_bytes()) for path in out.rglob("*") if path.is_file())
    assert after == before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("model.vocab_size=100", "vocabulary of 256"),
        ("model.head={kind: classifier, num_labels: 3}", "not a language model"),
        ("policies.full.pattern={kind: full}", "not causal"),
    ],
)
def test_a_spec_that_cannot_predict_the_next_byte_is_refused(
    train_lm: ModuleType, spec: Path, tmp_path: Path, change: str, reason: str
) -> None:
    result = run(train_lm, spec, "--steps", 1, "--out", tmp_path / "run", "--set", change)
    assert result.exit_code != 0
    assert reason in " ".join(f"{result.output} {result.exception}".split())
    assert not (tmp_path / "run").exists()


def test_minutes_end_a_run(train_lm: ModuleType, spec: Path, tmp_path: Path) -> None:
    result = run(train_lm, spec, "--minutes", 0.05, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    log = json.loads((tmp_path / "run" / "loss.json").read_text())
    assert log["train"], "three seconds are enough for a step"
    assert log["held_out"][-1]["seconds"] < 4


def test_the_learning_rate_warms_up_and_falls(train_lm: ModuleType) -> None:
    settings = train_lm.Settings(100, None, 8, 512, 1.0, 10, 0.1, 1.0, 32, 0)
    rates = [settings.lr_at(step, settings.done(step, 0.0)) for step in range(101)]
    assert rates[0] < rates[5] < rates[9]
    assert all(a >= b for a, b in pairwise(rates[9:]))
    assert rates[100] == pytest.approx(0.05)


def test_the_plot_is_a_picture(train_lm: ModuleType, spec: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `plot`")
    assert run(train_lm, spec, "--steps", 2, "--out", tmp_path / "run").exit_code == 0
    app = typer.Typer()
    app.command()(load_example("plot_loss").main)
    result = CliRunner().invoke(app, [str(tmp_path / "run"), "--out", str(tmp_path / "curve.png")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
