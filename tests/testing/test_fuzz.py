"""The fuzzer finds what is wrong and nothing where all is right, and what it writes down runs again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from planted import FAULTS, Fault, planted

from attncompiler.errors import SpecError, UsageError
from attncompiler.spec import ModelSpec, parse, read
from attncompiler.testing import fuzz as fuzzing
from attncompiler.testing import model_laws
from attncompiler.testing.fuzz import MARK, fuzz, record, replay
from attncompiler.testing.model_laws import Broken, Subject

EXAMPLES = 200
NAMED = ("a window off by one", "a softcap dropped", "a key mask ignored", "a scale of 1.01")
"""run by default, the rest in the slow lane"""
BASE = """
name: base
model: {vocab_size: 32, hidden_size: 16, mlp: {kind: none}}
policies: {w: {kind: attention, num_attention_heads: 2, pattern: {kind: sliding_window, window: 4}}}
layers: [{policy: w}]
"""


@pytest.fixture
def unshrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run ends with the example that first fails."""
    monkeypatch.setattr(fuzzing, "SHRINKING_SECONDS", 0.0)


@pytest.mark.usefixtures("unshrunk")
@pytest.mark.parametrize(
    "fault",
    [pytest.param(fault, id=fault.name, marks=() if fault.name in NAMED else pytest.mark.slow) for fault in FAULTS],
)
def test_a_planted_fault_is_found(fault: Fault) -> None:
    with planted(fault):
        report = fuzz(examples=EXAMPLES, seed=0)
    assert report.failure is not None, f"not found in {report.examples} examples"
    assert report.failure.broken.law in fault.laws, str(report.failure.broken)
    assert examined(report.failure.inputs) is None, "it holds without the fault"


def examined(inputs: fuzzing.Inputs) -> Broken | None:
    return fuzzing.examine(inputs)[0]


@pytest.mark.parametrize(
    "examples", [pytest.param(25, id="few"), pytest.param(EXAMPLES, id="many", marks=pytest.mark.slow)]
)
def test_nothing_is_found_where_nothing_is_planted(examples: int) -> None:
    report = fuzz(examples=examples, seed=0)
    assert report.failure is None, str(report.failure.broken)
    assert report.examples == examples
    assert report.calls > examples
    assert sum(report.mechanisms.values()) >= examples


def test_where_no_kernel_takes_fp64_the_reference_does() -> None:
    """Or a model in fp32 would be held to what it loses against itself, which is nothing."""
    spec = parse(BASE.replace("num_attention_heads", "kernel: [sdpa], num_attention_heads"))
    subject = Subject(fuzzing.Inputs(spec, 2, 20, 0, "right", (3, 0)))
    subject.__dict__["wide"] = subject.single
    assert subject.exact.dtype is torch.float64
    assert {choice.chain for choice in subject.exact.plan.policies} == {("eager",)}
    assert all(float(lost.max()) > 0 for lost in subject.truth.low_error.values())
    assert not list(model_laws.alone(subject))


def breaking(subject: Subject) -> Iterator[Broken]:
    """A law that only an empty spec keeps: it is broken where a layer has a window above 2."""
    for layer in subject.spec.resolved_layers:
        if getattr(getattr(layer.policy, "pattern", None), "window", 0) > 2 and subject.inputs.length > 1:
            yield Broken("kernels", "layers", "a window above 2")


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> ModelSpec:
    """A spec, and in the place of all laws one that most specs near to it break."""
    monkeypatch.setattr(fuzzing, "LAWS", {"kernels": breaking})
    assert fuzzing.LAWS is not model_laws.LAWS
    return parse(BASE)


def test_a_failure_is_shrunk_written_down_and_run_again(base: ModelSpec, tmp_path: Path) -> None:
    report = fuzz(base, examples=100, seed=1, folder=tmp_path)
    assert report.failure is not None
    assert report.path is not None
    smallest = report.failure.inputs
    assert smallest.length == 2
    assert [layer.policy.pattern.window for layer in smallest.spec.resolved_layers] == [3]  # type: ignore[attr-defined]
    assert not smallest.spec.resolved_layers[0].policy.sinks  # type: ignore[attr-defined]
    assert read(report.path) == smallest.spec
    assert str(replay(report.path)) == "kernels: layers: a window above 2"
    assert report.replay == f"attncompiler fuzz --replay {shlex.quote(str(report.path))}"
    again = record(report.failure, tmp_path, seed=1, device="cpu")
    assert again != report.path, "what is there already is kept"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is drawn, under no law."""
    found: list[str] = []

    def look(subject: Subject) -> Iterator[Broken]:
        found.append(repr((subject.spec, subject.inputs)))
        yield from ()

    monkeypatch.setattr(fuzzing, "LAWS", {"kernels": look})
    return found


def test_the_same_seed_draws_the_same_and_another_does_not(seen: list[str]) -> None:
    for chosen in (5, 5, 6):
        fuzz(examples=20, seed=chosen)
    assert seen[:20] == seen[20:40]
    assert len(set(seen[:20]) & set(seen[40:])) < 3


def test_examples_are_counted_once_and_time_ends_a_run(seen: list[str]) -> None:
    assert fuzz(examples=60, seed=2).examples == 60
    assert len(set(seen)) == len(seen) == 60
    assert 0 < fuzz(seconds=1.0, seed=2).seconds < 20


def test_a_run_that_has_nothing_new_to_draw_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzing, "specs", lambda base, device: st.just(parse(BASE)))
    monkeypatch.setattr(fuzzing, "inputs_for", lambda spec: st.just(fuzzing.Inputs(spec)))
    monkeypatch.setattr(fuzzing, "LAWS", {})
    assert fuzz(examples=10**6, seed=0).examples == 1


def test_whatever_is_raised_breaks_a_law(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(subject: Subject) -> Iterator[Broken]:
        raise ZeroDivisionError("by nothing")
        yield

    monkeypatch.setattr(fuzzing, "LAWS", {"kernels": failing})
    broken = examined(fuzzing.Inputs(parse(BASE)))
    assert broken is not None
    assert broken.law == "runs"
    assert "ZeroDivisionError in test_fuzz.py:failing: by nothing" in str(broken)


@pytest.mark.parametrize(
    ("line", "error", "said"),
    [
        ("", UsageError, "E602"),
        (f"{MARK}{{", SpecError, "E003"),
        (f"{MARK}{json.dumps({'law': 'kernels', 'device': 'cpu', 'inputs': {'size': 3}})}", SpecError, "E003"),
    ],
)
def test_a_file_that_is_no_failure_is_refused(
    line: str, error: type[Exception], said: str, base: ModelSpec, tmp_path: Path
) -> None:
    path = tmp_path / "failure.yaml"
    path.write_text(f"{line}\n{BASE}")
    with pytest.raises(error, match=said):
        replay(path)
