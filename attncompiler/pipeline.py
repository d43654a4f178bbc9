"""The compiler on one screen: YAML → ModelSpec → Plan → fx.GraphModule → a folder, and back.

spec  = check("model.yaml")          # every error at once, no torch
plans = plan(spec)                   # one Plan per listed target
model = build(spec)                  # a GraphModule for the machine at hand
save(model, "build/model"); model = load("build/model")
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from attncompiler import spec as specs
from attncompiler import targets
from attncompiler.errors import ArtifactError, Diagnostic, PlanError, SpecError, UsageError, fail
from attncompiler.planning import Plan
from attncompiler.planning import plan as plan_for
from attncompiler.spec.model import ModelSpec
from attncompiler.targets.detect import detect_environment, detect_target
from attncompiler.targets.target import Target

if TYPE_CHECKING:
    import torch

    from attncompiler.artifact import Artifact
    from attncompiler.emit import CompiledModel

Source = str | os.PathLike[str] | ModelSpec

MOST = 2**40
"""sequences, and tokens, that a cost is asked for: with more, products of them leave the range of floats"""


def read(source: Source, overrides: Sequence[str] | None = None) -> ModelSpec:
    """A validated spec from a path or a spec; `overrides` are "a.b=c" texts, or one such text.

    Raises SpecError with every fault.
    """
    if isinstance(overrides, str):
        overrides = (overrides,)
    if not isinstance(source, ModelSpec):
        return specs.read(Path(source), overrides=overrides or ())
    return specs.parse(specs.dump(source), overrides=overrides) if overrides else source


def check(source: Source, *, overrides: Sequence[str] | None = None) -> ModelSpec:
    """The spec, valid in itself and served on every target it lists. Imports no torch, writes nothing.

    Raises SpecError for faults of the file and PlanError where a listed target cannot serve a layer.
    """
    spec = read(source, overrides)
    plan(spec)
    return spec


def plan(source: Source, target: str | Target | None = None) -> dict[str, Plan]:
    """A Plan per listed target (or for `target` alone), by name. Does not depend on the machine it is made on.

    Raises PlanError (E201 to E203) naming every layer that cannot be served on any of the targets, and why.
    """
    spec = read(source)
    return _plans(spec, target)


def explain(
    source: Source, *, target: str | Target | None = None, batch: int = 1, seq_len: int | None = None
) -> dict[str, dict[str, Any]]:
    """Per target: chains, refusals and cost of every layer, and whether training fits. Plain data.

    It speaks of `batch` sequences of `seq_len` tokens, default 2048, or max_position_embeddings if that is less. Raises
    UsageError (E602) for sizes below 1, above `MOST` or of more tokens than the model can take, and what `plan` raises.
    """
    spec = read(source)
    from attncompiler.planning.explanation import explain as explain_plan
    from attncompiler.planning.planner import planned_length, too_long

    seq_len = planned_length(spec) if seq_len is None else seq_len
    if batch < 1 or seq_len < 1:
        raise fail(UsageError, "E602", f"batch and seq_len must be at least 1, not {batch} and {seq_len}")
    if batch > MOST or seq_len > MOST:
        raise fail(UsageError, "E602", f"batch and seq_len must be at most {MOST:,}")
    reason = too_long(spec, seq_len)
    if reason is not None:
        raise fail(UsageError, "E602", reason)
    return {name: explain_plan(spec, each) for name, each in _plans(spec, target, batch, seq_len).items()}


def build(
    source: Source,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    target: str | Target | None = None,
    overrides: Sequence[str] | None = None,
    elsewhere: bool = False,
) -> CompiledModel:
    """The spec as a torch.fx.GraphModule, with weights drawn from its seed. Writes nothing.

    It is planned for `target`, default the machine at hand, and placed on `device`: "cpu", "cuda" or "meta" (no
    weights), default where the target is, or the CPU where that is not at hand; `dtype` replaces the spec's. With
    `elsewhere` a spec that its listed targets can serve, and this machine cannot, is emitted for the first of them,
    on meta, to be saved and loaded there. Raises SpecError, and PlanError where a listed target or this machine cannot
    serve a layer.
    """
    from attncompiler.emit import emit

    spec = _in_dtype(check(source, overrides=overrides), dtype)
    device = _device(device, target)
    planned = _plan_here(spec, device, target)
    if planned.unserved(spec) and elsewhere:
        return emit(spec, plan_for(spec, _target(spec.targets[0])), device="meta")
    return emit(spec, planned.require(spec), device=device)


def save(model: CompiledModel, path: str | os.PathLike[str], *, force: bool = True) -> Path:
    """Write the model, its spec and its plans into a folder, replacing an artifact that stands there in one step.

    Raises ArtifactError (E3xx) or UsageError (E6xx), and then leaves what was there. With `force=False` trained
    weights are not replaced by initial ones (E304).
    """
    from attncompiler import artifact

    return artifact.write(model, Path(path), force=force)


def load(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    locked: bool = False,
    initialise: bool = True,
) -> CompiledModel:
    """The model of an artifact, planned again for the machine at hand. Executes nothing that the folder holds.

    With `locked` a plan that differs from the saved one is an error (E305) instead. The weights of an artifact without
    any are drawn from its seed, or with `initialise=False` that is an error (E307). Raises ArtifactError (E3xx) for
    what is damaged, missing or of another version, SpecError (E014) for a dtype that parameters cannot have.
    """
    from attncompiler import artifact

    return artifact.undisturbed(Path(path), lambda stored: _load(stored, device, dtype, locked, initialise))


def _load(
    stored: Artifact, device: str | torch.device | None, dtype: torch.dtype | None, locked: bool, initialise: bool
) -> CompiledModel:
    from attncompiler.emit import emit

    if not (stored.has_weights or initialise):
        remedy = "load it, train it and save it, or build it on a device"
        raise fail(ArtifactError, "E307", f"{stored.path} holds no weights", remedy=remedy)
    spec = _in_dtype(stored.spec, dtype or stored.dtype)
    device = _device(device, None)
    planned = _plan_here(spec, device, None).require(spec)
    if locked and (stored.plan is None or planned.choices() != stored.plan.choices()):
        why = f"was planned for other hardware than {planned.target}, or by other measured tables"
        raise fail(ArtifactError, "E305", f"{stored.path} {why}")
    model = emit(spec, planned, device=device, draw=not stored.has_weights)
    if stored.has_weights and device != "meta":
        stored.load_into(model)
    return model


def _plans(spec: ModelSpec, target: str | Target | None, batch: int = 1, seq_len: int | None = None) -> dict[str, Plan]:
    """A plan per listed target, or for `target` alone. Raises PlanError with the faults of all of them."""
    made: dict[str, Plan] = {}
    faults: dict[Diagnostic, None] = {}
    for each in map(_target, spec.targets if target is None else (target,)):
        try:
            made[each.name] = plan_for(spec, each, batch=batch, seq_len=seq_len)
        except PlanError as error:
            faults |= dict.fromkeys(error.diagnostics)
    if faults:
        raise PlanError(faults)
    return made


def _in_dtype(spec: ModelSpec, dtype: torch.dtype | None) -> ModelSpec:
    """The spec with the dtype of its parameters replaced, so that plan, model and artifact agree on it.

    Raises SpecError (E014) for a dtype that parameters cannot have.
    """
    name = str(dtype).removeprefix("torch.")
    if dtype is None or name == spec.model.dtype:
        return spec
    known = get_args(type(spec.model).model_fields["dtype"].annotation)
    if name not in known:
        raise fail(SpecError, "E014", f"dtype must be {', '.join(known[:-1])} or {known[-1]}, not {dtype}")
    return spec.model_copy(update={"model": spec.model.model_copy(update={"dtype": name})})


def _target(target: str | Target) -> Target:
    return target if isinstance(target, Target) else targets.get(target)


def _device(device: str | torch.device | None, target: str | Target | None) -> str:
    """Where to place a model. Raises SpecError (E107) for a GPU where there is none."""
    if device is None:
        present = detect_target().device_type
        return present if target is None or _target(target).device_type == present else "cpu"
    if str(device).startswith("cuda"):
        detect_target("cuda")
    return str(device)


def _plan_here(spec: ModelSpec, device: str, target: str | Target | None) -> Plan:
    """The plan to emit for: the given target's, else this machine's with what is installed on it."""
    if target is not None:
        return plan_for(spec, _target(target))
    kind = None if device == "meta" else device.partition(":")[0]
    return plan_for(spec, detect_target(kind), detect_environment())


__all__ = ["build", "check", "explain", "load", "plan", "read", "save"]
