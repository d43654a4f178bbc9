"""Predicted FLOPs and parameters are those of the emitted model, to the last one."""

from __future__ import annotations

import pytest
import torch
from small_specs import NAMES, example, small
from torch._subclasses.fake_tensor import FakeTensorMode
from training_step import batch_of, flops

from attncompiler.planning import plan
from attncompiler.planning.cost import model_cost
from attncompiler.spec.model import ModelSpec

ATTENTION = "{kind: attention, num_attention_heads: 4, pattern: {kind: full}}"
FORMS: dict[str, ModelSpec] = {
    "post": small(ATTENTION, norm="{kind: layernorm, position: post}"),
    "sandwich": small(ATTENTION, norm="{position: sandwich}", mlp="{kind: plain, intermediate_size: 40, bias: true}"),
    "parallel": small(ATTENTION, block="parallel"),
    "no_mlp": small(ATTENTION, mlp="{kind: none}"),
    "learned": small(
        ATTENTION, embedding="{positions: learned, token_types: 0, norm: true}", max_position_embeddings="256"
    ),
    "untied": small(ATTENTION, head="{kind: lm, bias: true, final_logit_softcapping: 20.0}"),
    "shared": small(
        ATTENTION,
        ATTENTION,
        layers="[{policy: p0, share: a}, {policy: p1}, {policy: p0, share: a}, {policy: p0, share: b}]",
    ),
    "mean": small(ATTENTION, head="{kind: classifier, num_labels: 3, pooling: mean}"),
    "embeds": small(
        ATTENTION,
        input="embeds",
        vocab_size=None,
        head="{kind: classifier, num_labels: 3, pooling: last}",
        norm="{position: pre}",
    ),
    "mamba": small("{kind: mamba, state_size: 8, dt_bc_norm: true, use_bias: true, use_conv_bias: false}"),
    "mamba2": small("{kind: mamba2, state_size: 16, head_dim: 8, n_groups: 2, use_bias: true}"),
    "mamba2_gate": small("{kind: mamba2, state_size: 16, head_dim: 8, rms_norm: false}"),
    "mamba2_norm_first": small("{kind: mamba2, state_size: 16, head_dim: 8, norm_before_gate: true}"),
    "linear": small("{kind: linear_attention, num_attention_heads: 4, causal: false, rope_parameters: {}}"),
    "performer": small(
        "{kind: linear_attention, num_attention_heads: 4, v_head_dim: 6, feature_map: favor, redraw_interval: 3}",
        "{kind: linear_attention, num_attention_heads: 2, causal: false, feature_map: favor, num_features: 40}",
    ),
    "decays": small(
        "{kind: linear_attention, num_attention_heads: 4, decay: scalar}",
        "{kind: linear_attention, num_attention_heads: 4, decay: retention, feature_map: identity, normalize: false}",
    ),
    "linformer": small(
        "{kind: linformer, num_attention_heads: 4, projected_length: 8, share: kv}",
        "{kind: linformer, num_attention_heads: 2, projected_length: 16, share: none}",
        max_position_embeddings="256",
    ),
    "bfloat16": small(
        ATTENTION,
        "{kind: mamba2, state_size: 16, head_dim: 8}",
        "{kind: mamba, state_size: 8}",
        "{kind: linear_attention, num_attention_heads: 4}",
        "{kind: linear_attention, num_attention_heads: 4, feature_map: favor, decay: scalar}",
        dtype="bfloat16",
    ),
    "rotary": small(
        "{kind: attention, num_attention_heads: 1, head_dim: 128, rope_parameters: {rope_type: yarn, factor: 4.0, "
        "partial_rotary_factor: 0.5, interleaved: true}}",
        mlp="{kind: none}",
        dtype="bfloat16",
    ),
    "dynamic": small(
        "{kind: attention, num_attention_heads: 1, head_dim: 128, rope_parameters: {rope_type: dynamic, factor: 2.0, "
        "original_max_position_embeddings: 16}}",
        "{kind: linear_attention, num_attention_heads: 1, head_dim: 128, rope_parameters: {rope_type: dynamic, "
        "factor: 2.0}}",
        mlp="{kind: none}",
    ),
    "wide_heads": small(
        "{kind: attention, num_attention_heads: 6, num_key_value_heads: 2, head_dim: 10, v_head_dim: 12, "
        "attention_bias: qkv, qk_norm: rms, rope_parameters: {rope_theta: 1000.0, partial_rotary_factor: 0.6}}"
    ),
}


def check(spec: ModelSpec, batch: int, length: int) -> None:
    from attncompiler.emit import emit

    planned = plan(spec, "cpu", batch=batch, seq_len=length)
    model = emit(spec, planned, device="cpu")
    cost = model_cost(spec, planned)
    inputs, labels = batch_of(spec, batch, length)
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    stored = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert cost.memory.parameters == stored
    with torch.no_grad():
        assert cost.forward_flops == flops(lambda: model(inputs))
    assert cost.training_flops == flops(lambda: model.loss(inputs, labels).backward())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "hybrid_13b"])
def test_flops_are_torchs_for_every_example(name: str) -> None:
    check(example(name), batch=2, length=80)


@pytest.mark.parametrize("form", FORMS)
def test_flops_are_torchs_for_every_form_of_model(form: str) -> None:
    check(FORMS[form], batch=3, length=17)


def test_flops_are_torchs_for_13_billion_parameters() -> None:
    """Without weights and without running: shapes alone, in torch's fake mode."""
    from attncompiler.emit import emit

    spec = example("hybrid_13b")
    planned = plan(spec, "a6000", seq_len=1024)
    model = emit(spec, planned, device="meta")
    cost = model_cost(spec, planned)
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        inputs, labels = (torch.zeros(1, 1024, dtype=torch.int64) for _ in range(2))
        assert cost.training_flops == flops(lambda: model.loss(inputs, labels).backward())


def test_parameters_of_hybrid_13b() -> None:
    spec = example("hybrid_13b")
    cost = model_cost(spec, plan(spec, "a6000"))
    assert abs(cost.parameters / 13.14e9 - 1) < 0.005
