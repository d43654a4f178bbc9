"""ModelSpec × Target (× Environment) → Plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache

from attncompiler import targets
from attncompiler.errors import Diagnostic, PlanError
from attncompiler.measured import LAST, Bucket, Entry, Order, entries
from attncompiler.mechanisms.base import (
    NOT_BUILT,
    Cost,
    Fault,
    Kernel,
    Mechanism,
    MixerSize,
    OneOf,
    Policy,
    Refusal,
    Request,
    Value,
    auto_order,
    discover,
    load_entry,
    refusals,
)
from attncompiler.planning.model import FORMAT, Measured, Plan, PlannedPolicy, RefusedKernel
from attncompiler.spec.diagnose import dotted
from attncompiler.spec.model import ModelSpec
from attncompiler.targets.detect import Environment
from attncompiler.targets.target import Target

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
PLANNED_LENGTH = 2048
"""tokens"""


def plan(
    spec: ModelSpec,
    target: Target | str,
    environment: Environment | None = None,
    *,
    batch: int = 1,
    seq_len: int | None = None,
) -> Plan:
    """Choose every layer's chain of kernels on `target`, a Target or a built-in's name.

    The plan is for `batch` sequences of `seq_len` tokens, default `planned_length(spec)`: what a kernel refuses at that
    size alone is refused in it too. Where kernels were measured at about that size, `kernel: auto` follows that.

    Without `environment` the plan is for a listed target, wherever it is: what is installed or was measured here does
    not count, and a layer that no allowed kernel can serve is an error. With it the plan is for the machine at hand: a
    layer may get an empty chain, with the reasons on record, and `Plan.require` raises.

    Raises PlanError with every fault of every policy in use: E201 (no kernel), E202 (the demanded kernel refuses), E203
    (an option that this version does not build); SpecError (E107) for an unknown target; UsageError (E605) where a
    measured table is damaged.
    """
    if isinstance(target, str):
        target = targets.get(target)
    unbuilt = {name: _unbuilt(spec, name, policy) for name, policy in _used(spec).items()}
    size = mixer_size(spec, batch=batch, seq_len=planned_length(spec) if seq_len is None else seq_len)
    made = Plan(
        format=FORMAT,
        spec=spec.name,
        target=target,
        here=environment is not None,
        dtype=spec.model.dtype,
        batch=size.batch,
        seq_len=size.seq_len,
        policies=tuple(_choose(spec, name, policy, target, environment, size) for name, policy in _used(spec).items()),
        order=tuple(layer.policy_name for layer in spec.resolved_layers),
    )
    faults = [fault for found in unbuilt.values() for fault in found]
    if faults:
        # what is not built has its refusals too; said twice they would be taken for two faults
        served = made.model_copy(update={"policies": tuple(c for c in made.policies if not unbuilt[c.policy])})
        raise PlanError([*faults, *served.unserved(spec)])
    return made if environment is not None else made.require(spec)


def planned_length(spec: ModelSpec) -> int:
    """The tokens that a plan is for where nobody says: `PLANNED_LENGTH`, or what the model is meant for, if less."""
    return min(PLANNED_LENGTH, spec.model.max_position_embeddings)


def too_long(spec: ModelSpec, seq_len: int) -> str | None:
    """Why the model cannot take as many tokens, or None where it can."""
    limit = spec.model.max_position_embeddings
    bounded = [name for name, policy in _used(spec).items() if discover()[policy.kind].bounded]
    if seq_len <= limit or not (bounded or spec.model.embedding.positions == "learned"):
        return None
    why = f"policy {bounded[0]!r} projects no more" if bounded else "its learned positions are no more"
    return f"the model takes at most {limit} tokens, not {seq_len}: {why}"


def not_causal(spec: ModelSpec) -> list[str]:
    """Why the model cannot decode, a sentence for each part and each policy in use; empty when it can."""
    reasons = []
    if spec.model.head.kind == "classifier":
        reasons.append("a classifier reads the whole sequence")
    if spec.model.embedding.token_types:
        reasons.append("token types are given for a whole sequence")
    used = _used(spec).items()
    return reasons + [
        f"policy {name!r} is not causal" for name, policy in used if not discover()[policy.kind].causal(policy)
    ]


def mixer_size(spec: ModelSpec, *, batch: int, seq_len: int) -> MixerSize:
    """The size at which the mixers of `spec` are costed, on a kernel that is yet to be chosen."""
    return MixerSize(
        hidden_size=spec.model.hidden_size,
        max_position_embeddings=spec.model.max_position_embeddings,
        batch=batch,
        seq_len=seq_len,
        itemsize=ITEMSIZE[spec.model.dtype],
        kernel="",
    )


def mixer_cost(policy: Policy, size: MixerSize) -> Cost:
    """What a mixer of this policy costs, by its mechanism's own account."""
    cost: Cost = load_entry(discover()[policy.kind].cost)(policy, size)  # type: ignore[attr-defined]
    return cost


