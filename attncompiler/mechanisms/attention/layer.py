"""The attention layer: projections, norms of queries and keys, rotary, and one site."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attncompiler.blocks.alibi import Alibi
from attncompiler.blocks.norm import L2Norm, RMSNorm
from attncompiler.blocks.rotary import Rotary
from attncompiler.mechanisms.attention.mechanism import AttentionPolicy
from attncompiler.mechanisms.attention.op import OPERATOR, AttentionOptions, check, new_seed
from attncompiler.mechanisms.attention.pattern import retained
from attncompiler.mechanisms.attention.state import State, extend, init_state, moved
from attncompiler.runtime.context import Chain, MixerContext
from attncompiler.runtime.operator import options_text
from attncompiler.runtime.site import Site


class AttentionSite(Site):
    """Runs attention over the new tokens and, in decoding, over the cache. Dropout acts in training alone."""

    def __init__(self, options: AttentionOptions, chain: Chain):
        super().__init__("attention", options, chain)
        self.retention = retained(options.pattern)
        self.dropout = options.dropout
        self.options_in_evaluation = options_text(options.model_copy(update={"dropout": 0.0}))

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segment_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        state: State | None = None,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
    ) -> tuple[Tensor, State | None]:
        """q (B, T, H, D), k (B, T, K, D), v (B, T, K, V) → out (B, T, H, V) and the cache, when one was given.

        sinks and alibi_slopes (H,) are the operator's.
        """
        scores = {"sinks": sinks, "alibi_slopes": alibi_slopes}
        if state is None:
            return self._run(q=q, k=k, v=v, segment_ids=segment_ids, attention_mask=attention_mask, **scores), None
        q, reading, state, place = extend(self.retention, state, q, k, v, attention_mask, scores)
        out = self._run(q=q, **reading, **scores)
        return out if place is None else moved(out, place), state

    def _run(self, **inputs: Any) -> Tensor:
        tensors, options = check(**inputs), self.options_in_evaluation
        if self.training and self.dropout:
            tensors["dropout_seed"], options = new_seed(inputs["q"].device), self.options
        return OPERATOR(tensors, options, self.handle)["out"]


class Attention(nn.Module):
    """q, k, v projections, optional norms and rotary, the site, and the output projection; HF's parameter names."""

    def __init__(self, policy: AttentionPolicy, context: MixerContext):
        super().__init__()
        self.policy, self.context = policy, context
        M, D, V = context.hidden_size, policy.key_width(context.hidden_size), policy.value_width(context.hidden_size)
        self.key_width, self.value_width = D, V
        qkv_bias = policy.attention_bias in ("qkv", "all")
        self.q_proj = nn.Linear(M, policy.num_attention_heads * D, bias=qkv_bias)
        self.k_proj = nn.Linear(M, policy.kv_heads * D, bias=qkv_bias)
        self.v_proj = nn.Linear(M, policy.kv_heads * V, bias=qkv_bias)
        self.o_proj = nn.Linear(policy.num_attention_heads * V, M, bias=policy.attention_bias == "all")
        if policy.qk_norm == "rms":
            self.q_norm: nn.Module | None = RMSNorm(D, context.norm_eps)
            self.k_norm: nn.Module | None = RMSNorm(D, context.norm_eps)
        elif policy.qk_norm == "l2":
            self.q_norm, self.k_norm = L2Norm(context.norm_eps), L2Norm(context.norm_eps)
        else:
            self.q_norm = self.k_norm = None
        self.rotary = Rotary(D, rope, context.max_position_embeddings) if (rope := policy.rope_parameters) else None
        self.sinks = nn.Parameter(torch.empty(policy.num_attention_heads)) if policy.sinks else None
        self.alibi = Alibi(policy.num_attention_heads) if policy.alibi else None
        scalar = policy.query_pre_attn_scalar
        self.site = AttentionSite(
            AttentionOptions(
                pattern=policy.pattern,
                scale=None if scalar is None else scalar**-0.5,
                softcap=policy.attn_logit_softcapping,
                dropout=policy.attention_dropout,
                layer=context.layer_index if policy.pattern.kind == "random" else 0,
                deterministic=context.deterministic,
            ),
            context.chain,
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
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            q, k = self.rotary(q, k, position_ids, state)
        slopes = None if self.alibi is None else self.alibi(q)
        out, state = self.site(q, k, v, segment_ids, attention_mask, state, self.sinks, slopes)
        return self.o_proj(out.flatten(-2)), state

    def initial_value(self, name: str, generator: torch.Generator) -> Tensor:
        """How sinks start: normal with a deviation of 0.02, as GPT-OSS's do."""
        return torch.empty(self.policy.num_attention_heads).normal_(0, 0.02, generator=generator)

    def init_state(self, batch: int, max_length: int, device: torch.device, dtype: torch.dtype) -> State:
        """An empty cache for B sequences of up to `max_length` tokens."""
        state = init_state(self.policy, self.context, batch, max_length, device, dtype)
        return state if self.rotary is None else {**state, **self.rotary.init_state(batch, max_length, device)}
