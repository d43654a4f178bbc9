"""The JSON Schema says yes to every valid spec and no to what has wrong keys, kinds and types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

from attncompiler.spec import read, schema
from attncompiler.spec.dump import dump
from attncompiler.spec.loader import load
from attncompiler.spec.nodes import plain

from .samples import BASE, SPECS, changed

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


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("pattern: {kind: causal}", "rope_theta: 10000.0"),
        ("pattern: {kind: causal}", "rope_scaling: {type: linear, factor: 2.0}"),
        ("pattern: {kind: causal}", "kernel: [sdpa, eager]"),
        ("pattern: {kind: causal}", "routes: [{when: 'seq_len > 1', kernel: sdpa}]"),
        ("{policy: full}", "{repeat: 2, layers: [{policy: full, mlp: {kind: none}, share: a}]}"),
        ("targets: [cpu]", "fallback: {order: {attention: [sdpa]}}"),
    ],
    ids=lambda text: text[:30],
)
def test_it_accepts_what_the_grammar_accepts(old: str, new: str) -> None:
    VALIDATOR.validate(data(changed((old, new))))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("name: base", "seed: 3"),
        ("name: base", "name: base\nnmae: base"),
        ("hidden_size: 64", "hidden_size: '64'"),
        ("hidden_size: 64", "hidden_size: 0"),
        ("hidden_size: 64", "hidden_sizes: 64"),
        ("kind: attention", "kind: atention"),
        ("kind: attention\n", "kind: attention\n    windw: 3\n"),
        ("kind: causal", "kind: causl"),
        ("kind: causal", "kind: sliding_window"),
        ("kind: causal", "kind: causal, window: 3"),
        ("kind: gated", "kind: moe"),
        ("{policy: full}", "{polcy: full}"),
        ("{policy: full}", "full"),
        ("{policy: full}", "{repeat: 0, policy: full}"),
        ("targets: [cpu]", "targets: [3]"),
        ("targets: [cpu]", "targets: [{name: x}]"),
        ("targets: [cpu]", "fallback: {on_failure: stop}"),
    ],
    ids=lambda text: text[:30],
)
def test_it_rejects_mutants(old: str, new: str) -> None:
    assert VALIDATOR.is_valid(data(BASE))
    assert not VALIDATOR.is_valid(data(changed((old, new))))
