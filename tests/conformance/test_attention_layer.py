"""The attention layer is HF's: outputs and gradients with the same weights, with grouped heads, windows and padding.

HF's layer runs inside HF's one-layer model, which hands it rotary tables and mask as it does in use.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_layers import assert_same, widened
from torch import Tensor, nn

from attncompiler.mechanisms.attention.layer import Attention
from attncompiler.mechanisms.attention.mechanism import AttentionPolicy
from attncompiler.runtime.context import Chain, MixerContext

LENGTH = 13
MASKS = {
    "no padding": None,
    "left": torch.tensor([[1] * LENGTH, [0] * 5 + [1] * (LENGTH - 5)]),
    "right": torch.tensor([[1] * LENGTH, [1] * (LENGTH - 5) + [0] * 5]),
}
KERNELS = ["sdpa", "chunkwise", "eager"]


def layer(kernel: str, max_position_embeddings: int = 64, **options: Any) -> Attention:
    """Rotary over heads 8 wide, in a model 32 wide; norms start at something else than 1."""
    context = MixerContext(
        hidden_size=32,
        layer_index=0,
        num_layers=1,
        max_position_embeddings=max_position_embeddings,
        norm_eps=1e-3,
        chain=Chain("layer", (kernel,), "raise"),
    )
    policy = {"kind": "attention", "num_attention_heads": 4, "rope_parameters": {}, **options}
    made = Attention(AttentionPolicy(**policy), context).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            value = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + value / 4 if "norm" in name else value / 32**0.5)
    return made


def of_hf(name: str, **options: Any) -> nn.Module:
    """HF's model of that family, one layer deep and as wide as ours, with attention written out (`eager`)."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "head_dim": 8, "num_hidden_layers": 1, "vocab_size": 8}
    sizes |= {"max_position_embeddings": 64, "pad_token_id": None}
    given = {"intermediate_size": 16, "rms_norm_eps": 1e-3, "use_cache": False, "attn_implementation": "eager"}
    config = getattr(transformers, f"{name}Config")(**{**sizes, **given, **options})
    with widened():
        return getattr(transformers, f"{name}Model")(config).eval().double()


def compare(ours: Attention, theirs: nn.Module, mask: Tensor | None) -> None:
    """Of real tokens: what comes out, and the gradients of the input and of every weight."""
    attention = theirs.layers[0].self_attn
    attention.load_state_dict(ours.state_dict())
    seen: dict[str, Tensor] = {}
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(given=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    attention.register_forward_hook(lambda module, args, out: seen.update(out=out[0]))
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(2, LENGTH, 32, generator=generator, dtype=torch.float64, requires_grad=True)
    with widened():
        theirs(inputs_embeds=embeds, attention_mask=mask)
    hidden = seen["given"].detach().requires_grad_()
    outs = ours(hidden, attention_mask=mask)[0], seen["out"]
    assert_same((ours, attention), (hidden, seen["given"]), outs, mask)


@pytest.mark.parametrize("by", KERNELS)
@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize("options", [{}, {"num_key_value_heads": 2}, {"num_key_value_heads": 1}], ids=str)
def test_the_layer_is_llamas(options: dict[str, Any], side: str, by: str) -> None:
    theirs = of_hf("Llama", **{"num_key_value_heads": 4, **options})
    compare(layer(by, **options), theirs, MASKS[side])


@pytest.mark.parametrize("by", KERNELS)
@pytest.mark.parametrize("groups", [4, 2])
def test_with_biases_it_is_llamas_too(groups: int, by: str) -> None:
    ours = layer(by, attention_bias="all", num_key_value_heads=groups)
    compare(ours, of_hf("Llama", num_key_value_heads=groups, attention_bias=True), None)


@pytest.mark.parametrize("by", KERNELS)
@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize("window", [1, 4, LENGTH + 1])
def test_with_a_window_it_is_mistrals(window: int, side: str, by: str) -> None:
    ours = layer(by, num_key_value_heads=2, pattern={"kind": "sliding_window", "window": window})
    compare(ours, of_hf("Mistral", num_key_value_heads=2, sliding_window=window), MASKS[side])


@pytest.mark.parametrize("by", KERNELS)
def test_with_norms_of_queries_and_keys_it_is_qwen3s(by: str) -> None:
    ours = layer(by, num_key_value_heads=2, qk_norm="rms")
    compare(ours, of_hf("Qwen3", num_key_value_heads=2), MASKS["left"])


# --- rotary -----------------------------------------------------------------------------------------------------

SCALED: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 100.0},
    "linear": {"factor": 3.0, "rope_theta": 100.0},
    "yarn": {"factor": 4.0, "rope_theta": 30.0, "beta_fast": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 100.0,
    },
}
"""what each rope_type needs to be another than the default within so few tokens"""
TYPES = [{"rope_type": rope_type, **options} for rope_type, options in SCALED.items()]


