"""What a mixer's layer is told about the model around it, and its site about the kernels it may run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Chain:
    """The kernels that a site may run, and what becomes of a call when one of them fails."""

    label: str
    """how records and warnings name the site"""
    kernels: tuple[str, ...]
    """the one that is tried first at the head"""
    on_failure: Literal["next", "raise"] = "next"
    backward: str | None = None
    """the kernel whose backward is tried first, where that is not the first of them"""


@dataclass(frozen=True, slots=True)
class MixerContext:
    """The facts of the model and of the plan that a layer needs beside its policy."""

    hidden_size: int
    layer_index: int
    num_layers: int
    max_position_embeddings: int
    norm_eps: float
    chain: Chain
    deterministic: bool = False
