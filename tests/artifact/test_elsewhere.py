"""A spec that only another machine can serve: built here without weights, refused here in words, loaded there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact_models import SPEC

import attncompiler
from attncompiler import artifact, pipeline
from attncompiler import spec as specs
from attncompiler.errors import PlanError
from attncompiler.mechanisms.base import discover
from attncompiler.planning import planner
from attncompiler.spec.model import ModelSpec
from attncompiler.targets.detect import Environment

TOKENS = torch.arange(12).reshape(1, 12)


def demanding(targets: str) -> ModelSpec:
    """The small spec, one of whose policies demands `chunkwise`."""
    written = SPEC.replace("attention_bias: qkv", "attention_bias: qkv, kernel: chunkwise")
    return specs.parse(written.replace("[h200, cpu]", targets))


def need(monkeypatch: pytest.MonkeyPatch, **needs: Any) -> None:
    """Attention whose kernel `chunkwise` needs this too."""
    attention = discover()["attention"]
    kernels = tuple(
        replace(kernel, needs=replace(kernel.needs, **needs)) if kernel.name == "chunkwise" else kernel
        for kernel in attention.kernels
    )
    changed = {**discover(), "attention": replace(attention, kernels=kernels)}
    monkeypatch.setattr(planner, "discover", lambda: changed)


def written_without_weights(spec: ModelSpec, path: Path) -> None:
    """By `build` with `elsewhere`, for the first listed target; without it, and by `load`, E202."""
    with pytest.raises(PlanError, match=r"E202 policy 'far'"):
        attncompiler.build(spec, device="cpu")
    built = attncompiler.build(spec, elsewhere=True, device="cpu")
    assert {p.device.type for p in built.parameters()} == {"meta"}
    assert (built.plan.target.name, built.plan.here) == ("h200", False)
    attncompiler.save(built, path)
    assert not list(path.glob("*.safetensors*"))
    stored = artifact.read(path)
    assert (stored.manifest.weights, stored.manifest.emitted_for) == ("none", "h200")
    assert (stored.spec, stored.plan, stored.plans) == (spec, built.plan, pipeline.plan(spec))
    assert list(stored.plans) == list(map(str, spec.targets))
    assert stored.plan.layers[-1].chain == ("chunkwise",)


def test_a_kernel_for_another_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec, path = demanding("[h200, a100-80]"), tmp_path / "far"
    need(monkeypatch, device_types=("cuda",))
    written_without_weights(spec, path)
    with pytest.raises(PlanError, match=r"E202 policy 'far'.*chunkwise runs on cuda only"):
        attncompiler.load(path, device="cpu")
    monkeypatch.undo()
    loaded = attncompiler.load(path, device="cpu")
    assert loaded.plan.here
    assert torch.equal(loaded(TOKENS), attncompiler.build(spec, device="cpu")(TOKENS))


def test_a_kernel_of_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec, path = demanding("[h200, cpu]"), tmp_path / "far"
    need(monkeypatch, packages={"fastest_attention": "pip install fastest-attention"})
    written_without_weights(spec, path)
    with pytest.raises(PlanError, match=r"E202 .*fastest_attention is not installed: pip install fastest-attention"):
        attncompiler.load(path, device="cpu")
    installed = Environment({"fastest_attention": "1.0"}, "3.11", "Linux")
    monkeypatch.setattr(pipeline, "detect_environment", lambda: installed)
    loaded = attncompiler.load(path, device="cpu")
    logits = loaded(TOKENS)
    assert loaded.layers["2"].mixer.site.record.calls == {("chunkwise", "forward"): 1}
    assert torch.equal(logits, attncompiler.build(spec, device="cpu")(TOKENS))


def test_what_this_machine_can_serve_is_built_here_all_the_same() -> None:
    built = attncompiler.build(demanding("[h200, cpu]"), elsewhere=True, device="cpu")
    assert built.plan.here
    assert {p.device.type for p in built.parameters()} == {"cpu"}


def test_what_no_listed_target_serves_is_refused_elsewhere_too(monkeypatch: pytest.MonkeyPatch) -> None:
    need(monkeypatch, vendor="amd")
    with pytest.raises(PlanError, match=r"E202 policy 'far'.*chunkwise needs amd hardware, h200 is nvidia"):
        attncompiler.build(demanding("[h200]"), elsewhere=True)
