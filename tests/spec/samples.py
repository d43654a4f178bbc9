"""A small valid spec, as text, that tests change one thing of."""

from __future__ import annotations

from pathlib import Path

import pytest

from attncompiler.errors import SpecError
from attncompiler.spec import parse

SPECS = sorted((Path(__file__).parents[2] / "specs").glob("*.yaml"))

BASE = """\
name: base
model:
  vocab_size: 256
  hidden_size: 64
  mlp: {kind: gated, intermediate_size: 96}
policies:
  full:
    kind: attention
    num_attention_heads: 4
    pattern: {kind: causal}
layers:
  - {policy: full}
targets: [cpu]
"""


def changed(*changes: tuple[str, str]) -> str:
    """BASE with each first text replaced by the second."""
    text = BASE
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new, 1)
    return text


def errors(text: str, *overrides: str) -> list[str]:
    """Every fault that `text` has, as a person reads it."""
    with pytest.raises(SpecError) as caught:
        parse(text, filename="f", overrides=overrides)
    return [str(diagnostic) for diagnostic in caught.value.diagnostics]
