"""The verbs `bench linear` and `bench mamba`."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from cli_runner import run

from attncompiler.bench.linear import bench as linear
from attncompiler.bench.linear.rows import Row
from attncompiler.bench.mamba import bench as mamba
from attncompiler.bench.mamba.rows import Duality, Scan, ScanMixer

TINY: dict[str, Any] = {"H": 2, "D": 8, "V": 8}
HEADS: dict[str, Any] = {"H": 2, "P": 4, "N": 8}
ROWS: dict[str, tuple[Any, ...]] = {
    "linear": (
        Row("elu", "tiny", T=24, **TINY),
        Row("favor", "favor4", T=24, feature_map="favor", R=4, **TINY),
        Row("favor", "elu-r4", T=24, H=2, D=4, V=8),
        Row("decode", "tiny", T=1, B=2, **TINY),
        Row("length", "t8", T=8, feature_map="identity", **TINY),
        Row("length", "t16", T=16, feature_map="identity", forward_only=True, **TINY),
    ),
    "mamba": (
        Scan("s6", "tiny", T=24, E=8, N=4),
        Duality("ssd", "tiny", T=24, **HEADS),
        ScanMixer("mixer", "tiny", T=24, M=16, N=4),
        Scan("decode", "s6", T=1, B=2, E=8, N=4),
        Duality("decode", "ssd", T=1, B=2, **HEADS),
        *(Scan("s6-length", f"t{T}", T=T, E=8, N=4) for T in (8, 16)),
    ),
}
both = pytest.mark.parametrize("verb", ROWS)


@pytest.fixture(autouse=True)
def tiny_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "CPU", ROWS["linear"])
    monkeypatch.setattr(mamba, "CPU", ROWS["mamba"])


def bench(verb: str, *arguments: object) -> str:
    result = run("bench", verb, "--device", "cpu", "--repeats", "2", *arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def data(verb: str, *arguments: object) -> dict[str, Any]:
    return json.loads(bench(verb, *arguments, "--format", "json"))


@both
def test_a_table_for_each_group_and_what_rows_are_to_one_another(verb: str) -> None:
    text = bench(verb, "--peers")
    for group in {row.group for row in ROWS[verb]} - {"decode"}:
        told = "ns a token" if "length" in group else "ms"
        assert f"{group}: {told}, forward / forward + backward" in text
    assert "decode: GB/s, forward, of states read and written; a copy moves" in text
    assert "of floor" in text
    assert "length: largest over smallest time per token: " in text
    absent = "flash-linear-attention" if verb == "linear" else "mamba-ssm"
    assert f"{absent} is not installed: pip install {absent}" in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("!")) <= 120
    assert "is not installed" not in bench(verb, "--rows", "decode")


def test_the_performer_stands_beside_the_transformer_of_an_equal_state() -> None:
    text = bench("linear", "--rows", "favor")
    assert "favor/favor4 takes, times what elu-r4 of an equal state takes: " in text
    assert "takes" not in bench("linear", "--rows", "favor/favor4")


@both
def test_everything_for_machines(verb: str) -> None:
    found = data(verb, "--peers", "--dtype", "bfloat16")
    assert (found["target"], found["dtype"], found["saved"]) == ("cpu", "bfloat16", None)
    assert [row["row"] for row in found["rows"]] == [row.id for row in ROWS[verb]]
    for shown, row in zip(found["rows"], ROWS[verb], strict=True):
        assert (shown["B"], shown["T"], shown["tokens"]) == (row.B, row.T, row.B * row.T)
        assert shown["planned"] == shown["chain"][0]
        cell = shown["cells"][shown["planned"]]
        seconds = cell["forward"]["seconds"]
        assert cell["forward"]["flops_per_second"] == shown["flops"]["forward"] / seconds
        assert cell["forward"]["bytes_per_second"] == shown["floor_bytes"]["forward"] / seconds
        assert cell["forward"]["seconds_per_token"] == seconds / shown["tokens"]
        assert shown["share_of_floor"]["forward"] == shown["copy_seconds"]["forward"] / seconds
        assert (cell["both"] is not None) == row.backward == ("both" in shown["floor_bytes"])
    assert found["comparisons"][-1]["what"].endswith("length: largest over smallest time per token")
    assert found["comparisons"][-1]["forward"] >= 1
    assert "comparisons" not in data(verb, "--rows", "decode")


def test_the_plain_form_is_a_peer_on_a_cpu() -> None:
    [row] = data("linear", "--rows", "elu", "--only", "plain")["rows"]
    assert row["cells"].keys() == {row["planned"], "plain"}
    assert row["cells"]["plain"]["both"]["seconds"] > 0
    assert row["planned_over"]["best_peer"]["both"] == pytest.approx(
        row["cells"]["plain"]["both"]["seconds"] / row["cells"][row["planned"]]["both"]["seconds"]
    )


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("E602 no row is named 'x'; there are elu/tiny", ("linear", "--device", "cpu", "--rows", "x")),
        ("E602 no row is named 'raw'; there are s6/tiny", ("mamba", "--device", "cpu", "--rows", "raw")),
        (
            "E602 no kernel or peer is named 'x'; there are chunkwise, eager, plain, fla, fla-fused",
            ("linear", "--device", "cpu", "--only", "x"),
        ),
        (
            "E602 no kernel or peer is named 'plain'; there are chunkwise, eager, mamba_ssm, hf-slow",
            ("mamba", "--device", "cpu", "--only", "plain"),
        ),
        ("E107 torch sees no 'cuda' device", ("linear", "--device", "cuda")),
        ("E107 torch sees no 'cuda' device", ("mamba", "--device", "cuda:7")),
    ],
)
def test_what_does_not_fit_is_said(code: str, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for form in ((), ("--format", "json")):
        result = run("bench", *arguments, *form)
        assert result.exit_code == 1
        assert result.stderr.startswith(code)


@both
def test_what_keeps_no_table_has_no_option_for_one(verb: str) -> None:
    assert run("bench", verb, "--save").exit_code == 2


@both
@pytest.mark.parametrize("form", ["text", "json"])
def test_an_interrupted_run_prints_what_it_measured(verb: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from attncompiler.bench.grid import run as running

    measure = running.measure

    def interrupted(bench: Any, row: Any, *arguments: Any) -> Any:
        if row is ROWS[verb][1]:
            raise KeyboardInterrupt
        return measure(bench, row, *arguments)

    monkeypatch.setattr(running, "measure", interrupted)
    result = run("bench", verb, "--device", "cpu", "--repeats", "2", "--format", form)
    assert result.exit_code == 130
    if form == "json":
        assert [row["row"] for row in json.loads(result.stdout)["rows"]] == [ROWS[verb][0].id]
    else:
        assert f"{ROWS[verb][0].group}: ms" in result.stdout
        assert "decode" not in result.stdout
