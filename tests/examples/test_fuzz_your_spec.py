"""The example of a user's own pytest file passes as it is, and fails for a spec whose kernels are wrong."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import Phase, given, settings
from scripts import FOLDER, load_example

from attncompiler.testing.model_laws import Broken

example = load_example("fuzz_your_spec")


@pytest.mark.slow
def test_it_is_a_test_file_that_passes() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / "fuzz_your_spec.py")]
    # a session of its own, not one of the workers of this one
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=FOLDER.parent, env=environment)
    assert run.returncode == 0, run.stdout
    assert "3 passed" in run.stdout


def run_few(name: str, examples: int) -> None:
    """One of its tests on other examples than it has by itself, which nothing keeps."""
    inner = vars(example)[name].hypothesis.inner_test
    few = settings(example.relaxed, max_examples=examples, database=None, phases=(Phase.generate,))
    few(given(example.trained)(inner))()


@pytest.mark.parametrize("name", [name for name in vars(example) if name.startswith("test_")])
def test_each_of_its_tests_runs(name: str) -> None:
    run_few(name, 3)


def test_it_fails_where_a_law_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "examine", lambda _: (Broken("kernels", "layers.0", "planted"), None))
    with pytest.raises(AssertionError, match=r"kernels: layers\.0: planted"):
        run_few("test_every_law_holds", 1)
