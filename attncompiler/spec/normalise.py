"""Accepted aliases → the grammar's own keys, on nodes, so that places are kept."""

from __future__ import annotations

from collections.abc import Callable

from attncompiler.errors import Diagnostic
from attncompiler.mechanisms.base import discover
from attncompiler.spec.nodes import Entry, Node, child, keyed, plain, without
from attncompiler.spec.scalars import Unreadable

ALIASES = ("rope_theta", "rope_scaling")


def normalise(root: Node) -> tuple[Node, list[Diagnostic]]:
    """The document with `rope_theta` and `rope_scaling` moved into `rope_parameters`, in policies that have rotary."""
    policies = child(root, "policies")
    if policies is None or not isinstance(policies.value, dict):
        return root, []
    faults: list[Diagnostic] = []
    entries = {
        name: Entry(entry.key, _rope(entry.node, faults.append)) if _has_rope(entry.node) else entry
        for name, entry in policies.value.items()
    }
    place = root.value["policies"].key if isinstance(root.value, dict) else root.location
    return keyed(root, "policies", Node(entries, policies.location), place), faults


def _has_rope(policy: Node) -> bool:
    kind = child(policy, "kind")
    mechanism = discover().get(kind.value) if kind is not None and isinstance(kind.value, str) else None
    if mechanism is None or "rope_parameters" not in mechanism.policy.model_fields:
        return False
    return isinstance(policy.value, dict) and any(alias in policy.value for alias in ALIASES)


def _rope(policy: Node, note: Callable[[Diagnostic], None]) -> Node:
    """`policy` without aliases. `rope_scaling: null`, as in HF's older configs, means no scaling."""
    assert isinstance(policy.value, dict)
    theta, scaling = policy.value.get("rope_theta"), policy.value.get("rope_scaling")
    own = policy.value.get("rope_parameters")
    for entry, name in ((scaling, "rope_scaling"), (own, "rope_parameters")):
        if entry is not None and not isinstance(entry.node.value, (dict, type(None), Unreadable)):
            note(Diagnostic("E011", f"{name} must be a mapping", entry.node.location))
            return without(policy, *ALIASES)
    moved: dict[str, Entry] = {}
    if theta is not None:
        moved["rope_theta"] = theta
    if scaling is not None and isinstance(scaling.node.value, dict):
        old, new = scaling.node.value.get("type"), scaling.node.value.get("rope_type")
        if old is not None and new is not None and plain(old.node) != plain(new.node):
            message = "rope_scaling gives both 'type' and 'rope_type', and they differ"
            note(Diagnostic("E105", message, old.key, "remove one of the two"))
        moved |= {("rope_type" if key == "type" else key): entry for key, entry in scaling.node.value.items()}
    place = (own or theta or scaling).key  # type: ignore[union-attr]
    rope = dict(own.node.value) if own is not None and isinstance(own.node.value, dict) else {}
    for key, entry in moved.items():
        if key in rope:
            note(Diagnostic("E105", f"{key!r} is also given in rope_parameters", entry.key))
        rope.setdefault(key, entry)
    bare = without(policy, *ALIASES)
    return keyed(bare, "rope_parameters", Node(rope, place), place) if moved else bare
