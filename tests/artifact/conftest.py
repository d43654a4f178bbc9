"""A small model, and the artifact it makes."""

from __future__ import annotations

from pathlib import Path

import pytest
from artifact_models import build

import attncompiler
from attncompiler.emit import CompiledModel


@pytest.fixture
def model() -> CompiledModel:
    return build()


@pytest.fixture
def saved(model: CompiledModel, tmp_path: Path) -> Path:
    return attncompiler.save(model, tmp_path / "small")
