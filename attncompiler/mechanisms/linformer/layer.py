"""The Linformer layer: projections of tokens, projections along the sequence, and one site."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attncompiler.errors import InputError, fail
from attncompiler.mechanisms.linformer.mechanism import LinformerPolicy
from attncompiler.mechanisms.linformer.op import OPERATOR, LinformerOptions, check
from attncompiler.runtime.context import MixerContext
from attncompiler.runtime.site import Site

State = dict[str, Tensor]


class LinformerSite(Site):
    """Runs Linformer's attention over whole sequences."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_projection: Tensor,
        value_projection: Tensor,
        segment_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        state: State | None = None,
    ) -> tuple[Tensor, None]:
        """q, k, v (B, T, H, D), projections ([H,] R, P) → out (B, T, H, D).

        Raises InputError (E503) for decoding.
        """
        if state is not None:
            raise _not_stepwise(self.chain.label)
        tensors = check(q, k, v, key_projection, value_projection, segment_ids, attention_mask)
        return OPERATOR(tensors, self.options, self.handle)["out"], None


class Linformer(nn.Module):
    """q, k, v projections, key_projection and value_projection along the sequence, the site, the output projection.

    `share: none` has a projection per head, `heads` one for all heads, `kv` the same one for keys and values too: then
    there is no value_projection (Wang et al. 2020, section 4, parameter sharing).
    """

    def __init__(self, policy: LinformerPolicy, context: MixerContext):
        super().__init__()
        self.policy, self.context = policy, context
        M, H = context.hidden_size, policy.num_attention_heads
        D = self.head_width = policy.head_width(M)
        qkv_bias = policy.attention_bias in ("qkv", "all")
        self.q_proj = nn.Linear(M, H * D, bias=qkv_bias)
        self.k_proj = nn.Linear(M, H * D, bias=qkv_bias)
        self.v_proj = nn.Linear(M, H * D, bias=qkv_bias)
        self.o_proj = nn.Linear(H * D, M, bias=policy.attention_bias == "all")
        shape = policy.projection_shape(context.max_position_embeddings)
        self.key_projection = nn.Parameter(torch.empty(shape))
        self.value_projection = None if policy.share == "kv" else nn.Parameter(torch.empty(shape))
        self.reset_parameters()
        options = LinformerOptions(deterministic=context.deterministic)
        self.site = LinformerSite("linformer", options, context.chain)

    def reset_parameters(self) -> None:
        """Draw the projections along the sequence again, from torch's own generator."""
        for projection in (self.key_projection, self.value_projection):
            if projection is not None:
                nn.init.normal_(projection, std=self.policy.projected_length**-0.5)

    def initial_value(self, name: str, generator: torch.Generator) -> Tensor:
        """How a projection along the sequence starts: normal with variance 1/R (theorem 2 of the paper)."""
        shape = self.policy.projection_shape(self.context.max_position_embeddings)
        return torch.empty(shape).normal_(0, self.policy.projected_length**-0.5, generator=generator)

    def forward(
        self,
        hidden: Tensor,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        state: State | None = None,
    ) -> tuple[Tensor, State | None]:
        """hidden (B, T, M), segment_ids and attention_mask (B, T) → (B, T, M), and no state. No sequence is longer
        than the projections have columns."""
        q = self.q_proj(hidden).unflatten(-1, (-1, self.head_width))
        k = self.k_proj(hidden).unflatten(-1, (-1, self.head_width))
        v = self.v_proj(hidden).unflatten(-1, (-1, self.head_width))
        keys = self.key_projection
        values = keys if self.value_projection is None else self.value_projection
        out, state = self.site(q, k, v, keys, values, segment_ids, attention_mask, state)
        return self.o_proj(out.flatten(-2)), state

    def init_state(self, batch: int, max_length: int, device: torch.device, dtype: torch.dtype) -> State:
        """Raises InputError (E503): Linformer cannot be run step by step."""
        raise _not_stepwise(self.context.chain.label)


def _not_stepwise(label: str) -> Exception:
    return fail(
        InputError,
        "E503",
        f"{label}: linformer projects the whole sequence before its first output, and cannot be run step by step",
        remedy="run the model on whole sequences",
    )
