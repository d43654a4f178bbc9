"""The catalogue of error codes and the code that raises them say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from attncompiler.errors import CATALOGUE, Diagnostic

SOURCE = Path(__file__).parents[2] / "attncompiler"


def used() -> set[str]:
    texts = [path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py") if path.name != "errors.py"]
    return {code for text in texts for code in re.findall(r"\"(E\d{3})\"", text)}


def test_every_code_in_the_source_is_catalogued() -> None:
    assert used() <= set(CATALOGUE)


def test_every_catalogued_code_is_used() -> None:
    assert set(CATALOGUE) <= used()


def test_a_code_outside_the_catalogue_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="catalogue"):
        Diagnostic("E999", "no such thing")
