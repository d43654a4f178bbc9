"""The plan, as data: frozen, written as JSON and read back equal, in an order that makes two plans comparable."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from attncompiler.errors import ArtifactError, Diagnostic, PlanError, fail
from attncompiler.mechanisms.base import Cost, Names, Refusal, StrictModel
from attncompiler.spec.model import ModelSpec
from attncompiler.targets.target import Target

FORMAT = 1
"""of the JSON; a plan of another format is refused"""


class RefusedKernel(StrictModel):
    """A kernel that was considered for a layer and cannot serve it, with every reason."""

    kernel: str
    reasons: Annotated[tuple[Refusal, ...], Field(strict=False)]

    def __str__(self) -> str:
        return f"{self.kernel}: " + "; ".join(map(str, self.reasons))


class Measured(StrictModel):
    """What the order of a chain was measured on: the device, when, and the bucket of the table, in words."""

    device: str
    date: str
    bucket: str


class PlannedPolicy(StrictModel):
    """The chain that serves a policy's layers, best first (the first is used, the rest are its fallback), and refusals.

    An empty chain is found only in a plan for the machine at hand, where a layer can be planned and not be run.
    """

    policy: str
    mechanism: str
    demanded: str | None = None
    """the kernel that the policy named alone, which must serve"""
    chain: Names
    refusals: Annotated[tuple[RefusedKernel, ...], Field(strict=False)]
    backward: str | None = None
    """the kernel of the chain whose backward is tried first, where that is not the chain's first"""
    measured: Measured | None = None
    """where the order comes from measured tables; None where it is the mechanism's own, or the spec's"""
    cost: Cost
    """of one mixer on the first kernel of the chain, for the plan's batch and length"""

    @model_validator(mode="after")
    def _backward_is_of_the_chain(self) -> Self:
        if self.backward is not None and self.backward not in self.chain[1:]:
            raise ValueError(f"the backward's kernel {self.backward!r} is not one of the chain behind its first")
        return self


@dataclass(frozen=True, slots=True)
class PlannedLayer:
    """One layer: its place in the model and what was chosen for its policy."""

    index: int
    choice: PlannedPolicy

    @property
    def policy(self) -> str:
        return self.choice.policy

    @property
    def mechanism(self) -> str:
        return self.choice.mechanism

    @property
    def chain(self) -> tuple[str, ...]:
        return self.choice.chain

    @property
    def refusals(self) -> tuple[RefusedKernel, ...]:
        return self.choice.refusals


class Plan(StrictModel):
    """What runs where, for one spec on one target."""

    format: int
    spec: str
    """the spec's name"""
    target: Target
    here: bool
    """planned for this machine with what is installed on it, and not for a listed target wherever it is"""
    dtype: str
    batch: int
    seq_len: int
    """the size that the costs are for"""
    policies: Annotated[tuple[PlannedPolicy, ...], Field(strict=False)]
    """those in use, in the order of the layers that use them first"""
    order: Names
    """the policy of every layer"""

    @model_validator(mode="after")
    def _every_layer_has_a_policy(self) -> Self:
        missing = sorted(set(self.order) ^ {choice.policy for choice in self.policies})
        if missing:
            raise ValueError(f"layers and policies differ in {', '.join(missing)}")
        return self

    @cached_property
    def layers(self) -> tuple[PlannedLayer, ...]:
        """Every layer, in order."""
        by_name = {choice.policy: choice for choice in self.policies}
        return tuple(PlannedLayer(index, by_name[name]) for index, name in enumerate(self.order))

    def unserved(self, spec: ModelSpec) -> tuple[Diagnostic, ...]:
        """One diagnostic (E201, E202) per policy whose layers no allowed kernel can serve; empty when all run."""
        return tuple(_unserved(choice, self, spec) for choice in self.policies if not choice.chain)

    def require(self, spec: ModelSpec) -> Plan:
        """The plan itself, when every layer has a kernel. Raises PlanError (E201, E202) with all that have none.

        `spec` is what it is a plan of, and says where in its file the policies stand.
        """
        found = self.unserved(spec)
        if found:
            raise PlanError(found)
        return self

    def choices(self) -> tuple[tuple[tuple[str, ...], str | None], ...]:
        """The chain of every layer, and whose backward comes first: what two plans must share to run the same
        kernels."""
        return tuple((layer.chain, layer.choice.backward) for layer in self.layers)

    def to_json(self) -> str:
        """The plan as JSON, one value a line, in the order of its fields, without those that have their default."""
        return self.model_dump_json(indent=2, exclude_defaults=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote. Raises ArtifactError (E302 damaged, E303 another version)."""
        try:
            data: Any = json.loads(text)
        except ValueError as error:
            raise fail(ArtifactError, "E302", f"the plan is not JSON: {error}") from None
        version = data.get("format") if isinstance(data, dict) else None
        if version != FORMAT:
            raise fail(
                ArtifactError,
                "E303",
                f"the plan has format {version!r}, and this version reads {FORMAT}",
                remedy="read it with the attncompiler that wrote it, or plan the spec again",
            )
        try:
            found = cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise fail(ArtifactError, "E302", f"the plan is damaged at {place}: {first['msg']}") from None
        return found


def _unserved(choice: PlannedPolicy, plan: Plan, spec: ModelSpec) -> Diagnostic:
    indices = [index for index, name in enumerate(plan.order) if name == choice.policy]
    first = f"layers.{indices[0]}"
    count = first if len(indices) == 1 else f"{len(indices)} layers, the first {first}"
    reasons = " | ".join(map(str, choice.refusals))
    where = f"policy {choice.policy!r} ({choice.mechanism}, {count}) on {plan.target.name}"
    if choice.demanded is not None:
        return Diagnostic(
            "E202",
            f"{where}: the kernel it demands refuses: {reasons}",
            spec.place("policies", choice.policy, "kernel"),
            remedy=f"give a list of kernels to allow others, or `kernel: auto`, in policies.{choice.policy}",
        )
    ordered = (
        spec.policies[choice.policy].kernel == "auto" and spec.fallback.order.get(choice.mechanism, "auto") != "auto"
    )
    path = ("fallback", "order", choice.mechanism) if ordered else ("policies", choice.policy, "kernel")
    return Diagnostic(
        "E201",
        f"{where}: every kernel allowed refuses: {reasons}",
        spec.place(*path),
        remedy=f"allow more kernels in policies.{choice.policy}.kernel or in fallback.order.{choice.mechanism}",
    )
