"""A spec as YAML text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from attncompiler.spec.model import ModelSpec
from attncompiler.spec.scalars import write

WIDTH = 100


def dump(spec: ModelSpec) -> str:
    """The resolved spec as YAML that `parse` reads back as an equal ModelSpec."""
    return written(spec.model_dump(mode="python"))


def given(spec: ModelSpec) -> str:
    """The spec as YAML with what it was given alone: no default is written out."""
    return written(spec.model_dump(mode="python", exclude_unset=True))


def written(data: dict[str, Any]) -> str:
    """Plain data as YAML: mappings, lists and scalars."""
    return "\n".join(_mapping(data, "")) + "\n"


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{write(key)}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return write(value)


def _mapping(value: dict[str, Any], indent: str) -> Iterator[str]:
    for key, item in value.items():
        yield from _item(f"{indent}{write(key)}:", item, indent + "  ")


def _sequence(value: Sequence[Any], indent: str) -> Iterator[str]:
    for item in value:
        yield from _item(f"{indent}-", item, indent + "  ")


def _item(start: str, value: Any, indent: str) -> Iterator[str]:
    """On one line where it fits, or as a block below."""
    line = f"{start} {_flow(value)}"
    if len(line) <= WIDTH or not value or not isinstance(value, (dict, list, tuple)):
        yield line
        return
    yield start
    yield from _mapping(value, indent) if isinstance(value, dict) else _sequence(value, indent)
