"""The attention layer is HF's: outputs and gradients with the same weights, with grouped heads, windows and padding.

HF's layer runs inside HF's one-layer model, which hands it rotary tables and mask as it does in use.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_layers import assert_same
from torch import Tensor, nn

from attncompiler.mechanisms.attention.layer import Attention
from attncompiler.mechanisms.attention.mechanism import AttentionPolicy
from attncompiler.runtime.context import MixerContext

LENGTH = 13
MASKS = {
    "no padding": None,
    "left": torch.tensor([[1] * LENGTH, [0] * 5 + [1] * (LENGTH - 5)]),
    "right": torch.tensor([[1] * LENGTH, [1] * (LENGTH - 5) + [0] * 5]),
}
KERNELS = ["sdpa", "chunkwise", "eager"]


def layer(kernel: str, **options: Any) -> Attention:
    """Rotary over heads 8 wide, in a model 32 wide; norms start at something else than 1."""
    context = MixerContext(
        hidden_size=32,
        layer_index=0,
        num_layers=1,
        max_position_embeddings=64,
        norm_eps=1e-3,
        chain=(kernel,),
        on_failure="raise",
    )
    policy = {"kind": "attention", "num_attention_heads": 4, "rope_parameters": {}, **options}
    made = Attention(AttentionPolicy(**policy), context)
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
    given = {"intermediate_size": 16, "rms_norm_eps": 1e-3, "use_cache": False, "attn_implementation": "eager"}
    config = getattr(transformers, f"{name}Config")(**{**sizes, **given, **options})
    return getattr(transformers, f"{name}Model")(config).eval()


def compare(ours: Attention, theirs: nn.Module, mask: Tensor | None) -> None:
    """Of real tokens: what comes out, and the gradients of the input and of every weight."""
    attention = theirs.layers[0].self_attn
    attention.load_state_dict(ours.state_dict())
    seen: dict[str, Tensor] = {}
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(given=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    attention.register_forward_hook(lambda module, args, out: seen.update(out=out[0]))
    embeds = torch.randn(2, LENGTH, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    theirs(inputs_embeds=embeds, attention_mask=mask)
    hidden = seen["given"].detach().requires_grad_()
    outs = ours(hidden, attention_mask=mask)[0], seen["out"]
    assert_same((ours, attention), (hidden, seen["given"]), outs, mask, atol=1e-4)


@pytest.mark.parametrize("by", KERNELS)
@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize("options", [{}, {"num_key_value_heads": 2}, {"num_key_value_heads": 1}], ids=str)
def test_the_layer_is_llamas(options: dict[str, Any], side: str, by: str) -> None:
    theirs = of_hf("Llama", **{"num_key_value_heads": 4, **options})
    compare(layer(by, **options), theirs, MASKS[side])


@pytest.mark.parametrize("by", KERNELS)
def test_with_biases_it_is_llamas_too(by: str) -> None:
    compare(layer(by, attention_bias="all"), of_hf("Llama", num_key_value_heads=4, attention_bias=True), None)


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
