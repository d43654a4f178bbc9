"""What of a spec is valid, piece by piece, so that relations are checked even where another piece is wrong."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from attncompiler.mechanisms.base import Policy, discover
from attncompiler.spec.model import AnyLayer, Fallback, Group, Layer, Model, ModelSpec
from attncompiler.targets.target import Target


class UnknownError(Exception):
    """A relation asked for a value that is itself wrong; it is left unchecked."""


class Holed:
    """A model some of whose fields are unknown: reading one raises UnknownError."""

    def __init__(self, value: BaseModel | None, holes: Collection[str] = ()):
        self._value, self._holes = value, frozenset(holes)

    def __getattr__(self, name: str) -> Any:
        if self._value is None or name in self._holes:
            raise UnknownError(name)
        return getattr(self._value, name)


@dataclass(frozen=True, slots=True)
class Parts:
    """A spec whose wrong pieces are None (or holes of `model`). Keys and indices are those of the document."""

    name: str | None
    model: Holed
    policies: Mapping[str, Policy | None]
    layers: Sequence[Layer | Group | None] | None
    targets: Sequence[str | Target | None] | None
    fallback: Fallback | None


def whole(spec: ModelSpec) -> Parts:
    """The parts of a valid spec."""
    return Parts(spec.name, Holed(spec.model), spec.policies, spec.layers, spec.targets, spec.fallback)


def salvage(data: Mapping[str, Any], holes: Collection[str]) -> Parts:
    """What is valid of plain `data`; `holes` are the fields of its model section that are wrong."""
    name, layers, targets, policies = (data.get(key) for key in ("name", "layers", "targets", "policies"))
    return Parts(
        name=name if isinstance(name, str) else None,
        model=_model(data.get("model"), holes),
        policies={key: _policy(value) for key, value in policies.items()} if isinstance(policies, Mapping) else {},
        layers=[_valid(AnyLayer, item) for item in layers] if isinstance(layers, tuple) else None,
        targets=[_valid(str | Target, item) for item in targets] if isinstance(targets, tuple) else None,
        fallback=_valid(Fallback, data.get("fallback", {})),
    )


def _model(data: Any, holes: Collection[str]) -> Holed:
    """The model section with stand-ins for the fields that are wrong, which cannot be read."""
    if not isinstance(data, Mapping):
        return Holed(None)
    stand_in = {"hidden_size": 1, "mlp": {"kind": "none"}}
    known = {key: value for key, value in data.items() if key in Model.model_fields and key not in holes}
    absent = [key for key in stand_in if key not in known]
    return Holed(_valid(Model, {**stand_in, **known}), {*holes, *absent})


def _policy(data: Any) -> Policy | None:
    kind = data.get("kind") if isinstance(data, Mapping) else None
    mechanism = discover().get(kind) if isinstance(kind, str) else None
    return _valid(mechanism.policy, data) if mechanism is not None else None


def _valid(grammar: Any, data: Any) -> Any:
    try:
        return TypeAdapter(grammar).validate_python(data, strict=True)
    except ValidationError:
        return None
