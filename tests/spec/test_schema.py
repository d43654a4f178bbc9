"""The JSON Schema says yes to every valid spec and no to what has wrong keys, kinds and types."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

from attncompiler.errors import SpecError
from attncompiler.spec import parse, read, schema
from attncompiler.spec.dump import dump
from attncompiler.spec.loader import load
from attncompiler.spec.nodes import plain

from .samples import SPECS, changed

SCHEMA = schema()
VALIDATOR = Draft7Validator(SCHEMA)


def data(text: str) -> Any:
    """As an editor's JSON Schema tool sees the file."""
    return json.loads(json.dumps(plain(load(text, "f")[0])))


def test_it_is_draft_07_and_plain_json() -> None:
    Draft7Validator.check_schema(SCHEMA)
    text = json.dumps(SCHEMA, allow_nan=False)
    assert "prefixItems" not in text
    assert "$defs" not in text


def test_references_stand_alone() -> None:
    """In draft-07 everything beside a `$ref` is ignored."""

    def check(value: Any) -> None:
        if isinstance(value, dict):
            assert "$ref" not in value or len(value) == 1
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            check(inner)

    check(SCHEMA)


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_it_accepts_every_spec_that_ships(path: Path) -> None:
    VALIDATOR.validate(data(path.read_text(encoding="utf-8")))
    VALIDATOR.validate(data(dump(read(path))))


PATTERN, LAYER, TARGETS, MLP = "pattern: {kind: causal}", "{policy: full}", "targets: [cpu]", "kind: gated"
ROUTE = "routes: [{when: 'seq_len > 1', kernel: "

AGREED = [
    (PATTERN, "rope_theta: 10000.0", True),
    (PATTERN, "rope_scaling: {type: linear, factor: 2.0}", True),
    (PATTERN, "rope_parameters: {rope_type: yarn, factor: 2.0, truncate: false}", True),
    (PATTERN, "rope_parameters: {rope_type: linear, factor: 0.5}", False),
    (PATTERN, "rope_parameters: {rope_type: longrope}", False),
    ("name: base", "seed: 3", False),
    ("name: base", "name: base\nnmae: base", False),
    ("hidden_size: 64", "hidden_size: '64'", False),
    ("hidden_size: 64", "hidden_size: 0", False),
    ("hidden_size: 64", "hidden_sizes: 64", False),
    # a tagged union has its tag
    ("kind: attention", "kind: atention", False),
    ("kind: attention\n", "kind: attention\n    windw: 3\n", False),
    ("    kind: attention\n", "", False),
    (PATTERN, "pattern: {kind: full}", True),
    (PATTERN, "pattern: {kind: causl}", False),
    (PATTERN, "pattern: {kind: sliding_window}", False),
    (PATTERN, "pattern: {kind: sliding_window, window: 3}", True),
    (PATTERN, "pattern: {kind: causal, window: 3}", False),
    (PATTERN, "pattern: {window: 3}", False),
    (PATTERN, "pattern: {}", False),
    (PATTERN, "pattern: causal", False),
    (MLP, "kind: plain", True),
    (MLP, "kind: moe", False),
    ("kind: gated, ", "", False),
    ("{kind: gated, intermediate_size: 96}", "{kind: none}", True),
    ("{kind: gated, intermediate_size: 96}", "{}", False),
    ("  mlp:", "  head: {kind: lm, bias: true}\n  mlp:", True),
    ("  mlp:", "  head: {bias: true}\n  mlp:", False),
    ("  mlp:", "  head: {num_labels: 2}\n  mlp:", False),
    ("  mlp:", "  head: {}\n  mlp:", False),
    ("  mlp:", "  norm: {eps: 1e-6}\n  mlp:", True),
    ("  mlp:", "  norm: {}\n  mlp:", True),
    # what a layer changes of the MLP is no union
    (LAYER, "{policy: full, mlp: {intermediate_size: 8}}", True),
    (LAYER, "{policy: full, mlp: {kind: none}}", True),
    (LAYER, "{policy: full, mlp: {}}", True),
    # a list may be empty where that says something
    (LAYER, "{repeat: 2, layers: [{policy: full, mlp: {kind: none}, share: a}]}", True),
    (LAYER, "{polcy: full}", False),
    (LAYER, "full", False),
    (LAYER, "{repeat: 0, policy: full}", False),
    (f"\n  - {LAYER}", " []", False),
    (LAYER, "{policy: full}\n  - {layers: []}", True),
    (PATTERN, "kernel: [sdpa, eager]", True),
    (PATTERN, "kernel: auto", True),
    (PATTERN, "kernel: []", False),
    (PATTERN, "routes: []", True),
    (PATTERN, f"{ROUTE}sdpa}}]", True),
    (PATTERN, f"{ROUTE}[sdpa]}}]", True),
    (PATTERN, f"{ROUTE}[]}}]", False),
    (TARGETS, "targets: []", False),
    (TARGETS, "targets: [3]", False),
    (TARGETS, "targets: [{name: x}]", False),
    (TARGETS, "fallback: {order: {attention: [sdpa]}}", True),
    (TARGETS, "fallback: {order: {attention: auto}}", True),
    (TARGETS, "fallback: {order: {attention: []}}", False),
    (TARGETS, "fallback: {on_failure: stop}", False),
]


@pytest.mark.parametrize(("old", "new", "valid"), AGREED)
def test_it_says_what_the_parser_says(old: str, new: str, valid: bool) -> None:
    text = changed((old, new))
    assert VALIDATOR.is_valid(data(text)) == valid
    with nullcontext() if valid else pytest.raises(SpecError):
        parse(text)
