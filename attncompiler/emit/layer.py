"""One layer: a mixer and a feed-forward part with their norms, before they are traced."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from attncompiler.blocks.mlp import GatedMLP, PlainMLP
from attncompiler.blocks.norm import make_norm
from attncompiler.mechanisms.base import discover, load_entry
from attncompiler.runtime.context import MixerContext
from attncompiler.spec import ModelSpec, ResolvedLayer


class Layer(nn.Module):
    """A layer in one of four forms, by `model.norm.position` and `model.block`.

    pre: x + mixer(norm(x)); post: norm(x + mixer(x)); sandwich: x + norm(mixer(norm(x))); then the same with the MLP.
    A parallel block adds mixer and MLP of one norm: x + mixer(norm(x)) + mlp(norm(x)).
    """

    def __init__(self, spec: ModelSpec, layer: ResolvedLayer, context: MixerContext):
        super().__init__()
        model, width = spec.model, spec.model.hidden_size
        self.position, self.block = model.norm.position, model.block
        self.mixer_norm = make_norm(model.norm.kind, width, model.norm.eps)
        self.mixer = load_entry(discover()[layer.policy.kind].layer)(layer.policy, context)
        mlp = layer.mlp
        self.has_mlp = mlp.kind != "none"
        if mlp.kind != "none":
            make = GatedMLP if mlp.kind == "gated" else PlainMLP
            self.mlp = make(width, mlp.intermediate_size, mlp.hidden_act, mlp.bias)
            if self.block == "sequential":
                self.mlp_norm = make_norm(model.norm.kind, width, model.norm.eps)
        if self.position == "sandwich":
            self.mixer_post_norm = make_norm(model.norm.kind, width, model.norm.eps)
            if self.has_mlp:
                self.mlp_post_norm = make_norm(model.norm.kind, width, model.norm.eps)

    def forward(
        self,
        hidden: Tensor,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        state: dict[str, Any] | None = None,
    ) -> tuple[Tensor, dict[str, Any] | None]:
        """hidden (B, T, M) → (B, T, M), and the layer's decode state when one was given."""
        normed = hidden if self.position == "post" else self.mixer_norm(hidden)
        mixed, state = self.mixer(normed, position_ids, segment_ids, attention_mask, state)
        if self.position == "sandwich":
            mixed = self.mixer_post_norm(mixed)
        if self.block == "parallel":
            if self.has_mlp:
                mixed = mixed + self._fed(normed)
            hidden = hidden + mixed
            return (self.mixer_norm(hidden) if self.position == "post" else hidden), state
        hidden = hidden + mixed
        if self.position == "post":
            hidden = self.mixer_norm(hidden)
        if not self.has_mlp:
            return hidden, state
        fed = self._fed(hidden if self.position == "post" else self.mlp_norm(hidden))
        hidden = hidden + fed
        return (self.mlp_norm(hidden) if self.position == "post" else hidden), state

    def _fed(self, x: Tensor) -> Tensor:
        fed = self.mlp(x)
        return self.mlp_post_norm(fed) if self.position == "sandwich" else fed
