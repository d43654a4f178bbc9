"""The plan, as data: frozen, written as JSON and read back equal, in an order that makes two plans comparable."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import Field, ValidationError

from attncompiler.errors import ArtifactError, Diagnostic, PlanError, fail
from attncompiler.mechanisms.base import Cost, Names, Refusal, StrictModel
from attncompiler.targets.target import Target

FORMAT = 1
"""of the JSON; a plan of another format is refused"""


class RefusedKernel(StrictModel):
    """A kernel that was considered for a layer and cannot serve it, with every reason."""

    kernel: str
    reasons: Annotated[tuple[Refusal, ...], Field(strict=False)]

    def __str__(self) -> str:
        return f"{self.kernel}: " + "; ".join(map(str, self.reasons))


class PlannedLayer(StrictModel):
    """One layer's chain, best first (the first is used, the rest are its fallback), and what was refused.

    An empty chain is found only in a plan for the machine at hand, where a layer can be planned and not be run.
    """

    index: int
    policy: str
    mechanism: str
    demanded: str | None
    """the kernel that the policy named alone, which must serve"""
    chain: Names
    refusals: Annotated[tuple[RefusedKernel, ...], Field(strict=False)]
    cost: Cost
    """of the mixer on the first kernel of its chain, for the plan's batch and length"""


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
    """the size that the layers' costs are for"""
    layers: Annotated[tuple[PlannedLayer, ...], Field(strict=False)]

    def unserved(self) -> tuple[Diagnostic, ...]:
        """One diagnostic (E201, E202) per policy whose layers no allowed kernel can serve; empty when all run."""
        by_policy: dict[str, list[PlannedLayer]] = {}
        for layer in self.layers:
            if not layer.chain:
                by_policy.setdefault(layer.policy, []).append(layer)
        return tuple(_unserved(policy, layers, self.target) for policy, layers in by_policy.items())

    def require(self) -> Plan:
        """The plan itself, when every layer has a kernel. Raises PlanError (E201, E202) with all that have none."""
        found = self.unserved()
        if found:
            raise PlanError(found)
        return self

    def choices(self) -> tuple[tuple[str, ...], ...]:
        """The chain of every layer, in order: what two plans must share to run the same kernels."""
        return tuple(layer.chain for layer in self.layers)

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
        found = data.get("format") if isinstance(data, dict) else None
        if found != FORMAT:
            raise fail(
                ArtifactError,
                "E303",
                f"the plan has format {found!r}, and this version reads {FORMAT}",
                remedy="build the spec again",
            )
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise fail(ArtifactError, "E302", f"the plan is damaged at {place}: {first['msg']}") from None


def _unserved(policy: str, layers: list[PlannedLayer], target: Target) -> Diagnostic:
    first = layers[0]
    count = f"layers.{first.index}" if len(layers) == 1 else f"{len(layers)} layers, the first layers.{first.index}"
    reasons = " | ".join(map(str, first.refusals))
    where = f"policy {policy!r} ({first.mechanism}, {count}) on {target.name}"
    if first.demanded is not None:
        return Diagnostic(
            "E202",
            f"{where}: the kernel it demands refuses: {reasons}",
            remedy=f"give a list of kernels to allow others, or `kernel: auto`, in policies.{policy}",
        )
    return Diagnostic(
        "E201",
        f"{where}: every kernel allowed refuses: {reasons}",
        remedy=f"allow more kernels in policies.{policy}.kernel or in fallback.order.{first.mechanism}",
    )
