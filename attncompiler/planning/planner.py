"""ModelSpec × Target (× Environment) → Plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attncompiler import targets
from attncompiler.errors import Diagnostic, PlanError
from attncompiler.mechanisms.base import (
    Cost,
    Mechanism,
    MixerSize,
    Policy,
    Refusal,
    Request,
    discover,
    load_entry,
    refusals,
)
from attncompiler.planning.model import FORMAT, Plan, PlannedPolicy, RefusedKernel
from attncompiler.spec.model import ModelSpec
from attncompiler.targets.detect import Environment
from attncompiler.targets.target import Target

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
PLANNED_LENGTH = 2048
"""tokens a plan's own costs are for, where the model takes as many; `plan.cost` gives those of any size"""


def plan(spec: ModelSpec, target: Target | str, environment: Environment | None = None) -> Plan:
    """Choose every layer's chain of kernels on `target`, a Target or a built-in's name.

    Without `environment` the plan is for a listed target, wherever it is: what is installed does not count, and a layer
    that no allowed kernel can serve is an error. With it the plan is for the machine at hand: such a layer gets an
    empty chain, with the reasons on record, and `Plan.require` raises.

    Raises PlanError with every fault of every policy in use: E201 (no kernel), E202 (the demanded kernel refuses), E203
    (an option that this version does not build); SpecError (E107) for an unknown target.
    """
    if isinstance(target, str):
        target = targets.get(target)
    unbuilt = tuple(_unbuilt(spec))
    if unbuilt:
        raise PlanError(unbuilt)
    seq_len = min(PLANNED_LENGTH, spec.model.max_position_embeddings)
    made = Plan(
        format=FORMAT,
        spec=spec.name,
        target=target,
        here=environment is not None,
        dtype=spec.model.dtype,
        batch=1,
        seq_len=seq_len,
        policies=tuple(
            _choose(spec, name, policy, target, environment, seq_len) for name, policy in _used(spec).items()
        ),
        order=tuple(layer.policy_name for layer in spec.resolved_layers),
    )
    return made if environment is not None else made.require()


def mixer_size(spec: ModelSpec, *, batch: int, seq_len: int, kernel: str = "") -> MixerSize:
    """The size at which the mixers of `spec` are costed."""
    return MixerSize(
        hidden_size=spec.model.hidden_size,
        max_position_embeddings=spec.model.max_position_embeddings,
        batch=batch,
        seq_len=seq_len,
        itemsize=ITEMSIZE[spec.model.dtype],
        kernel=kernel,
    )


def mixer_cost(policy: Policy, size: MixerSize) -> Cost:
    """What a mixer of this policy costs, by its mechanism's own account."""
    cost: Cost = load_entry(discover()[policy.kind].cost)(policy, size)  # type: ignore[attr-defined]
    return cost


def _used(spec: ModelSpec) -> Mapping[str, Policy]:
    """The policies that layers refer to, in the order of the layers."""
    return {layer.policy_name: layer.policy for layer in spec.resolved_layers}


def _unbuilt(spec: ModelSpec) -> Sequence[Diagnostic]:
    found = []
    for name, policy in _used(spec).items():
        sentences = [*discover()[policy.kind].unbuilt(policy)]
        if policy.routes:
            sentences.append("routes are not built in this version of attncompiler")
        found += [Diagnostic("E203", f"policy {name!r}: {sentence}") for sentence in sentences]
    return found


def _choose(
    spec: ModelSpec, name: str, policy: Policy, target: Target, environment: Environment | None, seq_len: int
) -> PlannedPolicy:
    """The chain of a policy's layers, and who was refused."""
    mechanism = discover()[policy.kind]
    features = {**mechanism.features(policy), "deterministic": spec.deterministic}
    request = Request(mechanism.name, features, spec.model.dtype)
    chain, refused = [], []
    for candidate in candidates(spec, policy, mechanism, request, target):
        reasons = kernel_refusals(mechanism, candidate, request, target, environment)
        if reasons:
            refused.append(RefusedKernel(kernel=candidate, reasons=reasons))
        else:
            chain.append(candidate)
    return PlannedPolicy(
        policy=name,
        mechanism=mechanism.name,
        demanded=policy.kernel if isinstance(policy.kernel, str) and policy.kernel != "auto" else None,
        chain=tuple(chain),
        refusals=tuple(refused),
        cost=mixer_cost(policy, mixer_size(spec, batch=1, seq_len=seq_len, kernel=chain[0])) if chain else Cost(),
    )


def candidates(
    spec: ModelSpec, policy: Policy, mechanism: Mechanism, request: Request, target: Target
) -> tuple[str, ...]:
    """The kernels that may serve, best first: a name or list of the policy's, else of `fallback.order`, else all."""
    asked = policy.kernel
    if asked == "auto":
        asked = spec.fallback.order.get(mechanism.name, "auto")
    if asked == "auto":
        return mechanism.order(target.device_type, request.features)
    return (asked,) if isinstance(asked, str) else tuple(asked)


def kernel_refusals(
    mechanism: Mechanism, name: str, request: Request, target: Target, environment: Environment | None
) -> tuple[Refusal, ...]:
    """Why the kernel of that name cannot serve; one that is only reserved says that it is not built."""
    kernel = mechanism.kernel(name)
    if kernel is None:
        return (Refusal("option", f"{name} is not built in this version of attncompiler"),)
    return refusals(kernel, request, target, environment)
