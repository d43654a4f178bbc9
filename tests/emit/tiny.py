"""Tiny specs, one per mixer kind and form of layer, for tests of emitted models."""

from __future__ import annotations

import torch
from torch import Tensor

from attncompiler import spec as specs
from attncompiler.emit import CompiledModel
from attncompiler.pipeline import build
from attncompiler.spec.model import ModelSpec

MIXERS = {
    "attention": "{kind: attention, num_attention_heads: 4, num_key_value_heads: 2, qk_norm: rms, attention_bias: all, "
    "rope_parameters: {rope_type: default}}",
    "window": "{kind: attention, num_attention_heads: 4, num_key_value_heads: 1, "
    "rope_parameters: {rope_type: default}, pattern: {kind: sliding_window, window: 5, global_tokens: 2}}",
    "strided": "{kind: attention, num_attention_heads: 2, pattern: {kind: strided, stride: 3, window: 2}}",
    "local_global": "{kind: attention, num_attention_heads: 4, alibi: true, query_pre_attn_scalar: 5.0, "
    "pattern: {kind: local_global, block_size: 3, local_blocks: 1, global_blocks: 1}}",
    "random": "{kind: attention, num_attention_heads: 2, v_head_dim: 12, rope_parameters: {rope_type: default}, "
    "pattern: {kind: random, block_size: 2, random_blocks: 1}}",
    "chunked": "{kind: attention, num_attention_heads: 4, num_key_value_heads: 2, sinks: true, qk_norm: l2, "
    "attn_logit_softcapping: 3.0, pattern: {kind: chunked, chunk: 6}}",
    "linear_attention": "{kind: linear_attention, num_attention_heads: 2}",
    "performer": "{kind: linear_attention, num_attention_heads: 2, feature_map: favor, num_features: 24}",
    "retention": "{kind: linear_attention, num_attention_heads: 2, feature_map: identity, normalize: false, "
    "decay: retention, scale: 0.25, rope_parameters: {rope_type: default}}",
    "gated": "{kind: linear_attention, num_attention_heads: 2, decay: scalar}",
    "mamba": "{kind: mamba, state_size: 4}",
    "mamba2": "{kind: mamba2, state_size: 8, head_dim: 16, expand: 2, chunk_size: 8}",
}
ENCODERS = {
    "full": "{kind: attention, num_attention_heads: 4, pattern: {kind: full}}",
    "bigbird": "{kind: attention, num_attention_heads: 4, alibi: true, pattern: {kind: random, block_size: 2, "
    "random_blocks: 1, global_blocks: 1, causal: false}}",
    "both_ways": "{kind: linear_attention, num_attention_heads: 2, causal: false}",
    "performer_both_ways": "{kind: linear_attention, num_attention_heads: 2, causal: false, feature_map: favor}",
    "linformer": "{kind: linformer, num_attention_heads: 4, projected_length: 8}",
}
FORMS = {
    "post": "norm: {kind: layernorm, position: post}",
    "sandwich": "norm: {kind: rmsnorm, position: sandwich}",
    "parallel": "block: parallel",
    "plain_mlp": "mlp: {kind: plain, intermediate_size: 48, hidden_act: gelu, bias: true}",
    "no_mlp": "mlp: {kind: none}",
    "learned": "embedding: {positions: learned, norm: true, multiplier: 2.0}",
    "untied": "head: {kind: lm, tie_word_embeddings: false, bias: true, final_logit_softcapping: 20.0}",
}
MLP = "mlp: {kind: gated, intermediate_size: 48}"
HEAD = "head: {kind: lm, tie_word_embeddings: true}"


def text(*policies: str, extra: str = "", layers: int = 2, model: str = "") -> str:
    """A spec of `layers` layers for each of the given policies (flow mappings)."""
    names = [f"p{i}" for i in range(len(policies))]
    lines = [
        "spec_version: 1",
        "name: tiny",
        "model:",
        "  input: tokens",
        "  vocab_size: 64",
        "  hidden_size: 32",
        "  max_position_embeddings: 64",
    ]
    lines += [f"  {line}" for line in (MLP, HEAD) if line.partition(":")[0] not in model]
    lines += [f"  {model}"] if model else []
    lines += ["policies:", *(f"  {name}: {policy}" for name, policy in zip(names, policies, strict=True))]
    lines += ["layers:", *(f"  - {{repeat: {layers}, layers: [{{policy: {name}}}]}}" for name in names)]
    lines += ["targets: [cpu]", extra]
    return "\n".join(lines) + "\n"


def spec(*policies: str, extra: str = "", layers: int = 2, model: str = "") -> ModelSpec:
    return specs.parse(text(*policies, extra=extra, layers=layers, model=model))


def model(*policies: str, extra: str = "", layers: int = 2, form: str = "") -> CompiledModel:
    return build(spec(*policies, extra=extra, layers=layers, model=form), device="cpu")


def tokens(batch: int = 2, length: int = 19, seed: int = 0) -> Tensor:
    return torch.randint(64, (batch, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: CompiledModel) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found
