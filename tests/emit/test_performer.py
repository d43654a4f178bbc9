"""A model's random projections: kept with its weights, and drawn anew in training alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import MIXERS, model, tokens
from torch import Tensor

from attncompiler import pipeline
from attncompiler.emit import CompiledModel

REDRAWN = MIXERS["performer"].replace("num_features: 24", "num_features: 24, redraw_interval: 2")


def projections(built: CompiledModel) -> list[Tensor]:
    return [layer.mixer.random_features.projection.clone() for layer in built.layers.values()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def train(built: CompiledModel, steps: int) -> list[list[Tensor]]:
    """The projections that each of so many training steps used."""
    used = []
    for step in range(steps):
        built.loss(tokens(seed=step), tokens(seed=step + 1)).backward()
        used.append(projections(built))
    return used


def test_projections_are_drawn_anew_in_training_alone() -> None:
    built = model(REDRAWN)
    first = projections(built)
    assert not torch.equal(first[0], first[1]), "each layer draws its own"
    one, two, three, four, five = train(built, 5)
    assert same(first, one)
    assert same(one, two)
    assert not any(map(torch.equal, two, three))
    assert same(three, four)
    assert not any(map(torch.equal, four, five))
    built.eval()
    for _ in range(5):
        built(tokens())
    assert same(projections(built), five)


def test_decoding_in_training_mode_keeps_the_projection_of_its_state() -> None:
    built = model(REDRAWN)
    train(built, 2)
    state = built.init_state(2, 20)
    found = []
    for piece in tokens(2, 9).split(1, 1):
        logits, state = built.step(piece, state)
        found.append(logits)
    torch.testing.assert_close(torch.cat(found, 1), built.eval()(tokens(2, 9)), rtol=1e-4, atol=1e-5)


def test_a_saved_model_goes_on_where_it_was(tmp_path: Path) -> None:
    """Its projections, and when and as what the next are drawn."""
    built = model(REDRAWN)
    train(built, 3)
    pipeline.save(built, tmp_path / "saved")
    loaded = pipeline.load(tmp_path / "saved", device="cpu")
    assert same(projections(loaded), projections(built))
    torch.testing.assert_close(loaded(tokens()), built(tokens()))  # both count a forward
    assert all(same(a, b) for a, b in zip(train(loaded, 4), train(built, 4), strict=True))


def test_two_builds_of_a_spec_draw_alike() -> None:
    one, other = model(REDRAWN), model(REDRAWN)
    assert all(same(a, b) for a, b in zip(train(one, 5), train(other, 5), strict=True))


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_projections_are_never_low_in_precision(dtype: str) -> None:
    built = model(REDRAWN, form=f"dtype: {dtype}")
    wide = torch.float64 if dtype == "float64" else torch.float32
    assert all(projection.dtype == wide for projection in projections(built))
    assert built(tokens()).isfinite().all()


def test_a_model_that_redraws_compiles_as_one_graph_and_draws_as_before() -> None:
    built, plain = model(REDRAWN, layers=1), model(REDRAWN, layers=1)
    compiled = torch.compile(built, fullgraph=True, backend="aot_eager")
    for step in range(5):
        torch.testing.assert_close(compiled(tokens(seed=step)), plain(tokens(seed=step)))
    assert same(projections(built), projections(plain))
    assert not same(projections(built), projections(model(REDRAWN, layers=1)))
