"""First weights, ties, parameter groups, and building without memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import ENCODERS, MIXERS, model, spec, tokens

import attncompiler
from attncompiler.emit.weights import materialise, own_tensors
from attncompiler.errors import UsageError
from attncompiler.pipeline import build

HYBRID = tuple(MIXERS.values())
UNDECAYED = ("bias", "A_log", ".D", "norm.weight", "sinks")


def test_weights_are_the_same_from_meta_and_depend_on_seed_and_name_alone() -> None:
    built = model(*HYBRID)
    later = build(spec(*HYBRID), device="meta")
    assert {p.device.type for p in later.parameters()} == {"meta"}
    materialise(later, 0, torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(built.state_dict().values(), later.state_dict().values(), strict=True))
    other = model(*HYBRID, extra="seed: 1")
    assert not torch.equal(other.embed_tokens.weight, built.embed_tokens.weight)
    first, second = built.layers["0"].mixer.q_proj.weight, built.layers["1"].mixer.q_proj.weight
    assert not torch.equal(first, second)
    shorter = model(*HYBRID, layers=1)
    assert torch.equal(shorter.layers["0"].mixer.q_proj.weight, first)


def test_the_scale_of_first_weights() -> None:
    built = model(MIXERS["attention"])
    flat = torch.cat([m.weight.flatten() for m in built.modules() if isinstance(m, torch.nn.Linear)])
    assert abs(flat.std() - 0.02) < 0.001
    assert all((m.bias == 0).all() for m in built.modules() if isinstance(m, torch.nn.Linear) and m.bias is not None)
    assert (built.norm.weight == 1).all()


def test_state_space_parameters_start_as_published_and_stay_in_fp32() -> None:
    built = build(spec(MIXERS["mamba"], MIXERS["mamba2"]), device="cpu", dtype=torch.bfloat16)
    mamba, mamba2 = built.layers["0"].mixer, built.layers["2"].mixer
    assert mamba.in_proj.weight.dtype == torch.bfloat16
    for tensor in (mamba.A_log, mamba.D, mamba2.A_log, mamba2.D, mamba2.dt_bias):
        assert tensor.dtype == torch.float32
    torch.testing.assert_close(mamba.A_log.exp(), torch.arange(1.0, 5.0).expand(64, 4))
    torch.testing.assert_close(mamba2.A_log.exp(), torch.arange(1.0, mamba2.A_log.shape[0] + 1))
    steps = torch.nn.functional.softplus(mamba2.dt_bias)
    assert steps.min() >= 0.9e-4
    assert steps.max() <= 0.11
    assert built.loss(tokens(), tokens()).isfinite()


def test_parameter_groups_hold_every_parameter_once() -> None:
    for policies in (HYBRID, tuple(ENCODERS.values())):
        built = model(*policies)
        decayed, rest = attncompiler.param_groups(built, 0.1)
        assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
        ids = [id(p) for group in (decayed, rest) for p in group["params"]]
        assert sorted(ids) == sorted(id(p) for p in built.parameters())
        names = {id(p): name for name, p in built.named_parameters()}
        for p in decayed["params"]:
            assert not names[id(p)].endswith(UNDECAYED), names[id(p)]
        for p in rest["params"]:
            assert names[id(p)].endswith(UNDECAYED), names[id(p)]


def test_own_tensors_counts_ties_once() -> None:
    built = model(MIXERS["attention"])
    names = [name for name, *_ in own_tensors(built)]
    assert "embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_a_model_on_meta_runs_without_storage() -> None:
    built = build(spec(*HYBRID), device="meta")
    out = built(torch.zeros(2, 9, dtype=torch.int64, device="meta"))
    assert out.shape == (2, 9, 64)
    assert out.device.type == "meta"
    tokens = torch.zeros(2, 9, dtype=torch.int64, device="meta")
    loss = built.loss(tokens, tokens)
    loss.backward()
    assert (loss.shape, loss.device.type) == ((), "meta")


def test_weights_without_room_are_a_coded_error() -> None:
    overrides = ("model.vocab_size=2147483647", "model.hidden_size=524288")
    with pytest.raises(UsageError, match=r"E604 cpu has no room for the weights: they take \d+\.\d GiB"):
        build(Path(__file__).parents[2] / "specs" / "mamba_tiny.yaml", device="cpu", overrides=overrides)


def test_a_dtype_given_to_load_is_the_models_its_plans_and_its_specs(tmp_path: Path) -> None:
    built = model(*HYBRID, layers=1)
    attncompiler.save(built, tmp_path / "m")
    loaded = attncompiler.load(tmp_path / "m", device="cpu", dtype=torch.bfloat16)
    assert (loaded.spec.model.dtype, loaded.plan.dtype) == ("bfloat16", "bfloat16")
    assert loaded.norm.weight.dtype == torch.bfloat16
    assert {layer.mixer.dt_proj.bias.dtype for layer in loaded.layers.values() if hasattr(layer.mixer, "dt_proj")} == {
        torch.float32
    }
