"""The catalogue of error codes and the code that raises them say the same."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path

import pytest

from attncompiler import errors
from attncompiler.errors import CATALOGUE, AttnCompilerError, Diagnostic, Location

ERRORS = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, AttnCompilerError)]
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


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_is_the_same_in_another_process(error: type[AttnCompilerError]) -> None:
    """DataLoader workers, process pools and launchers pickle what they raise."""
    made = error([Diagnostic("E012", "a", Location("f", 1, 2), "b"), Diagnostic("E401", "c")])
    made.add_note("seen by rank 3")
    sent = pickle.loads(pickle.dumps(made))  # noqa: S301 of our own
    for again in (sent, copy.copy(made), copy.deepcopy(made)):
        assert type(again) is error
        assert again.diagnostics == made.diagnostics
        assert str(again) == str(made)
        assert again.__notes__ == ["seen by rank 3"]
