"""Attention's spec fields and kernels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from attncompiler.mechanisms.attention.buckets import bucket, shapes
from attncompiler.mechanisms.attention.pairs import visible_pairs
from attncompiler.mechanisms.attention.pattern import Causal, Pattern, is_band
from attncompiler.mechanisms.base import (
    ANY,
    AtMost,
    Factor,
    Fault,
    Kernel,
    Mechanism,
    MixerSize,
    Needs,
    OneOf,
    Policy,
    Size,
    Value,
    needs_of_triton,
)
from attncompiler.mechanisms.rope import RopeParameters, rope_faults, rotary_width_faults


class AttentionPolicy(Policy):
    """A softmax attention mixer; field names are HF's where HF has one."""

    kind: Literal["attention"]
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    v_head_dim: Size | None = None
    attention_bias: Literal["none", "qkv", "all"] = "none"
    rope_parameters: RopeParameters | None = None
    pattern: Pattern = Causal()
    qk_norm: Literal["none", "rms", "l2"] = "none"
    query_pre_attn_scalar: Factor | None = None
    attn_logit_softcapping: Factor | None = None
    alibi: bool = False
    sinks: bool = False
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    def key_width(self, hidden_size: int) -> int:
        """D: the width of a query or key head."""
        return self.head_dim or hidden_size // self.num_attention_heads

    def value_width(self, hidden_size: int) -> int:
        """V: the width of a value head."""
        return self.v_head_dim or self.key_width(hidden_size)


def features(policy: AttentionPolicy, model: Any) -> Mapping[str, Value]:
    """What a layer of this policy asks of every kernel; the operator adds what a call's inputs ask."""
    value_width = policy.value_width(model.hidden_size)
    return {
        "pattern": policy.pattern.kind,
        "head_dim": policy.key_width(model.hidden_size),
        "softcap": policy.attn_logit_softcapping,
        "alibi": policy.alibi,
        "sinks": policy.sinks,
        "dropout": policy.attention_dropout,
        "value_width": value_width if value_width != policy.key_width(model.hidden_size) else None,
    }


def sized(policy: AttentionPolicy, size: MixerSize) -> Mapping[str, Value]:
    """The dense mask that a kernel without a form of its own for the pattern would need."""
    plain, band = policy.pattern.kind in ("full", "causal"), is_band(policy.pattern)
    mask_bytes = 0 if plain else size.seq_len**2 * size.itemsize
    return {"mask_bytes": 0 if band else mask_bytes, "band_mask_bytes": mask_bytes if band else 0}


def sees(policy: AttentionPolicy, tokens: int) -> tuple[str, float]:
    """The pattern's kind, and its density over so many tokens."""
    return policy.pattern.kind, visible_pairs(policy.pattern, tokens, tokens) / tokens**2


PLACES = {
    "pattern": ("pattern", "kind"),
    "softcap": ("attn_logit_softcapping",),
    "dropout": ("attention_dropout",),
    "value_width": ("v_head_dim",),
}


def relations(policy: AttentionPolicy, model: Any) -> Iterator[Fault]:
    """Head counts and widths that do not fit together, and rotary options without the ones they need."""
    heads = policy.num_attention_heads
    if policy.num_key_value_heads is not None and heads % policy.num_key_value_heads:
        message = f"num_attention_heads {heads} is not divisible by num_key_value_heads {policy.num_key_value_heads}"
        yield Fault(("num_key_value_heads",), message)
    yield from rope_faults(policy.rope_parameters)
    if policy.head_dim is None and model.hidden_size % heads:
        message = f"hidden_size {model.hidden_size} is not divisible by num_attention_heads {heads}"
        yield Fault(("num_attention_heads",), message, remedy="give head_dim, or change one of the two")
    else:
        yield from rotary_width_faults(policy.rope_parameters, policy.key_width(model.hidden_size))


GPU = ("cudnn", "triton", "flash_attention_4", "flex_attention", "sdpa", "chunkwise", "eager", "host")
CPU = ("sdpa", "chunkwise", "eager")


def order(device_type: str, features: Mapping[str, Value]) -> tuple[str, ...]:
    """Best first. On a CPU a sparse pattern is served by the keys it keeps, which beats a dense mask."""
    if device_type != "cpu":
        return GPU
    return CPU if features.get("pattern") in ("full", "causal") else ("chunkwise", "sdpa", "eager")


MASKS = dict.fromkeys(("segments", "padding", "positions"))
"""which keys there are, beside the pattern"""
SHAPES = dict.fromkeys(("head_dim", "lengths", "single_token"))
"""facts of a call: D; that T ≠ S, where the pattern reads positions; that T or S is 1"""
EVERYTHING: Mapping[str, OneOf | AtMost | None] = dict.fromkeys(
    (
        *("pattern", "deterministic", "value_width", "softcap", "alibi", "sinks", "dropout"),
        *("mask_bytes", "band_mask_bytes", "non_positive_scale", "drawn_on_device"),
        *MASKS,
        *SHAPES,
    )
)
"""Of a dense mask's bytes, `band_mask_bytes` are those of one that says no more than a band (`is_band`) does.
`drawn_on_device`: what is drawn for a query follows from positions or lengths that only the device knows.
"""

MASK_LIMIT = AtMost(2**26, "bytes")
HALF = ("bfloat16", "float16")

