"""The plans of an artifact: one for each listed target, and the one its model was emitted for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from attncompiler.artifact.manifest import damaged, read_json
from attncompiler.planning import Plan


def to_json(listed: Mapping[str, Plan], emitted: Plan) -> str:
    data = {
        "emitted": json.loads(emitted.to_json()),
        "listed": {name: json.loads(plan.to_json()) for name, plan in listed.items()},
    }
    return json.dumps(data, indent=2) + "\n"


def read_plans(path: Path) -> tuple[dict[str, Plan], Plan]:
    """(listed, emitted) of the file at `path`. Raises ArtifactError: E302 damaged, E303 of another version."""
    data = read_json(path)
    if not isinstance(data, dict) or set(data) != {"emitted", "listed"} or not isinstance(data["listed"], dict):
        raise damaged(path, "it does not hold 'emitted' and 'listed' plans")
    listed = {name: Plan.from_json(json.dumps(plan)) for name, plan in data["listed"].items()}
    return listed, Plan.from_json(json.dumps(data["emitted"]))
