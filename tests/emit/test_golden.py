"""The emitted code and the nodes of each mixer, as files to read; `--update-golden` writes them again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import ENCODERS, MIXERS, model

GOLDEN = Path(__file__).parents[1] / "golden" / "emit"


def compare(request: pytest.FixtureRequest, name: str, text: str) -> None:
    path = GOLDEN / name
    if request.config.getoption("--update-golden"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.exists(), f"{path} is missing: run pytest --update-golden"
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", {**MIXERS, **ENCODERS})
def test_nodes_of_a_layer(request: pytest.FixtureRequest, kind: str) -> None:
    """Norms, projections, rotary, convolution and MLP are visible; only the site is opaque."""
    graph = model({**MIXERS, **ENCODERS}[kind], layers=1).layers["0"].graph
    lines = [f"{node.op:<14} {node.name:<24} {_target(node.target)}" for node in graph.nodes]
    compare(request, f"{kind}.nodes.txt", "\n".join(lines) + "\n")


def _target(target: object) -> str:
    """A module's or method's name as it is, a function's without its address."""
    return target if isinstance(target, str) else torch.typename(target)


def test_code_of_a_model(request: pytest.FixtureRequest) -> None:
    built = model(MIXERS["mamba2"], MIXERS["window"], layers=1)
    parts = [built.code, *(built.graphs[name].python_code("self").src for name in ("step", "loss"))]
    parts += [layer.code for layer in built.layers.values()]
    compare(request, "hybrid.code.txt", "\n".join(part.strip() for part in parts) + "\n")
