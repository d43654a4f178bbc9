"""Proof of a user's own configuration: every kernel of every chain on the spec's own shapes, against fp64.

Each policy in use is built as a model of one layer, of the spec's widths, heads and dtype, with weights under which
every part shows (`capture.enlivened`), and the operator calls that it makes are recorded: of a plain batch, of one that
is packed and padded, and of decoding. It runs on the reference meanwhile, so that no kernel's fault is in what another
is given. On each call every kernel is held to the error budget in the spec's dtype, and in fp32 where that is a lower
one, whose budget hides more. What is scaled to fit is the batch, of `BATCH` sequences, and their length, the longest
that the reference can take (`fitting_length`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from attncompiler import pipeline, targets
from attncompiler.emit import CompiledModel
from attncompiler.mechanisms.base import NOT_BUILT, MixerSize, Policy
from attncompiler.planning import Plan, plan
from attncompiler.planning.explanation import ranges
from attncompiler.planning.planner import mixer_cost, mixer_size, planned_length
from attncompiler.spec.model import Embedding, Layer, ModelSpec, NoHead, NoMlp
from attncompiler.targets.detect import detect_environment, detect_target
from attncompiler.targets.target import Target
from attncompiler.testing.budget import Verdict
from attncompiler.testing.capture import SiteCall, enlivened, recorded
from attncompiler.testing.conformance import Call, Trial, evaluate, kernel_call, pair_call, prepared, refusals_of

BATCH = 2
MOST_BYTES = 2**30
MOST_FLOPS = 2**34
"""of the reference in fp64, forward and backward, on one call"""


@dataclass(frozen=True)
class Row:
    """One tensor of one kernel: the worst of its calls; or, with `reason`, a kernel that was not run, or only in part.

    `tensor` is an output's name or "grad <input>", `call` which of the calls it is of; errors and budgets are largest
    ones (max) and root mean squares.
    """

    policy: str
    layers: str
    mechanism: str
    target: str
    kernel: str
    length: int
    """tokens of each sequence"""
    tensor: str | None = None
    call: str | None = None
    max_error: float | None = None
    max_budget: float | None = None
    rms_error: float | None = None
    rms_budget: float | None = None
    ok: bool | None = None
    """None where nothing was run"""
    reason: str | None = None


@dataclass(frozen=True)
class Verification:
    """What `verify` found, a row for each tensor and for each kernel that was not run."""

    spec: str
    device: str
    dtype: str
    batch: int
    full_length: int
    """the model's max_position_embeddings"""
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether some kernel of every policy was run, and none is over the budget."""
        run = {row.policy for row in self.rows if row.ok is not None}
        return all(row.ok is not False for row in self.rows) and run == {row.policy for row in self.rows}


def verify(
    source: str | os.PathLike[str] | ModelSpec,
    *,
    target: str | Target | Sequence[str | Target] = (),
    device: str | None = None,
    overrides: Sequence[str] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Verification:
    """Hold every kernel of every chain of a spec to the fp64 reference, on this machine, outputs and gradients.

    The chains are those of the machine at hand, or those of one or more targets: their kernels run here as far as
    they can, and the rest is said. `device` is "cpu" or "cuda", default a GPU where there is one. Raises SpecError and
    PlanError as `plan` does.
    """
    spec = pipeline.read(source, overrides)
    here = detect_target(None if device is None else device.partition(":")[0])
    device = device or here.device_type
    given = (target,) if isinstance(target, (str, Target)) else tuple(target)
    wanted = [each if isinstance(each, Target) else targets.get(each) for each in given]
    plans = [plan(spec, each) for each in wanted] or [plan(spec, here, detect_environment())]
    rows: list[Row] = []
    for name, policy in {layer.policy_name: layer.policy for layer in spec.resolved_layers}.items():
        progress(f"{name}: recording its calls")
        length = fitting_length(spec, policy)
        calls = _calls(spec, name, policy, length, device)
        for planned in plans:
            rows += _policy_rows(spec, planned, name, length, calls, device, progress)
    return Verification(spec.name, device, spec.model.dtype, BATCH, spec.model.max_position_embeddings, tuple(rows))


def fitting_length(spec: ModelSpec, policy: Policy) -> int:
    """The longest sequence on which the reference, in fp64, stays within `MOST_BYTES` and `MOST_FLOPS`: T.

    It is the length that the spec is planned for, halved as often as needed, by the mechanism's own account of its
    operator under the kernel `eager`.
    """
    length = planned_length(spec)
    while length > 1 and not _fits(policy, mixer_size(spec, batch=BATCH, seq_len=length)):
        length = -(-length // 2)
    return length


def _fits(policy: Policy, size: MixerSize) -> bool:
    cost = mixer_cost(policy, replace(size, itemsize=8, kernel="eager"))
    return cost.workspace_bytes <= MOST_BYTES and cost.forward_flops + cost.backward_flops <= MOST_FLOPS


# --- calls --------------------------------------------------------------------------------------------------------


def _calls(spec: ModelSpec, name: str, policy: Policy, length: int, device: str) -> list[tuple[str, SiteCall]]:
    """The operator calls of one layer of a policy, each with what it is of."""
    model = _layer_alone(spec, name, policy, device)
    dtype = model.dtype
    generator = torch.Generator().manual_seed(spec.seed)
    hidden = torch.randn(BATCH, length, spec.model.hidden_size, generator=generator).to(device, dtype)
    found: list[tuple[str, SiteCall]] = []

    def run(label: str, call: Callable[[], object]) -> None:
        with torch.no_grad(), recorded() as seen:
            call()
        found.extend((label, each) for each in seen.calls)

    run("plain", lambda: model.train()(hidden))
    model.eval()
    run("packed and padded", lambda: model(hidden, **_masks(length, device)))
    if "step" in model.graphs and length > 1:
        state = model.init_state(BATCH, length)
        _, state = model.step(hidden[:, : length // 2], state)
        run("decode", lambda: model.step(hidden[:, length // 2 :], state))
    return found


def _masks(length: int, device: str) -> dict[str, Tensor]:
    """Three documents in the first sequence, and padding before the last."""
    index = torch.arange(length, device=device)
    rows = torch.arange(BATCH, device=device)[:, None]
    packed = torch.where(rows == 0, (index >= length // 3).long() + (index >= length // 2), 0)
    padded = ~((rows == BATCH - 1) & (index < length // 4))
    return {"segment_ids": packed, "attention_mask": padded}


def _layer_alone(spec: ModelSpec, name: str, policy: Policy, device: str) -> CompiledModel:
    """A model of one layer of the policy, its mixer alone, fed with hidden states, on the reference."""
    bare = {
        "input": "embeds",
        "vocab_size": None,
        "mlp": NoMlp(),
        "head": NoHead(kind="none"),
        "embedding": Embedding(),
    }
    alone = ModelSpec(
        name=spec.name,
        seed=spec.seed,
        deterministic=spec.deterministic,
        model=spec.model.model_copy(update=bare),
        policies={name: policy.model_copy(update={"kernel": "eager"})},
        layers=(Layer(policy=name),),
    )
    model = pipeline.build(alone, device=device)
    enlivened(model, spec.seed)
    return model


# --- verdicts -----------------------------------------------------------------------------------------------------


def _policy_rows(
    spec: ModelSpec,
    planned: Plan,
    name: str,
    length: int,
    calls: list[tuple[str, SiteCall]],
    device: str,
    progress: Callable[[str], None],
) -> Iterator[Row]:
    """A policy's rows under one plan: kernels of its chain, best first, and then those that are refused."""
    choice = next(each for each in planned.policies if each.policy == name)
    layers = ranges(layer.index for layer in planned.layers if layer.policy == name)
    row = Row(name, layers, choice.mechanism, planned.target.name, "", length)
    trials = [
        (
            label if dtype == _dtype(spec) else f"{label}, fp32",
            Trial(call.mechanism, prepared(call.case, dtype, device), dtype),
        )
        for label, call in calls
        for dtype in dict.fromkeys([_dtype(spec), torch.promote_types(_dtype(spec), torch.float32)])
    ]
    for kernel in choice.chain:
        progress(f"{name}: {kernel}")
        yield from _kernel_rows(replace(row, kernel=kernel), (kernel,), kernel_call(kernel), trials)
    if choice.backward is not None:
        pair = choice.chain[0], choice.backward
        named = f"{pair[0]}, backward {pair[1]}"
        progress(f"{name}: {named}")
        yield from _kernel_rows(replace(row, kernel=named), pair, pair_call(*pair), trials)
    for refused in choice.refusals:
        yield replace(row, kernel=refused.kernel, reason="; ".join(map(str, refused.reasons)))


