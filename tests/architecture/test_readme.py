"""README says what there is: commands, verbs, options, mechanisms, kernels, targets."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import typer
from readme import setup_commands

from attncompiler import spec as specs
from attncompiler import targets
from attncompiler.cli import app
from attncompiler.mechanisms.base import discover

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def verbs(group: Any = None, before: str = "") -> dict[str, Any]:
    """Every verb by its words: those that have verbs of their own by these."""
    found: dict[str, Any] = {}
    for name, command in (group or typer.main.get_group(app)).commands.items():
        words = f"{before}{name}"
        found |= verbs(command, f"{words} ") if hasattr(command, "commands") else {words: command}
    return found


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
    documented = set(re.findall(r"^\| `attncompiler ([a-z]+(?: [a-z]+)*)(?: [A-Z]+)?` \|", README, flags=re.MULTILINE))
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


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_the_python_of_the_readme_runs_as_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From top to bottom as one script, in a folder with specs/ beside it."""
    first, *rest = blocks("python")
    assert "attncompiler.build(" in first
    assert "attncompiler.ops.attention(" in "".join(rest)
    (tmp_path / "specs").symlink_to(ROOT / "specs")
    script = tmp_path / "readme.py"
    script.write_text("\n".join([first, *rest]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(script))
    assert names["loss"].isfinite()
    assert names["logits"].shape == (1, 1, 256)
    assert names["out"].shape == (1, 512, 8, 64)
    assert (tmp_path / "build" / "mine" / "report.html").exists()
    printed = capsys.readouterr().out
    assert "def forward(self" in printed
    assert "Counter({('chunkwise', 'forward'): 1, ('chunkwise', 'backward'): 1})" in printed


def test_the_yaml_of_the_readme_is_a_spec() -> None:
    [block] = blocks("yaml")
    assert len(specs.parse(block).resolved_layers) == 7
