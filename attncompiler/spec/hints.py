"""Words that people bring from elsewhere, and what this grammar says to them."""

from __future__ import annotations

KINDS_NOT_OFFERED = {
    "moe": "a mixture of experts",
    "mla": "multi-head latent attention",
    "cross_attention": "cross-attention",
    "hyena": "the Hyena operator",
    "rwkv": "the RWKV mixer",
    "delta_net": "the delta rule",
    "deltanet": "the delta rule",
    "gated_deltanet": "the gated delta rule",
    "xlstm": "the xLSTM mixer",
    "reformer": "LSH attention",
}
"""`kind` → what it names; a refusal, not an unknown word."""

KEYS_NOT_OFFERED = {
    "num_experts": "a mixture of experts",
    "num_local_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "num_experts_per_tok": "a mixture of experts",
    "moe_intermediate_size": "a mixture of experts",
    "router_aux_loss_coef": "a mixture of experts",
    "kv_lora_rank": "multi-head latent attention",
    "q_lora_rank": "multi-head latent attention",
    "qk_rope_head_dim": "multi-head latent attention",
    "qk_nope_head_dim": "multi-head latent attention",
    "quantization_config": "quantisation",
    "add_cross_attention": "cross-attention",
    "num_nextn_predict_layers": "multi-token prediction",
}
"""Key → the feature it belongs to."""

KINDS = {
    "gqa": "write kind: attention with num_key_value_heads",
    "mqa": "write kind: attention with num_key_value_heads: 1",
    "mha": "write kind: attention",
    "softmax": "write kind: attention",
    "performer": "write kind: linear_attention with feature_map: favor",
    "linear_transformer": "write kind: linear_attention with feature_map: elu",
    "retention": "write kind: linear_attention with decay: retention",
    "retnet": "write kind: linear_attention with decay: retention",
    "bigbird": "write kind: random",
    "longformer": "write kind: sliding_window with global_tokens",
    "swiglu": "write kind: gated with hidden_act: silu",
    "s6": "write kind: mamba",
    "mamba1": "write kind: mamba",
    "ssd": "write kind: mamba2",
}
"""`kind` under another name → how to write it here."""

KEYS = {
    "sliding_window": "write pattern: {kind: sliding_window, window: ...}",
    "num_hidden_layers": "layers lists the layers: write repeat there",
    "n_layers": "layers lists the layers: write repeat there",
    "n_layer": "layers lists the layers: write repeat there",
    "d_model": "did you mean 'hidden_size'?",
    "n_embd": "did you mean 'hidden_size'?",
    "n_head": "did you mean 'num_attention_heads'?",
    "n_heads": "did you mean 'num_attention_heads'?",
    "num_heads": "did you mean 'num_attention_heads'?",
    "n_kv_heads": "did you mean 'num_key_value_heads'?",
    "rms_norm_eps": "write norm: {kind: rmsnorm, eps: ...}",
    "layer_norm_eps": "write norm: {kind: layernorm, eps: ...}",
    "tie_word_embeddings": "it stands in model.head",
    "torch_dtype": "did you mean 'dtype'?",
}
"""Key under another name → how to write it here."""

BOOLEANS = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}
"""YAML 1.1's words for true and false."""