def _dtype(spec: ModelSpec) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, spec.model.dtype)
    return dtype


def _kernel_rows(row: Row, kernels: tuple[str, ...], run: Call, trials: list[tuple[str, Trial]]) -> Iterator[Row]:
    """The worst verdict on each tensor of calls that run these kernels, and why calls were left out."""
    worst: dict[str, tuple[Verdict, str]] = {}
    left_out: dict[str, list[str]] = {}
    for label, trial in trials:
        reasons: list[str] = []
        for name in kernels:
            kernel = trial.mechanism.kernel(name)
            reasons += [NOT_BUILT] if kernel is None else map(str, refusals_of(kernel, trial.case))
        if reasons:
            left_out.setdefault("cannot run here: " + "; ".join(reasons), []).append(label)
            continue
        for verdict in trial.verdicts(partial(evaluate, run)):
            if verdict.name not in worst or _excess(verdict) > _excess(worst[verdict.name][0]):
                worst[verdict.name] = verdict, label
    for tensor, (verdict, label) in worst.items():
        yield replace(
            row,
            tensor=tensor,
            call=label,
            max_error=verdict.max_error,
            max_budget=verdict.max_budget,
            rms_error=verdict.rms_error,
            rms_budget=verdict.rms_budget,
            ok=verdict.ok,
        )
    for reason, labels in left_out.items():
        yield replace(row, call=", ".join(labels), reason=reason)


def _excess(verdict: Verdict) -> float:
    """By how much the worse of the two errors fills its budget."""
    pairs = ((verdict.max_error, verdict.max_budget), (verdict.rms_error, verdict.rms_budget))
    return max(error / budget if budget else (0.0 if error == 0 else float("inf")) for error, budget in pairs)
