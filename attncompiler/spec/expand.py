"""The layers of a spec, one by one: groups repeated, policies looked up, MLP changes merged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from attncompiler.mechanisms.base import Policy
from attncompiler.spec.model import Group, Layer, Mlp, MlpChanges, ModelSpec, NoMlp

MAX_LAYERS = 10_000


@dataclass(frozen=True, slots=True)
class ResolvedLayer:
    """One layer as it will be built. Layers of equal `share` hold the same weights."""

    index: int
    policy_name: str
    policy: Policy
    mlp: Mlp | NoMlp
    share: str | None = None


class MergeError(ValueError):
    """A layer's MLP changes do not fit the model's MLP."""


def merge(base: Mlp | NoMlp, changes: MlpChanges | None) -> Mlp | NoMlp:
    """`base` with `changes` over it. Raises MergeError where they contradict one another or leave a gap."""
    given = changes.model_dump(exclude_none=True) if changes is not None else {}
    if not given:
        return base
    kind = given.get("kind", base.kind)
    if kind == "none":
        extra = [name for name in given if name != "kind"]
        if extra:
            raise MergeError(f"an mlp of kind none takes no {extra[0]}")
        return NoMlp()
    fields = {**(base.model_dump() if isinstance(base, Mlp) else {}), **given}
    if "intermediate_size" not in fields:
        raise MergeError("the mlp needs an intermediate_size, and model.mlp has none to take it from")
    return Mlp(**fields)


def count(layers: Sequence[Layer | Group]) -> int:
    """How many layers the entries expand to, without expanding them."""
    return sum(entry.repeat * (count(entry.layers) if isinstance(entry, Group) else 1) for entry in layers)


def expand(spec: ModelSpec) -> tuple[ResolvedLayer, ...]:
    """Every layer of a valid spec, in order."""
    return tuple(
        ResolvedLayer(index, entry.policy, spec.policies[entry.policy], merge(spec.model.mlp, entry.mlp), entry.share)
        for index, entry in enumerate(_flatten(spec.layers))
    )


def _flatten(layers: Sequence[Layer | Group]) -> Iterator[Layer]:
    for entry in layers:
        for _ in range(entry.repeat):
            if isinstance(entry, Group):
                yield from _flatten(entry.layers)
            else:
                yield entry
