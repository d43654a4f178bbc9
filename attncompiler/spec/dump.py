"""A spec as YAML text, every default written out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attncompiler.spec.model import ModelSpec
from attncompiler.spec.scalars import write

WIDTH = 100


def dump(spec: ModelSpec) -> str:
    """The resolved spec as YAML that `parse` reads back as an equal ModelSpec."""
    return "\n".join(_mapping(spec.model_dump(mode="python"), "")) + "\n"


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{write(key)}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return write(value)


def _mapping(value: dict[str, Any], indent: str) -> Iterator[str]:
    for key, item in value.items():
        yield from _item(f"{indent}{write(key)}:", item, indent + "  ")


def _sequence(value: tuple[Any, ...], indent: str) -> Iterator[str]:
    for item in value:
        yield from _item(f"{indent}-", item, indent + "  ")


def _item(start: str, value: Any, indent: str) -> Iterator[str]:
    """On one line where it fits, or as a block below."""
    line = f"{start} {_flow(value)}"
    if len(line) <= WIDTH or not value or not isinstance(value, (dict, tuple)):
        yield line
        return
    yield start
    yield from _mapping(value, indent) if isinstance(value, dict) else _sequence(value, indent)