KERNELS = (
    Kernel(
        name="flash_attention_4",
        entry="attncompiler.mechanisms.attention.kernels.flash_attention_4:KERNEL",
        needs=Needs(
            features={
                "pattern": OneOf("full", "causal", "sliding_window"),
                "head_dim": AtMost(128),
                "value_width": AtMost(128),
                "lengths": OneOf("fewer queries than keys"),
                "band_mask_bytes": ANY,
                "sinks": ANY,
            },
            device_types=("cuda",),
            dtypes=HALF,
            vendor="nvidia",
            min_compute_capability=(9, 0),
            packages={"flash-attn-4": "pip install 'attncompiler[fa4]'"},
            known={
                "pattern": "of block lists its backward was wrong at D = 64 (flash-attention #2623)",
                "head_dim": "its backward was wrong at D = 256 (TransformerEngine #3216)",
                "mask_bytes": "its backward does not read masks that its forward does (flash-attention #2424)",
                "softcap": "its backward hangs (flash-attention #2466)",
                "segments": "they need a host read of their lengths",
                "lengths": "rows that see nothing are not promised",
            },
        ),
        summary="FlashAttention-4: full, causal, and windows without global tokens",
    ),
    Kernel(
        name="cudnn",
        entry="attncompiler.mechanisms.attention.kernels.cudnn:KERNEL",
        needs=Needs(
            features={
                "pattern": OneOf("full", "causal"),
                "head_dim": AtMost(128),
                "value_width": AtMost(128),
                "sinks": ANY,
            },
            device_types=("cuda",),
            dtypes=HALF,
            vendor="nvidia",
            min_compute_capability=(8, 0),
            known={
                **dict.fromkeys(MASKS, "its backward gives NaN with a mask where S % 128 = 64 (pytorch #196678)"),
                "single_token": "it builds no backward for one (pytorch #138529)",
                "lengths": "it is causal from the top left",
                "deterministic": "nothing says that its backward is repeatable",
            },
        ),
        summary="cuDNN's fused attention, through torch: causal of equal lengths, and full",
    ),
    Kernel(
        name="triton",
        entry="attncompiler.mechanisms.attention.kernels.triton:KERNEL",
        needs=needs_of_triton({**EVERYTHING, "head_dim": AtMost(256), "value_width": AtMost(256)}),
        summary="built-in flash attention: every pattern and option, forward and backward",
    ),
    Kernel(
        name="flex_attention",
        entry="attncompiler.mechanisms.attention.kernels.flex_attention:KERNEL",
        needs=Needs(
            features={
                **{name: ANY for name in EVERYTHING if name not in ("dropout", "drawn_on_device")},
                "head_dim": AtMost(256),
                "value_width": AtMost(256),
            },
            device_types=("cuda",),
            dtypes=("float32", *HALF),
            vendor="nvidia",
            min_compute_capability=(8, 0),
            packages={"triton": "pip install 'attncompiler[gpu]'"},
        ),
        summary="torch's FlexAttention: a Triton kernel compiled for each pattern, over the tiles that it keeps",
    ),
    Kernel(
        name="sdpa",
        entry="attncompiler.mechanisms.attention.kernels.sdpa:KERNEL",
        needs=Needs(
            features={
                "pattern": ANY,
                "deterministic": ANY,
                "sinks": ANY,
                "mask_bytes": MASK_LIMIT,
                "band_mask_bytes": MASK_LIMIT,
                "non_positive_scale": ANY,
                "drawn_on_device": ANY,
                **MASKS,
                **SHAPES,
            },
            on={
                "cuda": Needs(
                    features={
                        "pattern": ANY,
                        "deterministic": ANY,
                        "sinks": ANY,
                        "value_width": ANY,
                        "mask_bytes": MASK_LIMIT,
                        "band_mask_bytes": ANY,
                        **MASKS,
                        **SHAPES,
                    },
                    dtypes=("float32", *HALF),
                    vendor="nvidia",
                )
            },
        ),
        summary="torch's fused scaled dot product attention, with a dense mask where the pattern needs one",
    ),
    Kernel(
        name="chunkwise",
        entry="attncompiler.mechanisms.attention.kernels.chunkwise:KERNEL",
        needs=Needs(features=EVERYTHING),
        summary="plain torch over blocks of queries and the keys they can see: memory linear in the length",
    ),
    Kernel(
        name="eager",
        entry="attncompiler.mechanisms.attention.reference:EAGER",
        needs=Needs(features=EVERYTHING),
        summary="the reference itself: every option, memory quadratic in the length",
    ),
)

MECHANISM = Mechanism(
    name="attention",
    policy=AttentionPolicy,
    kernels=KERNELS,
    names=(*GPU, "ring"),
    order=order,
    causal=lambda policy: policy.pattern.causal,
    features=features,
    cost="attncompiler.mechanisms.attention.cost:cost",
    layer="attncompiler.mechanisms.attention.layer:Attention",
    operator="attncompiler.mechanisms.attention.op:OPERATOR",
    function="attncompiler.mechanisms.attention.op:attention",
    helpers=("attncompiler.mechanisms.attention.block_lists:block_lists",),
    reference="attncompiler.mechanisms.attention.reference:attention",
    cases="attncompiler.mechanisms.attention.cases:CASES",
    relations=relations,
    sized=sized,
    sees=sees,
    shapes=shapes,
    bucket=bucket,
    places=PLACES,
)
