"""Pydantic's errors → diagnostics: a code, a place in the file, a sentence, and a hint where one is near."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from attncompiler.mechanisms.base import Fault
from attncompiler.spec import hints
from attncompiler.spec.nodes import Path
from attncompiler.spec.trace import Trace, trace

WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "none_required": "null",
}
BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def faults(error: ValidationError, grammar: Any, base: Path = ()) -> list[tuple[Fault, bool]]:
    """What `error` says, of validating the data at `base` by the type `grammar`: each fault, and whether of the key."""
    traced = [(trace(grammar, item["loc"], base), item) for item in error.errors(include_url=False)]
    found: list[tuple[Fault, bool]] = []
    unions: dict[Path, list[tuple[Trace, Any]]] = {}
    for place, item in traced:
        if place.union is None:
            found.append(_fault(place, item))
        else:
            unions.setdefault(place.union, []).append((place, item))
    for path, group in unions.items():
        deeper = [(place, item) for place, item in group if len(place.path) > len(path)]
        found += [_fault(place, item) for place, item in deeper]
        if not deeper:
            wanted = dict.fromkeys(_wanted(item) for _, item in group)
            message = f"{dotted(path)} must be {' or '.join(wanted)}, not {describe(group[0][1]['input'])}"
            found.append((Fault(path, message, "E011"), False))
    return found


def _wanted(item: Mapping[str, Any]) -> str:
    return item["ctx"]["expected"] if item["type"] == "literal_error" else WANTED.get(item["type"], item["msg"])


def _fault(place: Trace, item: Mapping[str, Any]) -> tuple[Fault, bool]:
    kind, path, value, context = item["type"], place.path, item["input"], item.get("ctx", {})
    name = dotted(path)
    if kind == "missing":
        return Fault(path[:-1], f"{path[-1]!r} is missing{_inside(path)}", "E010"), True
    if kind == "extra_forbidden":
        known = tuple(place.owner.model_fields) if place.owner is not None else ()
        return _unknown_key(path, known), True
    if kind == "union_tag_not_found":
        return Fault(path, f"'kind' is missing{_inside((*path, 'kind'))}", "E010", _listed("kinds", place.kinds)), True
    if kind == "union_tag_invalid":
        return _unknown_kind((*path, "kind"), value["kind"], _texts(context["expected_tags"])), False
    if kind == "literal_error" and path[-1:] == ("kind",):
        return _unknown_kind(path, value, _texts(context["expected"])), False
    if kind == "literal_error":
        return _not_among(path, value, context["expected"]), False
    if kind in WANTED:
        return Fault(path, f"{name} must be {WANTED[kind]}, not {describe(value)}", "E011", _cast(kind, value)), False
    if kind in BOUNDS:
        key, words = BOUNDS[kind]
        bound = context[key]
        shown = f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"
        return Fault(path, f"{name} must be {words} {shown}, not {describe(value)}", "E014"), False
    if kind == "finite_number":
        return Fault(path, f"{name} must be finite", "E014"), False
    return Fault(path, f"{name}: {item['msg']}", "E014"), False


def _unknown_key(path: Path, known: Collection[str]) -> Fault:
    key = str(path[-1])
    if key in hints.KEYS_NOT_OFFERED:
        return Fault(path, f"{hints.KEYS_NOT_OFFERED[key]} ({key}) is understood, but not offered", "E150")
    return Fault(path, f"unknown key {key!r}", "E012", hints.KEYS.get(key) or did_you_mean(key, known))


def _unknown_kind(path: Path, value: Any, known: Sequence[str]) -> Fault:
    if not isinstance(value, str):
        return Fault(path, f"{dotted(path)} must be text, not {describe(value)}", "E011", _listed("kinds", known))
    if value in hints.KINDS_NOT_OFFERED:
        return Fault(path, f"{hints.KINDS_NOT_OFFERED[value]} (kind {value}) is understood, but not offered", "E150")
    remedy = hints.KINDS.get(value) or did_you_mean(value, known)
    listed = _listed("kinds", known)
    return Fault(path, f"unknown kind {value!r}", "E013", f"{remedy} ({listed})" if remedy else listed)


def _not_among(path: Path, value: Any, expected: str) -> Fault:
    known = _texts(expected)
    wanted = f"{dotted(path)} must be {expected}, not {describe(value)}"
    if known and not isinstance(value, str):
        return Fault(path, wanted, "E011")
    return Fault(path, wanted, "E014", did_you_mean(value, known) if isinstance(value, str) else None)


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """A question that names the known word nearest to `word`, or None when none is near."""
    near = nearest(word, known)
    return f"did you mean {near!r}?" if near is not None else None


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word nearest to `word`, letter case aside."""
    lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower()[:100], lower, n=1, cutoff=0.7)
    return lower[near[0]] if near else None


def dotted(path: Sequence[str | int]) -> str:
    """A path as `--set` takes it: `layers[0].policy`."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            text += ("." if text else "") + (step if step.isprintable() and step else repr(step))
    return text or "the spec"


def describe(value: Any) -> str:
    """A value in words, short."""
    if isinstance(value, str):
        return f"the text {value if len(value) <= 60 else value[:57] + '...'!r}"
    if isinstance(value, (Mapping, tuple)):
        return "a mapping" if isinstance(value, Mapping) else "a list"
    if isinstance(value, (bool, type(None))):
        return {True: "true", False: "false", None: "null"}[value]
    shown = f"{value}"
    return shown if len(shown) <= 40 else f"{shown[:37]}..."


def _cast(kind: str, value: Any) -> str | None:
    """How to write what was probably meant."""
    if kind == "bool_type" and isinstance(value, str) and value.lower() in hints.BOOLEANS:
        return f"write {hints.BOOLEANS[value.lower()]}"
    if kind in ("int_type", "float_type") and isinstance(value, str):
        digits = value.replace("_", "").strip()
        if digits.isascii() and digits.isdigit():
            return "remove the quotes" if digits == value else f"write {digits}"
    if kind == "int_type" and isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
        return f"write {int(value)}"
    return None


def _inside(path: Path) -> str:
    return f" in {dotted(path[:-1])}" if len(path) > 1 else ""


def _listed(what: str, names: Sequence[str]) -> str:
    return f"the {what} are {', '.join(names)}"


def _texts(expected: str) -> list[str]:
    """The quoted words of pydantic's "'a', 'b' or 'c'"."""
    return expected.split("'")[1::2]
