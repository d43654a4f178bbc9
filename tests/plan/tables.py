"""Measured tables made up for tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attncompiler.measured import Bucket, Entry, Run, Times

RUN = Run(device="Some Device", date="2026-11-26", versions={"torch": "2.13.0"})


def bucket(kind: str = "causal", *, dtype: str = "float32", step: bool = False, **levels: int) -> Bucket:
    sizes = {"width": 3, "block": 0, "group": 0, "density": 0, "length": 11}
    return Bucket(dtype=dtype, kind=kind, step=step, levels=sizes | levels)


def entry(kernels: Mapping[str, float | tuple[float, float | None]], run: Run = RUN, **where: Any) -> Entry:
    """Attention's kernels with their seconds: of both ways, or (forward, both)."""
    times = {
        name: Times(forward=each[0], both=each[1]) if isinstance(each, tuple) else Times(forward=each, both=each)
        for name, each in kernels.items()
    }
    return Entry(mechanism="attention", bucket=bucket(**where), run=run, kernels=times)
