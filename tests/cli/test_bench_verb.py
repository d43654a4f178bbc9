"""The verb `bench`: what it prints, what it keeps, and what plans make of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import SPEC, run

from attncompiler.bench.attention import rows
from attncompiler.measured import store
from attncompiler.runtime import dispatch
from attncompiler.targets.detect import detect_target

ROWS = (
    rows.Row("causal", "tiny", T=32, H=2, D=8),
    rows.Row("sparse", "tiny-window", T=64, H=2, D=8, pattern={"kind": "sliding_window", "window": 4}),
    rows.Row("decode", "tiny", B=2, T=1, S=32, H=4, K=2, D=8),
    rows.Row("documents", "tiny-packed", T=32, H=2, D=8, layout="packed", lengths=(20, 12)),
)


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of one's own tables, empty; the rows of a CPU are tiny; the current folder has a spec."""
    from attncompiler.bench.attention import bench

    def forget() -> None:
        store._entries.cache_clear()
        dispatch._decided.clear()

    monkeypatch.chdir(tmp_path)
    Path("spec.yaml").write_text(SPEC)
    monkeypatch.setattr(bench, "CPU", ROWS)
    monkeypatch.setattr(store, "folder", lambda: tmp_path / "own")
    forget()
    yield tmp_path / "own"
    forget()


def bench(*arguments: object) -> str:
    result = run("bench", "attention", "--device", "cpu", "--repeats", "2", *arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def data(*arguments: object) -> dict[str, Any]:
    return json.loads(bench(*arguments, "--format", "json"))


def test_a_table_for_each_group_with_members_and_the_peer(own: Path) -> None:
    text = bench("--peers")
    for words in ("causal: GFLOP/s, forward / forward + backward", "decode: GB/s, forward", "of best member", "SDPA"):
        assert words in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("!")) <= 120
    assert not own.exists()
    assert "SDPA" not in bench("--rows", "causal")


def test_everything_for_machines() -> None:
    found = data("--peers", "--dtype", "bfloat16")
    here = detect_target("cpu")
    assert (found["target"], found["device"], found["dtype"]) == ("cpu", here.title, "bfloat16")
    assert found["versions"]["torch"] == torch.__version__
    assert found["copy_bytes_per_second"] > 0
    assert [row["row"] for row in found["rows"]] == [row.id for row in ROWS]
    for row in found["rows"]:
        assert row["planned"] == row["chain"][0]
        planned = row["cells"][row["planned"]]
        assert planned["forward"]["flops_per_second"] == row["forward_flops"] / planned["forward"]["seconds"]
        assert row["planned_over"]["best_member"]["forward"] <= 1
        assert row["cells"]["SDPA"]["role"] == "peer"
    assert found["saved"] is None
    assert data("--rows", "causal")["copy_bytes_per_second"] is None


def test_only_those_that_are_named_and_the_planned_kernel_are_timed() -> None:
    for row in data("--rows", "causal", "--rows", "decode", "--only", "eager", "--only", "SDPA")["rows"]:
        assert row["cells"].keys() == {row["planned"], "eager", "SDPA"}
    text = bench("--rows", "causal", "--only", "chunkwise")
    assert "SDPA" not in text
    assert "eager" not in text


def test_what_is_saved_is_merged_and_orders_the_plans_of_this_machine(own: Path) -> None:
    here = detect_target("cpu")
    text = bench("--rows", "causal", "--rows", "sparse", "--save")
    assert f"saved to {own / 'cpu.json'}" in " ".join(text.split())
    assert data("--rows", "decode", "--rows", "documents", "--save")["saved"] == str(own / "cpu.json")
    store._entries.cache_clear()
    entries = store.entries(here, here=True)
    assert {(entry.bucket.kind, entry.bucket.step) for entry in entries} == {
        ("causal", False),
        ("sliding_window", False),
        ("causal", True),
    }
    said = run("build", "spec.yaml", "--device", "cpu").stdout
    assert "order of" in said
    assert "measured on" in said
    assert f"{here.title}, {entries[0].run.date}: sliding_window in float32" in " ".join(said.split())
    assert "measured on" not in run("explain", "spec.yaml").stdout, "listed targets are no machine"


