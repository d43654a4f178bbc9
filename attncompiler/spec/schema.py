"""The grammar as JSON Schema draft-07, for editors."""

from __future__ import annotations

from typing import Any

from attncompiler.mechanisms.base import discover
from attncompiler.spec.model import ModelSpec

DRAFT = "http://json-schema.org/draft-07/schema#"


def schema() -> dict[str, Any]:
    """JSON Schema draft-07 of a spec file. It accepts every valid spec; relations between values are beyond it."""
    full = ModelSpec.model_json_schema(ref_template="#/definitions/{model}")
    for mechanism in discover().values():
        definition = full["$defs"][mechanism.policy.__name__]
        if "rope_parameters" in definition["properties"]:
            definition["properties"] |= _rope_aliases()
    definitions = full.pop("$defs")
    converted = _draft07({**full, "definitions": definitions})
    return {"$schema": DRAFT, **converted, "title": "attncompiler spec"}


def _rope_aliases() -> dict[str, Any]:
    scaling = {"anyOf": [{"type": "object"}, {"type": "null"}]}
    return {
        "rope_theta": {"type": "number", "exclusiveMinimum": 0, "description": "alias of rope_parameters.rope_theta"},
        "rope_scaling": {**scaling, "description": "alias of rope_parameters"},
    }


def _draft07(value: Any) -> Any:
    """Pydantic writes draft 2020-12: `prefixItems`, and `$ref` with siblings, which draft-07 would ignore.

    The tag of a tagged union is required, whatever its branches' defaults: without it no branch is chosen.
    """
    if isinstance(value, list):
        return [_draft07(item) for item in value]
    if not isinstance(value, dict):
        return value
    result = {key: _draft07(item) for key, item in value.items() if key != "discriminator"}
    if "discriminator" in value:
        result["required"] = [value["discriminator"]["propertyName"]]
    if "prefixItems" in result:
        result["items"] = result.pop("prefixItems")
        result["additionalItems"] = False
    if "$ref" in result and len(result) > 1:
        result["allOf"] = [{"$ref": result.pop("$ref")}]
    return result
