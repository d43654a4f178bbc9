"""Every number that the grammar takes is one that a model can be made with, or a coded error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from tiny import text

from attncompiler import build
from attncompiler.errors import AttnCompilerError, PlanError, SpecError
from attncompiler.mechanisms.base import discover
from attncompiler.spec import parse
from attncompiler.spec.model import ModelSpec

NEEDED = {"num_attention_heads": 4, "projected_length": 4, "head_dim": 16}
EXTREMES = (2**40 - 1, 2**20 - 1, 2**10 - 1, 1e29, 1e-300)


def fields() -> Iterator[tuple[str, str]]:
    for mechanism in discover().values():
        for name in mechanism.policy.model_fields:
            yield mechanism.name, name


def valid(mechanism: str, name: str, value: float) -> ModelSpec | None:
    known = {key: needed for key, needed in NEEDED.items() if key in discover()[mechanism].policy.model_fields}
    options = ", ".join(f"{key}: {each}" for key, each in {"kind": mechanism, **known, name: value}.items())
    try:
        return parse(text(f"{{{options}}}", layers=1))
    except SpecError:
        return None


@pytest.mark.parametrize(("mechanism", "name"), list(fields()))
def test_the_largest_and_smallest_values_make_a_model(mechanism: str, name: str) -> None:
    for value in EXTREMES:
        spec = valid(mechanism, name, value)
        if spec is None:
            continue
        with contextlib.suppress(PlanError):  # an option that is not built: a refusal in words
            assert build(spec, device="meta").spec == spec


def test_some_extremes_are_valid() -> None:
    assert sum(valid(*field, value) is not None for field in fields() for value in EXTREMES) > 40


def test_products_that_no_tensor_holds_are_refused() -> None:
    projected = "{kind: linformer, num_attention_heads: 4, projected_length: 524288}"
    with pytest.raises(AttnCompilerError, match=r"E101 a projection of .* fits nowhere"):
        parse(text(projected), overrides=["model.max_position_embeddings=549755813888"])