def test_explain_says_what_a_table_of_the_package_was_measured_on(monkeypatch: pytest.MonkeyPatch, own: Path) -> None:
    bench("--rows", "sparse", "--save", "--tables", "package")
    assert not own.exists()
    monkeypatch.setattr(store, "_tables", lambda: Path("package").absolute())
    store._entries.cache_clear()
    text = run("explain", "spec.yaml").stdout
    assert text.count("measured on") == 1
    assert f"near {detect_target('cpu').title}" in " ".join(text.split())
    run("build", "spec.yaml", "--device", "cpu")
    assert "Measured orders" in Path("build/small/report.html").read_text()


def test_a_table_of_nobody_is_left_as_it_is(own: Path) -> None:
    own.mkdir()
    (own / "cpu.json").write_text("{}")
    for arguments in (("bench", "attention", "--device", "cpu", "--rows", "causal", "--save"), ("build", "spec.yaml")):
        result = run(*arguments)
        assert result.exit_code == 1
        assert f"{own / 'cpu.json'}: E605" in result.stderr
    assert (own / "cpu.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("E602 no row is named 'x'; there are causal/tiny", ("--device", "cpu", "--rows", "x")),
        ("E602 --tables says where", ("--device", "cpu", "--tables", "here")),
        ("E602 --save keeps what all", ("--device", "cpu", "--save", "--only", "sdpa")),
        ("E602 no kernel or peer is named 'FA3'; there are sdpa", ("--device", "cpu", "--only", "FA3")),
        ("E107 torch sees no 'cuda' device", ("--device", "cuda")),
        ("E107 torch sees no 'cuda' device", ("--device", "cuda:7")),
    ],
)
def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch, code: str, arguments: tuple[str, ...]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for form in ((), ("--format", "json")):
        result = run("bench", "attention", *arguments, *form)
        assert result.exit_code == 1
        assert result.stderr.startswith(code)


@pytest.mark.parametrize("arguments", [("nothing",), ("attention", "--repeats", "0"), ("attention", "--dtype", "int8")])
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...]) -> None:
    assert run("bench", *arguments).exit_code == 2


def test_a_device_that_is_lost_is_an_error_after_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from attncompiler.bench.attention import bench
    from attncompiler.bench.device import Clock
    from attncompiler.bench.grid.contestants import Contestant

    def fail(inputs: object) -> Any:
        raise RuntimeError("an illegal access")

    failing = replace(bench.BENCH, members=lambda *_: (Contestant("sdpa", "member", fail),))
    monkeypatch.setattr(bench, "BENCH", failing)
    monkeypatch.setattr(Clock, "lost", lambda self: "an illegal access")
    result = run("bench", "attention", "--device", "cpu")
    assert result.exit_code == 1
    assert "causal/tiny: an illegal access" in result.stderr
    assert "E504" in result.stderr
    assert "RuntimeError: an illegal access" in result.stdout


@pytest.mark.parametrize("form", ["text", "json"])
def test_an_interrupted_run_prints_and_keeps_what_it_measured(
    own: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    from attncompiler.bench.grid import run as running

    measure = running.measure

    def interrupted(bench: Any, row: rows.Row, *arguments: Any) -> Any:
        if row is ROWS[2]:
            raise KeyboardInterrupt
        return measure(bench, row, *arguments)

    monkeypatch.setattr(running, "measure", interrupted)
    result = run("bench", "attention", "--device", "cpu", "--repeats", "2", "--save", "--format", form)
    assert result.exit_code == 130
    if form == "json":
        assert [row["row"] for row in json.loads(result.stdout)["rows"]] == ["causal/tiny", "sparse/tiny-window"]
    else:
        assert "tiny-window" in result.stdout
        assert "decode" not in result.stdout
    assert len(list(own.glob("*.json"))) == 1
