"""A plan explained as plain data: chains, refusals and cost of each layer, and whether training fits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from attncompiler.mechanisms.base import discover
from attncompiler.planning.cost import Memory, ModelCost, Part, layer_time, model_cost
from attncompiler.planning.model import Plan, PlannedLayer
from attncompiler.spec.expand import ResolvedLayer
from attncompiler.spec.model import ModelSpec
from attncompiler.targets.target import Target

USABLE = 0.92
"""of a device's memory: the rest goes to its context, to libraries and to fragmentation"""
GATHERED = 2
"""layers whose parameters FSDP holds whole at once: the one that runs and the one it fetches ahead"""


def explain(spec: ModelSpec, plan: Plan) -> dict[str, Any]:
    """What runs where and what it costs, for training on a batch of the size that the plan is for.

    Data for JSON and for a table: `layers` groups equal layers, `model` sums them up, `fit` says whether a training
    step fits the target, with and without activation checkpointing, and on how many devices under FSDP.
    """
    cost = model_cost(spec, plan)
    return {
        "spec": spec.name,
        "target": plan.target.name,
        "title": plan.target.title,
        "here": plan.here,
        "dtype": plan.dtype,
        "batch": plan.batch,
        "seq_len": plan.seq_len,
        "layers": list(_layers(spec, plan, cost)),
        "model": _model(cost),
        "fit": {
            "usable_bytes": int(plan.target.memory_bytes * USABLE),
            "plain": _fit(cost.memory, cost, plan.target),
            "checkpointed": _fit(cost.checkpointed, cost, plan.target),
        },
    }


def _layers(spec: ModelSpec, plan: Plan, cost: ModelCost) -> Iterator[dict[str, Any]]:
    """One entry for each kind of layer: those that differ in nothing but their index, wherever they stand."""
    groups: dict[Any, list[tuple[ResolvedLayer, PlannedLayer, Part]]] = {}
    for layer, planned, part in zip(spec.resolved_layers, plan.layers, cost.layers, strict=True):
        groups.setdefault((layer.policy_name, layer.mlp), []).append((layer, planned, part))
    for (policy, _), members in groups.items():
        layer, planned, part = members[0]
        sees = discover()[planned.mechanism].sees
        pattern, density = (None, None) if sees is None else sees(layer.policy, plan.seq_len)
        time = layer_time(part, plan)
        assert part.mixer is not None
        yield {
            "policy": policy,
            "mechanism": planned.mechanism,
            "pattern": pattern,
            "density": density,
            "indices": ranges(member[0].index for member in members),
            "count": len(members),
            "mlp": layer.mlp.kind,
            "chain": list(planned.chain),
            "backward": planned.choice.backward,
            "measured": None if planned.choice.measured is None else planned.choice.measured.model_dump(),
            "refusals": [
                {
                    "kernel": refused.kernel,
                    "reasons": [{"source": r.source, "reason": r.reason} for r in refused.reasons],
                }
                for refused in planned.refusals
            ],
            "parameters": part.cost.parameters,
            "forward_flops": part.cost.forward_flops,
            "backward_flops": part.cost.backward_flops,
            "activation_bytes": part.cost.saved_bytes,
            "state_bytes": part.mixer.state_bytes if cost.state_bytes else 0,
            "mixer": {
                "parameters": part.mixer.parameters,
                "forward_flops": part.mixer.forward_flops,
                "activation_bytes": part.mixer.saved_bytes,
            },
            "forward_seconds": time.forward,
            "backward_seconds": time.backward,
        }


def kernels_text(layer: dict[str, Any], between: str = ", ") -> str:
    """The chain of an explained layer, best first, and whose backward comes first where that is another's."""
    backward = f"; backward first by {layer['backward']}" if layer["backward"] else ""
    return (between.join(layer["chain"]) or "none") + backward


def ranges(indices: Iterable[int]) -> str:
    """Indices as text: "0-2, 4"."""
    runs = []
    for _, run in groupby(enumerate(indices), lambda pair: pair[1] - pair[0]):
        numbers = [index for _, index in run]
        runs.append(str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}")
    return ", ".join(runs)


def _model(cost: ModelCost) -> dict[str, Any]:
    tokens = cost.batch * cost.seq_len
    return {
        "parameters": cost.parameters,
        "forward_flops": cost.forward_flops,
        "training_flops": cost.training_flops,
        "training_flops_per_token": cost.training_flops // tokens,
        "step_seconds": cost.time.step,
        "tokens_per_second": tokens / cost.time.step,
        "state_bytes": cost.state_bytes,
    }


def _fit(memory: Memory, cost: ModelCost, target: Target) -> dict[str, Any]:
    usable = int(target.memory_bytes * USABLE)
    devices = _devices(memory, cost, usable)
    return {
        "parameter_bytes": memory.parameters,
        "gradient_bytes": memory.gradients,
        "optimizer_bytes": memory.optimizer,
        "update_bytes": memory.update,
        "activation_bytes": memory.activations,
        "peak_bytes": memory.peak,
        "fits": memory.peak <= usable,
        "missing_bytes": max(0, memory.peak - usable),
        "devices": devices,
        "verdict": _verdict(memory.peak, usable, devices, target),
    }


def _devices(memory: Memory, cost: ModelCost, usable: int) -> int | None:
    """The fewest devices under FSDP, each with a batch of this size; None when what is not sharded does not fit.

    Parameters, gradients and optimizer state are divided; activations and workspace are each device's own, and so are
    the gathered parameters and gradients of the layers in flight.
    """
    if memory.peak <= usable:
        return 1
    own = memory.working + (GATHERED + 1) * max(part.parameter_bytes for part in cost.parts)
    if own >= usable:
        return None
    passes = math.ceil(memory.sharded / (usable - own))
    return max(2, passes, math.ceil((memory.sharded + memory.update) / usable))


def _verdict(peak: int, usable: int, devices: int | None, target: Target) -> str:
    need = f"needs {_gib(peak)}, {_gib(usable)} are usable on {target.name}"
    if devices == 1:
        return f"fits: {need}"
    missing = f"does not fit: {need}, {_gib(peak - usable)} are missing"
    if devices is None:
        return f"{missing}; sharding alone does not help, as the activations are not sharded"
    return f"{missing}; fits {devices} devices under FSDP"


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
