"""Specs for the plan's tests: those of specs/, and small ones made from flow mappings."""

from __future__ import annotations

from pathlib import Path

from attncompiler import spec as specs
from attncompiler.spec.model import ModelSpec

ROOT = Path(__file__).parents[2]
PATHS = sorted((ROOT / "specs").glob("*.yaml"))
NAMES = [path.stem for path in PATHS]

TEXT = """
name: small
deterministic: {deterministic}
model:
  {model}
policies:
  {policies}
layers:
  {layers}
targets: [cpu]
fallback: {fallback}
"""
MODEL = {
    "vocab_size": "64",
    "hidden_size": "32",
    "mlp": "{kind: gated, intermediate_size: 48}",
    "head": "{kind: lm, tie_word_embeddings: true}",
}


def example(name: str) -> ModelSpec:
    """A spec of specs/ by its file's stem."""
    return specs.read(ROOT / "specs" / f"{name}.yaml")


def small(
    *policies: str,
    layers: str | None = None,
    fallback: str = "{on_failure: next}",
    deterministic: bool = False,
    **model: str | None,
) -> ModelSpec:
    """A spec with policies p0, p1, … (flow mappings), by default a layer of each.

    `model` replaces keys of the model section, or drops them (None).
    """
    sections = {key: value for key, value in {**MODEL, **model}.items() if value is not None}
    names = [f"p{i}" for i in range(len(policies))]
    return specs.parse(
        TEXT.format(
            deterministic=str(deterministic).lower(),
            model="\n  ".join(f"{key}: {value}" for key, value in sections.items()),
            policies="\n  ".join(f"{name}: {policy}" for name, policy in zip(names, policies, strict=True)),
            layers=layers or "\n  ".join(f"- {{policy: {name}}}" for name in names),
            fallback=fallback,
        )
    )
