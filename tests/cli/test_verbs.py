"""What each verb prints and writes."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cli_runner import ROOT, SPEC, fresh, run

import attncompiler
from attncompiler import targets
from attncompiler.cli import output
from attncompiler.errors import CATALOGUE
from attncompiler.mechanisms.base import discover
from attncompiler.planning import planner

SPECS = sorted((ROOT / "specs").glob("*.yaml"))


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("spec.yaml").write_text(SPEC)
    return Path("spec.yaml")


def good(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_check_passes_every_spec(path: Path) -> None:
    assert "fine" in good("check", path)


def test_check_for_machines(spec: Path) -> None:
    data = json.loads(good("check", spec, "--format", "json"))
    assert data == {"ok": True, "spec": "spec.yaml", "layers": 2, "targets": ["h200", "cpu"]}
    assert good("check", spec, "--format", "github") == ""


def test_check_and_help_are_quick_and_import_no_torch() -> None:
    """The time is checked loosely, as machines differ: 0.4 s is asked for, and importing torch alone takes longer."""
    code = "import sys; from attncompiler.cli import app; app(standalone_mode=False); print(sorted(sys.modules))"
    for arguments in (["--help"], ["check", str(ROOT / "specs" / "llama_tiny.yaml")]):
        times = []
        for _ in range(3):
            start = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
            times.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
        loaded = done.stdout.splitlines()[-1]
        assert not [name for name in ("torch", "numpy", "hypothesis", "rich.table") if f"'{name}'" in loaded]
        assert min(times) < 1.5


@pytest.mark.parametrize(
    "arguments", [(), ("--help",), *((verb, "--help") for verb in ("build", "check", "list"))], ids=" ".join
)
def test_help_is_there(arguments: tuple[str, ...]) -> None:
    assert "Usage:" in run(*arguments).output


def test_the_version_is_that_of_the_package() -> None:
    assert good("--version") == f"attncompiler {attncompiler.__version__}\n"


# --- build ----------------------------------------------------------------------------------------------------------


def test_build_for_machines_that_are_elsewhere_writes_no_weights(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec.write_text(SPEC.replace("num_attention_heads: 2,", "num_attention_heads: 2, kernel: chunkwise,"))
    attention = discover()["attention"]
    kernels = [replace(k, needs=replace(k.needs, packages={"fast": "pip install fast"})) for k in attention.kernels]
    changed = {"attention": replace(attention, kernels=tuple(kernels))}
    monkeypatch.setattr(planner, "discover", lambda: changed)
    text = good("build", spec, "--device", "cpu")
    assert "emitted for h200" in text
    assert "this machine cannot serve it: plans and spec were written, without weights, to be loaded there" in text
    assert Path("build/small/plan.json").exists()
    assert not list(Path("build/small").glob("*.safetensors*"))


def test_build_writes_an_artifact_and_says_how_to_load_it(spec: Path) -> None:
    text = good("build", spec, "--device", "cpu")
    assert "small: 2 layers" in text
    assert "0-1" in text
    assert "chunkwise, sdpa, eager" in text
    assert "planned for h200, cpu; emitted for cpu" in text
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    assert lines == [
        "import attncompiler",
        'model = attncompiler.load("build/small")',
        "loss = model.loss(input_ids, labels)",
    ]
    input_ids = torch.randint(31, (2, 5))
    loss = attncompiler.load("build/small", device="cpu").loss(input_ids, input_ids)
    assert torch.isfinite(loss)
    assert good("build", spec, "--device", "cpu") == text


def test_build_here_says_that_listed_gpus_are_not_at_hand(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no other device is at hand: this model was emitted for the cpu" in good("build", spec)
    assert "at hand" not in good("build", spec, "--device", "cpu")
    assert "at hand" not in good("build", spec, "--set", "targets=[cpu]")


def test_build_for_machines_and_with_every_option(spec: Path) -> None:
    arguments = ("--device", "cpu", "--dtype", "bfloat16", "--set", "seed=5", "--set", "name=other", "--out", "deep/er")
    data = json.loads(good("build", spec, *arguments, "--format", "json"))
    assert data["path"] == "deep/er"
    assert data["target"] == "cpu"
    assert data["layers"][0]["count"] == 2
    model = attncompiler.load("deep/er", device="cpu")
    assert data["model"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert (model.spec.name, model.spec.seed) == ("other", 5)
    assert model.norm.weight.dtype == torch.bfloat16


def test_build_for_a_target_on_meta_writes_no_weights(spec: Path) -> None:
    assert "emitted for h200" in good("build", spec, "--device", "meta", "--target", "h200")
    assert not list(Path("build/small").glob("*.safetensors"))
    model = attncompiler.load("build/small", device="cpu")
    drawn = attncompiler.build(spec, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), drawn.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.head={kind: none}", "hidden = model(input_ids)"),
        ("model.head={kind: classifier, num_labels: 2}", "loss = model.loss(input_ids, labels)"),
    ],
)
def test_the_last_line_fits_the_head(spec: Path, override: str, line: str) -> None:
    assert line in good("build", spec, "--device", "cpu", "--set", override)


# --- explain --------------------------------------------------------------------------------------------------------


def test_explain_says_chains_refusals_and_whether_training_fits(spec: Path) -> None:
    text = good("explain", spec)
    for words in (
        "small on h200",
        "small on cpu",
        "chunkwise, eager",
        "host is not built",
        "training             fits",
    ):
        assert words in text
    assert "small on cpu" not in good("explain", spec, "--target", "t4", "--target", "l4")


def test_explain_says_what_share_of_all_pairs_a_layer_sees(spec: Path) -> None:
    """Ten tokens that see four each, but for the first three: 34 of 100 pairs."""
    assert re.search(r"sliding_window,\s.*\b34%", good("explain", spec, "--seq-len", 10), re.DOTALL)


def test_explain_for_machines(spec: Path) -> None:
    data = json.loads(good("explain", spec, "--target", "a6000", "--batch", 3, "--seq-len", 128, "--format", "json"))
    assert list(data) == ["a6000"]
    assert (data["a6000"]["batch"], data["a6000"]["seq_len"]) == (3, 128)
    assert data == json.loads(json.dumps(attncompiler.explain(spec, target="a6000", batch=3, seq_len=128)))


def test_the_13b_hybrid_is_explained_on_one_screen() -> None:
    text = good("explain", ROOT / "specs" / "hybrid_13b.yaml", "--target", "a6000")
    lines = text.splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 120
    assert "devices under FSDP" in " ".join(text.split())


# --- list, schema, info ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["mechanisms", "kernels", "patterns", "targets", "errors"])
def test_list_for_people_and_machines_says_the_same(what: str) -> None:
    rows = json.loads(good("list", what, "--format", "json"))
    text = good("list", what)
    first = next(iter(rows[0]))
    assert all(row[first] in text for row in rows)


def test_lists_are_complete() -> None:
    def column(what: str, name: str) -> list[str]:
        return [row[name] for row in json.loads(good("list", what, "--format", "json"))]

    assert column("mechanisms", "mechanism") == list(discover())
    assert column("kernels", "kernel") == [name for mechanism in discover().values() for name in mechanism.names]
    assert column("targets", "target") == list(targets.names())
    assert column("errors", "code") == list(CATALOGUE)
    kinds = {"full", "causal", "sliding_window", "strided", "local_global", "random", "chunked"}
    assert set(column("patterns", "pattern")) == kinds


def test_schema_is_printed_and_written(spec: Path) -> None:
    printed = json.loads(good("schema"))
    assert printed["$schema"].startswith("http://json-schema.org/draft-07")
    good("schema", "--out", "schema.json")
    assert json.loads(Path("schema.json").read_text()) == printed


def test_info_knows_this_machine() -> None:
    data = json.loads(good("info", "--format", "json"))
    assert data["packages"]["torch"] == importlib.metadata.version("torch")
    assert data["target"]["memory_bytes"] > 0
    assert set(data["extras"]) == {"gpu", "fa4", "hf", "plot"}
    assert data["packages"]["torch"] in good("info")


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -c 'from attncompiler.cli import main; main()' list errors | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert "Traceback" not in done.stderr


def test_a_build_in_a_pipe_is_quiet(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(SPEC)
    done = fresh("build", "spec.yaml", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout


def test_a_terminal_sees_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with output.progress("checking [b]spec[/b]") as stage:
        stage("writing")
    assert "writing" in capsys.readouterr().err
