"""`--set policies.local.pattern.window=256`: values laid over the document before it is validated."""

from __future__ import annotations

import re
from collections.abc import Sequence

from attncompiler.errors import Diagnostic, Location, SpecError
from attncompiler.spec.loader import MAX_DEPTH, load_value
from attncompiler.spec.nodes import Node, Path, keyed

STEP = re.compile(r"(?:^|\.)([^.\[\]]+)|\[([0-9]{1,9})\]")


def apply(root: Node, overrides: Sequence[str]) -> tuple[Node, list[Diagnostic]]:
    """The document with each `PATH=VALUE` applied in order; VALUE is a YAML scalar or flow collection.

    Sections that are not there are made. A path through a scalar, or an index past a list's end, is a fault (E015).
    """
    faults: list[Diagnostic] = []
    for text in overrides:
        try:
            path, value = _split(text, option(text), faults)
            root = _set(root, path, value, option(text))
        except SpecError as error:
            faults += error.diagnostics
    return root, faults


def option(text: str) -> str:
    """An override as it is cited."""
    return "--set " + "".join(map(_printable, text))


def _split(text: str, option: str, faults: list[Diagnostic]) -> tuple[Path, Node]:
    name, equals, value = text.partition("=")
    path: list[str | int] = []
    position = 0
    for found in STEP.finditer(name):
        if found.start() != position:
            break
        path.append(found[1] if found[1] is not None else int(found[2]))
        position = found.end()
    if not equals or not path or position != len(name):
        raise _refuse("an override reads PATH=VALUE, as in model.norm.eps=1e-6 or layers[0].policy=local", option)
    if len(path) > MAX_DEPTH:
        raise _refuse(f"the path is longer than {MAX_DEPTH} steps", option)
    node, noted = load_value(value, option)
    faults += noted
    return tuple(path), node


def _set(node: Node, path: Path, value: Node, option: str) -> Node:
    """`node` with `value` at `path`; nodes on the way are copied, since an alias may stand elsewhere too."""
    if not path:
        return value
    step, rest = path[0], path[1:]
    place = Location(option=option)
    if isinstance(node.value, tuple):
        index = int(step) if isinstance(step, int) or re.fullmatch("[0-9]{1,9}", step) else None
        if index is None or index >= len(node.value):
            raise _refuse(f"{step!r} is not an index of a list of {len(node.value)}", option)
        items = (*node.value[:index], _set(node.value[index], rest, value, option), *node.value[index + 1 :])
        return Node(items, node.location)
    if isinstance(node.value, dict) and isinstance(step, str):
        entry = node.value.get(step)
        if not rest:
            return keyed(node, step, value, place)
        if entry is None or entry.node.value is None:
            return keyed(node, step, _set(Node({}, place), rest, value, option), place)
        return keyed(node, step, _set(entry.node, rest, value, option), entry.key)
    raise _refuse(f"there is nothing to set under {step!r}: what holds it is not a mapping or a list", option)


def _printable(character: str) -> str:
    return character if character.isprintable() else repr(character)[1:-1]


def _refuse(message: str, option: str) -> SpecError:
    return SpecError(Diagnostic("E015", message, Location(option=option)))