@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize("rope", TYPES, ids=SCALED)
def test_scaled_rotary_is_llamas(rope: dict[str, Any], side: str) -> None:
    ours = layer("sdpa", num_key_value_heads=2, rope_parameters=rope)
    compare(ours, of_hf("Llama", num_key_value_heads=2, rope_parameters=dict(rope)), MASKS[side])


@pytest.mark.parametrize("original", [5, LENGTH - 1, LENGTH, LENGTH + 1])
@pytest.mark.parametrize("said", [True, False], ids=["original length", "model's length"])
def test_rotary_that_follows_the_length_is_llamas(said: bool, original: int) -> None:
    """Without padding, which transformers counts too. Its original length is that of the model."""
    rope: dict[str, Any] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}
    theirs = of_hf("Llama", num_key_value_heads=4, rope_parameters=dict(rope), max_position_embeddings=original)
    if said:
        ours = layer("sdpa", rope_parameters=rope | {"original_max_position_embeddings": original})
    else:
        ours = layer("sdpa", max_position_embeddings=original, rope_parameters=rope)
    compare(ours, theirs, None)


@pytest.mark.parametrize("rope", TYPES, ids=SCALED)
def test_interleaved_rotary_is_coheres(rope: dict[str, Any]) -> None:
    ours = layer("sdpa", num_key_value_heads=2, rope_parameters=rope | {"interleaved": True})
    compare(ours, of_hf("Cohere", num_key_value_heads=2, rope_parameters=dict(rope)), MASKS["left"])


@pytest.mark.parametrize("rope", TYPES, ids=SCALED)
def test_rotary_of_a_part_is_stablelms_and_interleaved_glms(rope: dict[str, Any]) -> None:
    rope = rope | {"partial_rotary_factor": 0.5}
    ours = layer("sdpa", rope_parameters=rope)
    compare(ours, of_hf("StableLm", num_key_value_heads=4, rope_parameters=dict(rope)), MASKS["left"])
    ours = layer("sdpa", attention_bias="qkv", rope_parameters=rope | {"interleaved": True})
    theirs = of_hf("Glm", num_key_value_heads=4, attention_bias=True, rope_parameters=dict(rope))
    compare(ours, theirs, MASKS["left"])


# --- what is done to scores -------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["chunkwise", "eager"])
@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize("window", [4, None])
def test_with_capped_scores_and_a_scale_of_its_own_it_is_gemma2s(window: int | None, side: str, by: str) -> None:
    kind = "sliding_attention" if window else "full_attention"
    theirs = of_hf(
        "Gemma2",
        num_key_value_heads=2,
        attn_logit_softcapping=0.8,
        query_pre_attn_scalar=3,
        sliding_window=window or 4,
        layer_types=[kind],
    )
    pattern = {"kind": "sliding_window", "window": window} if window else {"kind": "causal"}
    scores = {"attn_logit_softcapping": 0.8, "query_pre_attn_scalar": 3.0}
    compare(layer(by, num_key_value_heads=2, pattern=pattern, **scores), theirs, MASKS[side])


@pytest.mark.parametrize("by", KERNELS)
@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize("window", [4, None])
def test_with_sinks_and_yarn_it_is_gpt_oss(window: int | None, side: str, by: str) -> None:
    """Whose yarn does not round the ends of its ramp."""
    rope = {"rope_type": "yarn", "truncate": False, **SCALED["yarn"]}
    theirs = of_hf(
        "GptOss",
        num_key_value_heads=2,
        rope_parameters=dict(rope),
        sliding_window=window or 4,
        layer_types=["sliding_attention" if window else "full_attention"],
        num_local_experts=2,
        num_experts_per_tok=1,
        experts_implementation="eager",
    )
    pattern = {"kind": "sliding_window", "window": window} if window else {"kind": "causal"}
    options = {"attention_bias": "all", "sinks": True, "rope_parameters": rope}
    compare(layer(by, num_key_value_heads=2, pattern=pattern, **options), theirs, MASKS[side])
