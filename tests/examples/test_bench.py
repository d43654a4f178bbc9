"""The benchmarks: their statistics, and each script at a tiny size."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from attncompiler.bench import blocks, decode, hybrid, measure, report, scaling, sparse, startup, train_step
from attncompiler.errors import UsageError

TINY_HYBRID = hybrid.Hybrid(
    width=64,
    heads=4,
    head_dim=16,
    intermediate=96,
    state=16,
    ssm_head_dim=16,
    window=5,
    layers=("mamba2", "local", "full"),
)
"""whose windows end inside the sequences here"""

times = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=9)


@given(times, st.floats(0.1, 10))
def test_a_side_that_is_always_slower_by_a_factor_has_that_ratio(seconds: list[float], factor: float) -> None:
    ours = measure.Samples(tuple(seconds))
    comparison = measure.Comparison(ours, ours.scaled(factor))
    assert comparison.ratio == pytest.approx(factor)
    assert comparison.spread == pytest.approx((factor, factor))
    assert ours.fastest <= ours.median <= ours.slowest


def test_one_slow_turn_moves_the_spread_and_not_the_ratio() -> None:
    comparison = measure.Comparison(measure.Samples((1.0, 1.0, 50.0)), measure.Samples((2.0, 2.0, 2.0)))
    assert comparison.ratio == 2.0
    assert comparison.spread == (0.04, 2.0)


def test_sides_take_turns_and_every_other_turn_runs_backwards() -> None:
    calls: list[str] = []
    samples = measure.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warmup=2)
    assert calls == [*"ab", *"ab", *"ab", *"ba", *"ab"]
    assert [len(side.seconds) for side in samples.values()] == [3, 3]
    with pytest.raises(ValueError, match="at least once"):
        measure.interleave({}, 1)


def test_what_takes_longer_is_measured_as_longer() -> None:
    comparison = measure.compare(lambda: time.sleep(0.002), lambda: time.sleep(0.02), repeats=3)
    assert comparison.ratio > 2


def allocate(mebibytes: int) -> measure.Work:
    """Work that writes so much memory."""
    return lambda: torch.ones(mebibytes * 2**20, dtype=torch.uint8)


def test_peak_memory_is_that_of_the_work() -> None:
    assert 195 * 2**20 < measure.peak_bytes(allocate, (200,), small=(1,)) < 210 * 2**20


def invoke(main: object, *arguments: str) -> dict[str, object]:
    app = typer.Typer()
    app.command()(main)  # type: ignore[type-var]
    result = CliRunner().invoke(app, [*arguments, "--format", "json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


@pytest.mark.parametrize("peer", ["dense", "causal"])
def test_sparse_at_a_tiny_size(peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "peak_bytes", lambda prepare, arguments, small: 2**20)
    arguments = ("--seq-len", "64", "--peer", peer, "--repeats", "2", "--memory")
    shown = invoke(
        sparse.main, *arguments, "--pattern", "{kind: sliding_window, window: 16}", "--pattern", "{kind: full}"
    )
    assert len(shown["rows"]) == 4
    for row in shown["rows"]:
        assert row["times faster"] == row["peer, ms"]["median"] / row["ours, ms"]["median"]
        assert row[f"{peer}, MiB"] == 1.0
    assert shown["rows"][0]["density, %"] == 100 * sum(min(i + 1, 16) for i in range(64)) / 64**2
    assert shown["rows"][3]["density, %"] == 100


@pytest.mark.parametrize("pattern", sparse.PATTERNS, ids=lambda pattern: pattern["kind"])
def test_both_sides_of_sparse_compute_the_same_function(
    pattern: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(sparse, "_clear", lambda q, *rest: seen.append(q.grad))
    sparse.ours(300, json.dumps(pattern), True)()
    sparse.dense(300, json.dumps(pattern), True)()
    torch.testing.assert_close(seen[0], seen[1].transpose(1, 2))


def test_the_causal_peer_is_causal_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(sparse, "_clear", lambda q, *rest: seen.append(q.grad))
    sparse.ours(100, json.dumps({"kind": "causal"}), True)()
    sparse.causal(100, json.dumps({"kind": "sliding_window", "window": 4}), True)()
    torch.testing.assert_close(seen[0], seen[1].transpose(1, 2))


def test_blocks_at_a_small_size() -> None:
    window = "{kind: sliding_window, window: 256}"
    [found] = invoke(blocks.main, "--seq-len", str(2**15), "--pattern", window, "--repeats", "1")["rows"]
    assert found["pattern"] == "sliding_window window 256"
    # of each block of 128 queries its own, the block before and the one the window begins in
    assert found["tiles"] == 3 * 2**8 - 3
    assert found["MiB"] < 64  # a mask of all pairs has 1024


def test_decode_at_a_tiny_size() -> None:
    """Far against near; against HF it also checks that both sides say the same tokens."""
    arguments = ("--new-tokens", "4", "--repeats", "2", "--position", "3", "--position", "9")
    shown = invoke(decode.main, "--only", "positions", *arguments)
    near, far = shown["rows"]
    assert (near["position"], far["position"]) == (3, 9)
    assert far["of that at 3"] == pytest.approx(near["a token, ms"]["median"] / far["a token, ms"]["median"])


def test_decode_against_its_peer_at_a_tiny_size() -> None:
    pytest.importorskip("transformers", reason="needs the extra `hf`")
    shown = invoke(decode.main, "--only", "peer", "--prompt", "5", "--new-tokens", "6", "--repeats", "1")
    (row,) = shown["rows"]
    assert row["times faster"] == row["peer, ms"]["median"] / row["ours, ms"]["median"]


@pytest.mark.parametrize("mixer", sorted(scaling.MIXERS))
def test_scaling_at_a_tiny_size(mixer: str) -> None:
    shown = invoke(scaling.main, "--mixers", mixer, "--lengths", "32", "--lengths", "64", "--repeats", "1")
    (row,) = shown["rows"]
    medians = [row["T 32"]["median"], row["T 64"]["median"]]
    assert row["largest / smallest"] == max(medians) / min(medians)


@pytest.mark.parametrize("name", sorted(set(train_step.MODELS) - {"llama-1b", "hybrid-1b"}))
def test_a_training_step_and_its_peer_have_equal_parameters(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="needs the extra `hf`")
    monkeypatch.setitem(train_step.HYBRIDS, "hybrid", TINY_HYBRID)
    shown = invoke(train_step.main, "--models", name, "--batch-size", "1", "--seq-len", "8", "--repeats", "1")
    (row,) = shown["rows"]
    assert isinstance(row["parameters"], int), f"ours and the peer's differ: {row['parameters']}"
    assert row["against"].startswith("PyTorch alone" if name == "hybrid" else "HF transformers ")


@pytest.mark.parametrize("name", ["llama-1b", "hybrid-1b"])
def test_the_billion_parameters_of_both_sides_are_as_many(name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra `hf`")
    setting = train_step.Setting(device="meta")
    with torch.device("meta"):
        counts = {
            train_step.count(make)
            for make in (
                train_step.our_model(name, setting),
                train_step.peer_model(name, transformers, setting),
            )
        }
    (parameters,) = counts
    assert parameters == pytest.approx(1e9, rel=0.2)


@pytest.mark.parametrize("name", ["llama", "hybrid"])
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_losses_from_the_same_weights_stay_together(name: str, compile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="needs the extra `hf`")
    monkeypatch.setitem(train_step.HYBRIDS, "hybrid", TINY_HYBRID)
    arguments = ["--models", name, "--batch-size", "2", "--seq-len", "16", "--repeats", "1", "--curve", "4"]
    (row,) = invoke(train_step.main, *arguments, *["--compile"] * compile)["rows"]
    first, last = map(float, row["loss, first and last"].split(" → "))
    assert last < first
    assert float(row["apart at most"].split(" at step ")[0]) < 1e-4
    assert "ours, the peer from fp32" not in row  # both are


def test_losses_of_16_bits_are_held_to_those_in_fp32() -> None:
    pytest.importorskip("transformers", reason="needs the extra `hf`")
    arguments = ["--models", "llama", "--batch-size", "2", "--seq-len", "16", "--repeats", "1", "--curve", "4"]
    (row,) = invoke(train_step.main, *arguments, "--dtype", "bfloat16")["rows"]
    ours, peer = (float(each.split(" at step ")[0]) for each in row["ours, the peer from fp32"].split(", "))
    assert 0 < ours < 0.1
    assert 0 < peer < 0.1


def test_the_curve_in_fp32_is_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra `hf`")
    shape, *rest = train_step.MIXERS["llama"]
    monkeypatch.setitem(train_step.MIXERS, "llama", (replace(shape, kv_heads=2), *rest))
    setting = train_step.Setting(2, 64, curve=4)
    model = train_step.peer_model("llama", transformers, setting)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens = torch.randint(shape.vocabulary, (2, 65), generator=torch.Generator().manual_seed(0))
    input_ids, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    step = train_step.training_step(model, lambda: model(input_ids=input_ids, labels=labels, shift_labels=labels).loss)
    expected = train_step.losses_of(step, setting.curve)
    found = train_step.curve_in_fp32("llama", transformers, setting, weights, input_ids, labels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert found[-1] < found[0]


def test_losses_of_other_models_are_not_compared() -> None:
    pytest.importorskip("transformers", reason="needs the extra `hf`")
    app = typer.Typer()
    app.command()(train_step.main)
    shown = CliRunner().invoke(app, ["--models", "mamba2", "--curve", "1"])
    assert shown.exit_code == 2
    assert "name them with --models" in shown.output


# --- the hybrid's peer on the libraries' kernels ----------------------------------------------------------------------


def ssd_inputs() -> tuple[torch.Tensor, ...]:
    """x, dt, A, B, C, D, dt_bias with gradients; x, B and C are parts of one tensor, as in a mixer."""
    generator = torch.Generator().manual_seed(0)
    mixed, dt = (torch.randn(2, 9, width, generator=generator, requires_grad=True) for width in (24, 4))
    x, B, C = mixed.split((12, 6, 6), -1)
    A, D, bias = (torch.randn(4, generator=generator, requires_grad=True) for _ in range(3))
    return x.unflatten(-1, (4, 3)), dt, -A.exp(), B[:, :, None], C[:, :, None], D, bias


def test_mamba_ssms_passes_are_one_operator_with_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="needs the extra `hf`")
    inputs = ssd_inputs()
    expected = hybrid.kernels("cpu").scan(*inputs)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(expected, inputs, grad, retain_graph=True)

    def check(given: tuple[Any, ...], more: dict[str, Any]) -> None:
        *given, chunk = given
        assert (chunk, more.pop("dt_softplus")) == (hybrid.CHUNK, True)
        assert all(map(torch.equal, [*given, more.pop("D"), more.pop("dt_bias")], inputs))
        assert not more

    def forward(*given: Any, **more: Any) -> Any:
        check(given, more)
        return expected.detach().clone(), None

    def backward(found: Any, *given: Any, **more: Any) -> Any:
        *tensors, out, chunk = given
        check((*tensors, chunk), more)
        assert torch.equal(found, grad)
        assert torch.equal(out, expected)
        dx, ddt, dA, dB, dC, dD, ddt_bias = (each.clone() for each in wanted)
        return dx, ddt, dA, dB, dC, dD, None, ddt_bias, None

    passes = {"_mamba_chunk_scan_combined_fwd": forward, "_mamba_chunk_scan_combined_bwd": backward}
    monkeypatch.setattr(hybrid, "_ssd", passes.__getitem__)
    monkeypatch.setattr(hybrid.importlib.util, "find_spec", lambda name: True if name == "mamba_ssm" else None)
    run = hybrid.kernels("cuda")
    assert run.name == "PyTorch, mamba-ssm, torch's conv1d"
    out = run.scan(*inputs)
    assert torch.equal(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out, inputs, grad), wanted)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(hybrid.mamba_ssm, inputs, test_utils=tests)
    plain = tuple(each.detach() for each in (grad, expected, *inputs))
    torch.library.opcheck(hybrid.mamba_ssm_backward, plain, test_utils=tests[:2])


def test_on_a_gpu_nothing_stands_for_mamba_ssm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hybrid.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"E602.*runs on mamba-ssm.*\n?.*pip install mamba-ssm"):
        hybrid.kernels("cuda")
    seen: list[Any] = []

    def causal_conv1d_fn(x: Any, weight: Any, bias: Any, activation: str) -> Any:
        seen.append((tuple(x.shape), activation))
        return x

    conv1d = SimpleNamespace(causal_conv1d_fn=causal_conv1d_fn)
    monkeypatch.setattr(hybrid.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "causal_conv1d", conv1d)
    run = hybrid.kernels("cuda")
    assert run.name == "PyTorch, mamba-ssm, causal-conv1d"
    assert run.convolution(torch.zeros(2, 5, 3), torch.zeros(3, 4), None).shape == (2, 5, 3)
    assert seen == [((2, 3, 5), "silu")]


def test_a_peer_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_step.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"E602.*\n?.*attncompiler\[hf\]"):
        train_step.import_transformers()


def test_a_command_is_timed_and_its_failure_is_told() -> None:
    seconds, peak = startup.run([sys.executable, "-c", "import time; time.sleep(0.2)"])
    assert 0.2 < seconds < 10
    assert 2**20 < peak < 2**30
    with pytest.raises(RuntimeError, match="no such thing"):
        startup.run([sys.executable, "-c", "raise SystemExit('no such thing')"])


@pytest.mark.slow
def test_startup_of_a_small_spec(tmp_path: Path) -> None:
    spec = str(Path(__file__).parents[2] / "specs" / "llama_tiny.yaml")
    small = spec.replace("llama", "linear")
    shown = invoke(startup.main, "--large", spec, "--small", small, "--repeats", "1")
    assert [row["command"].split()[0] for row in shown["rows"]] == ["build", "check", "check"]


def test_text_and_json_tell_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"case": "x", "time": measure.Samples((1.0, 3.0, 2.0)), "pair": (1, 2)}
    report.show("title", [row], report.Format.text)
    assert "2 (1–3)" in capsys.readouterr().out
    report.show("title", [row], report.Format.json)
    (plain,) = json.loads(capsys.readouterr().out)["rows"]
    assert plain["time"]["median"] == 2.0
    assert plain["pair"] == [1, 2]


def test_benchmarks_import_without_their_peers() -> None:
    modules = ("train_step", "decode", "attention.bench", "linear.bench", "mamba.bench")
    code = (
        f"import sys, {', '.join(f'attncompiler.bench.{module}' for module in modules)}\n"
        "sys.exit(bool({'transformers', 'flash_attn', 'fla', 'mamba_ssm'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
