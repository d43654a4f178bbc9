"""README says what there is: commands, verbs, options, mechanisms, kernels, targets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer
from readme import setup_commands

from attncompiler import targets
from attncompiler.cli import app
from attncompiler.mechanisms.base import discover

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def verbs() -> dict[str, Any]:
    return dict(typer.main.get_group(app).commands)


def test_the_set_up_is_two_commands() -> None:
    assert setup_commands(README) == [
        "pip install -e . && attncompiler build specs/hybrid_tiny.yaml",
        "pip install -e '.[test]' && pytest",
    ]


def options(command: Any) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts if name.startswith("--")} - {"--help"}


@pytest.mark.parametrize("verb", sorted(verbs()))
def test_every_verb_and_option_is_documented(verb: str) -> None:
    """In the verb's own row of the table, and no option there that it does not have."""
    [row] = re.findall(rf"^\| `attncompiler {verb}(?: [A-Z]+)?` \|.*", README, flags=re.MULTILINE)
    assert set(re.findall(r"`(--[\w-]+)`", row)) == options(verbs()[verb])


def test_the_options_before_a_verb_are_documented() -> None:
    [own] = options(typer.main.get_group(app))
    assert f"attncompiler {own}" in README


def test_no_verb_is_documented_that_does_not_exist() -> None:
    documented = set(re.findall(r"^\| `attncompiler (\w+)", README, flags=re.MULTILINE))
    assert documented == set(verbs())


def test_mechanisms_kernels_and_targets_are_documented() -> None:
    names = [name for m in discover().values() for name in (m.name, *(kernel.name for kernel in m.kernels))]
    missing = [name for name in [*names, *targets.names()] if f"`{name}`" not in README]
    assert not missing


def test_every_spec_is_documented() -> None:
    missing = [path.name for path in sorted((ROOT / "specs").glob("*.yaml")) if path.name not in README]
    assert not missing


def test_links_and_pictures_exist() -> None:
    targets_of_links = re.findall(r"\]\(([^)#]+)\)", README)
    local = [link for link in targets_of_links if not link.startswith(("http://", "https://"))]
    assert local
    assert not [link for link in local if not (ROOT / link).exists()]
