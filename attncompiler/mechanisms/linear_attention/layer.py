"""The linear attention layer: projections, rotary, random features, decays, and one site."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attncompiler.blocks.autocast import wide
from attncompiler.blocks.random_features import RandomFeatures
from attncompiler.blocks.rotary import Rotary
from attncompiler.mechanisms.linear_attention.mechanism import LinearAttentionPolicy
from attncompiler.mechanisms.linear_attention.op import OPERATOR, LinearAttentionOptions, check
from attncompiler.mechanisms.linear_attention.state import init_state
from attncompiler.runtime.context import Chain, MixerContext
from attncompiler.runtime.site import Site

State = dict[str, Tensor]
GATE_LOGIT_NORMALIZER = 16
"""What a scalar decay's logarithm is divided by, as in fla's simple GLA: a gate of 0 halves a state in 16 tokens."""


def retention_decay(num_heads: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """log γ of each head (H,), γ[h] = 1 − 2^(−5−h) (Sun et al. 2023, https://arxiv.org/abs/2307.08621, equation 8)."""
    exponents = -5 - torch.arange(num_heads, device=device, dtype=dtype)
    return torch.log1p(-torch.exp2(exponents))


class LinearAttentionSite(Site):
    """Runs linear attention over the new tokens, from the state that the ones before them left."""

    def __init__(self, options: LinearAttentionOptions, chain: Chain, retention: bool):
        super().__init__("linear_attention", options, chain)
        self.retention = retention

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor | None = None,
        projection: Tensor | None = None,
        segment_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        state: State | None = None,
    ) -> tuple[Tensor, State | None]:
        """q, k (B, T, H, D), v (B, T, H, V) → out (B, T, H, V) and the state after them, when one was given.

        `gate` (B, T, H) makes the decays, sigmoid(gate)^(1/16); `projection` (R, D) favor's features.
        """
        log_decay = None
        if self.retention:
            log_decay = retention_decay(q.shape[2], q.device, wide(q.dtype))
        elif gate is not None:
            log_decay = F.logsigmoid(gate.to(wide(gate.dtype))) / GATE_LOGIT_NORMALIZER
        initial = None if state is None else (state["s"], state["z"], state["m"])
        tensors = check(q, k, v, initial, segment_ids, attention_mask, projection, log_decay)
        results = OPERATOR(tensors, self.options, self.handle)
        if state is None:
            return results["out"], None
        return results["out"], {**state, **{name: results[f"final_{name}"] for name in ("s", "z", "m")}}


class LinearAttention(nn.Module):
    """q, k, v projections, optional rotary before the feature map, the site, and the output projection.

    With decay scalar `gk_proj` gives a gate of each token and head; its name is that of fla's simple GLA (Yang et al.
    2024, https://arxiv.org/abs/2312.06635, whose decays are of each channel).
    """

    def __init__(self, policy: LinearAttentionPolicy, context: MixerContext):
        super().__init__()
        self.policy, self.context = policy, context
        M, H = context.hidden_size, policy.num_attention_heads
        D, V = policy.key_width(M), policy.value_width(M)
        self.key_width, self.value_width = D, V
        qkv_bias = policy.attention_bias in ("qkv", "all")
        self.q_proj = nn.Linear(M, H * D, bias=qkv_bias)
        self.k_proj = nn.Linear(M, H * D, bias=qkv_bias)
        self.v_proj = nn.Linear(M, H * V, bias=qkv_bias)
        self.o_proj = nn.Linear(H * V, M, bias=policy.attention_bias == "all")
        self.gk_proj = nn.Linear(M, H) if policy.decay == "scalar" else None
        self.rotary = Rotary(D, rope, context.max_position_embeddings) if (rope := policy.rope_parameters) else None
        self.random_features = None
        if policy.feature_map == "favor":
            self.random_features = RandomFeatures(
                policy.feature_count(M), D, policy.orthogonal is not False, policy.redraw_interval
            )
        self.site = LinearAttentionSite(
            LinearAttentionOptions(
                feature_map=policy.feature_map,
                causal=policy.causal,
                normalize=policy.normalize,
                eps=policy.eps,
                scale=policy.scale,
                deterministic=context.deterministic,
            ),
            context.chain,
            retention=policy.decay == "retention",
        )

    def forward(
        self,
        hidden: Tensor,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        state: State | None = None,
    ) -> tuple[Tensor, State | None]:
        """hidden (B, T, M), position_ids (B or 1, T), segment_ids and attention_mask (B, T) → (B, T, M), state."""
        q = self.q_proj(hidden).unflatten(-1, (-1, self.key_width))
        k = self.k_proj(hidden).unflatten(-1, (-1, self.key_width))
        v = self.v_proj(hidden).unflatten(-1, (-1, self.value_width))
        if self.rotary is not None:
            q, k = self.rotary(q, k, position_ids, state)
        gate = None if self.gk_proj is None else self.gk_proj(hidden)
        projection = None if self.random_features is None else self.random_features(state)
        out, state = self.site(q, k, v, gate, projection, segment_ids, attention_mask, state)
        return self.o_proj(out.flatten(-2)), state

    def init_state(self, batch: int, max_length: int, device: torch.device, dtype: torch.dtype) -> State:
        """The state before the first token of B sequences. Raises InputError (E503) for a layer that is not causal."""
        state = init_state(self.policy, self.context, batch, max_length, device, dtype)
        return state if self.rotary is None else {**state, **self.rotary.init_state(batch, max_length, device)}
