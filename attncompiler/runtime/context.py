"""What a mixer's layer is told about the model around it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MixerContext:
    """The facts of the model and of the plan that a layer needs beside its policy."""

    hidden_size: int
    layer_index: int
    num_layers: int
    max_position_embeddings: int
    norm_eps: float
    chain: tuple[str, ...]
    on_failure: str = "next"
    deterministic: bool = False
    backward: str | None = None
    """the kernel whose backward is tried first, where that is not the first of the chain"""

    @property
    def label(self) -> str:
        """How records and warnings name the site."""
        return f"layers.{self.layer_index}.mixer"