def _used(spec: ModelSpec) -> Mapping[str, Policy]:
    """The policies that layers refer to, in the order of the layers."""
    return {layer.policy_name: layer.policy for layer in spec.resolved_layers}


def _unbuilt(spec: ModelSpec, name: str, policy: Policy) -> tuple[Diagnostic, ...]:
    """The policy's options that this version does not build, or that no kernel of its mechanism offers (E203)."""
    mechanism = discover()[policy.kind]
    found = [Fault(("routes",), f"routes are {NOT_BUILT}", "E203")] if policy.routes else []
    for feature, value in mechanism.features(policy, spec.model).items():
        if all(kernel.needs.refuse(feature, value) for kernel in mechanism.kernels):
            path = mechanism.places.get(feature, (feature,))
            shown = f" {value!r}" if isinstance(value, str) else ""
            offered = sorted({str(each) for kernel in mechanism.kernels for each in _values(kernel, feature)})
            remedy = f"built are {', '.join(offered)}" if offered else None
            found.append(Fault(path, f"{dotted(path)}{shown} is {NOT_BUILT}", "E203", remedy))
    return tuple(
        Diagnostic(
            fault.code, f"policy {name!r}: {fault.message}", spec.place("policies", name, *fault.path), fault.remedy
        )
        for fault in found
    )


def _values(kernel: Kernel, feature: str) -> Iterable[Value]:
    """The values of a feature that a kernel lists."""
    accepts = kernel.needs.features.get(feature)
    return accepts.values if isinstance(accepts, OneOf) else ()


def _choose(
    spec: ModelSpec, name: str, policy: Policy, target: Target, environment: Environment | None, size: MixerSize
) -> PlannedPolicy:
    """The chain of a policy's layers, and who was refused."""
    mechanism = discover()[policy.kind]
    features = {
        **mechanism.features(policy, spec.model),
        **mechanism.sized(policy, size),
        "deterministic": spec.deterministic,
    }
    request = Request(mechanism.name, features, spec.model.dtype)
    chain, refused = [], []
    known = entries(target, here=environment is not None)

    @cache
    def reasons(candidate: str) -> tuple[Refusal, ...]:
        return kernel_refusals(mechanism, candidate, request, target, environment)

    order = candidates(spec, policy, mechanism, request, target, size, known, lambda name: not reasons(name))
    for candidate in order.kernels:
        if reasons(candidate):
            refused.append(RefusedKernel(kernel=candidate, reasons=reasons(candidate)))
        else:
            chain.append(candidate)
    return PlannedPolicy(
        policy=name,
        mechanism=mechanism.name,
        demanded=policy.kernel if isinstance(policy.kernel, str) and policy.kernel != "auto" else None,
        chain=tuple(chain),
        refusals=tuple(refused),
        backward=order.backward,
        measured=_measured(order.by, chain),
        cost=mixer_cost(policy, replace(size, kernel=chain[0])) if chain else Cost(),
    )


def candidates(
    spec: ModelSpec,
    policy: Policy,
    mechanism: Mechanism,
    request: Request,
    target: Target,
    size: MixerSize,
    known: tuple[Entry, ...] = (),
    serves: Callable[[str], bool] = lambda name: True,
) -> Order:
    """The kernels that may serve, best first: a name or list of the policy's, else of `fallback.order`, else all.

    All of them come in the mechanism's own order, refined by what is `known` at that size of those that serve.
    """
    asked = policy.kernel
    if asked == "auto":
        asked = spec.fallback.order.get(mechanism.name, "auto")
    if asked != "auto":
        return Order((asked,) if isinstance(asked, str) else tuple(asked))

    def bucket() -> Bucket:
        assert mechanism.bucket is not None
        assert mechanism.shapes is not None
        return mechanism.bucket(mechanism.shapes(policy, size), policy, spec.model.dtype)

    return auto_order(mechanism, target.device_type, request.features, known, bucket, serves)


def _measured(by: Entry | None, chain: Iterable[str]) -> Measured | None:
    """Where an order comes from; None where no two kernels of the chain were measured."""
    if by is None or len((by.kernels.keys() & set(chain)) - set(LAST)) < 2:
        return None
    return Measured(device=by.run.device, date=by.run.date, bucket=str(by.bucket))


def kernel_refusals(
    mechanism: Mechanism, name: str, request: Request, target: Target, environment: Environment | None
) -> tuple[Refusal, ...]:
    """Why the kernel of that name cannot serve; one that is only reserved says that it is not built."""
    kernel = mechanism.kernel(name)
    if kernel is None:
        return (Refusal("option", f"{name} is {NOT_BUILT}"),)
    return refusals(kernel, request, target, environment)
