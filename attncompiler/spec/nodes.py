"""A document as frozen nodes that remember where they were written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attncompiler.errors import Location
from attncompiler.spec.scalars import Scalar, Unreadable

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """A key's place and its value."""

    key: Location
    node: Node


@dataclass(frozen=True, slots=True)
class Node:
    """A scalar, a sequence or a mapping, and where it stands.

    `size` counts its characters, roughly, with aliases as what they expand to; `height` its levels of nesting.
    """

    value: Scalar | Unreadable | tuple[Node, ...] | dict[str, Entry]
    location: Location
    size: int = 1
    height: int = 0


def plain(node: Node) -> Any:
    """The node as plain data: dicts with text keys, tuples, scalars."""
    if isinstance(node.value, dict):
        return {key: plain(entry.node) for key, entry in node.value.items()}
    if isinstance(node.value, tuple):
        return tuple(plain(item) for item in node.value)
    return node.value


def child(node: Node, step: str | int) -> Node | None:
    """The value under a key or at an index, or None where there is none."""
    if isinstance(node.value, dict):
        entry = node.value.get(step) if isinstance(step, str) else None
        return entry.node if entry is not None else None
    if isinstance(node.value, tuple) and isinstance(step, int) and 0 <= step < len(node.value):
        return node.value[step]
    return None


def readable(root: Node, path: Sequence[str | int]) -> bool:
    """Whether what stands at `path` has a value; False only for a scalar that the loader could not read."""
    node: Node | None = root
    for step in path:
        node = child(node, step) if node is not None else None
    return node is None or not isinstance(node.value, Unreadable)


def locate(root: Node, path: Sequence[str | int], *, key: bool = False) -> Location:
    """Where `path` stands: its value, or with `key` its key; the nearest enclosing key where the path ends early."""
    node, place = root, root.location
    for step in path:
        below = child(node, step)
        if below is None:
            return place
        place = node.value[step].key if isinstance(node.value, dict) and isinstance(step, str) else below.location
        node = below
    return place if key else node.location


def keyed(node: Node, key: str, below: Node, place: Location) -> Node:
    """A copy of the mapping `node` with `key` set to `below`."""
    assert isinstance(node.value, dict)
    return Node({**node.value, key: Entry(place, below)}, node.location)


def without(node: Node, *keys: str) -> Node:
    """A copy of the mapping `node` without `keys`."""
    assert isinstance(node.value, dict)
    return Node({name: entry for name, entry in node.value.items() if name not in keys}, node.location)
