"""Linear attention's spec fields and kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from attncompiler.mechanisms.base import (
    ANY,
    AtMost,
    Factor,
    Fault,
    Kernel,
    Length,
    Mechanism,
    Needs,
    OneOf,
    Policy,
    Size,
    Value,
    Wrong,
    needs_of_triton,
)
from attncompiler.mechanisms.rope import RopeParameters, rope_faults, rotary_width_faults

FeatureMap = Literal["elu", "favor", "relu", "identity"]


class LinearAttentionPolicy(Policy):
    """A linear attention mixer; field names are HF's where HF has one.

    `num_features`, `orthogonal` and `redraw_interval` are of feature_map favor: how many random features there are, by
    default ⌊D·ln D⌋, the order of the paper's theorem 4 (Choromanski et al. 2021) and the number of its authors' and of
    lucidrains' code; whether their projection has orthogonal blocks, true unless said; and after how many forwards in
    training it is drawn anew, never unless said. `decay: retention` fixes each head's decay (Sun et al. 2023), and
    `scalar` makes one of every token and head by a projection `gk_proj`, as fla's simple GLA.
    """

    kind: Literal["linear_attention"]
    num_attention_heads: Size
    head_dim: Size | None = None
    v_head_dim: Size | None = None
    attention_bias: Literal["none", "qkv", "all"] = "none"
    rope_parameters: RopeParameters | None = None
    feature_map: FeatureMap = "elu"
    normalize: bool = True
    causal: bool = True
    eps: Factor = 1e-6
    scale: Factor = 1.0
    num_features: Size | None = None
    orthogonal: bool | None = None
    redraw_interval: Length | None = None
    decay: Literal["none", "retention", "scalar"] = "none"

    def key_width(self, hidden_size: int) -> int:
        """D: the width of a query or key head."""
        return self.head_dim or hidden_size // self.num_attention_heads

    def feature_count(self, hidden_size: int) -> int:
        """R: the number of features of a query or key."""
        width = self.key_width(hidden_size)
        if self.feature_map != "favor":
            return width
        return self.num_features or max(1, int(width * math.log(width)))

    def value_width(self, hidden_size: int) -> int:
        """V: the width of a value head."""
        return self.v_head_dim or self.key_width(hidden_size)


def features(policy: LinearAttentionPolicy, model: Any) -> Mapping[str, Value]:
    """What a layer of this policy asks of every kernel; the operator adds what a call's inputs ask."""
    return {
        "feature_map": policy.feature_map,
        "normalize": policy.normalize,
        "bidirectional": not policy.causal,
        "decay": policy.decay,
        "width": max(policy.feature_count(model.hidden_size), policy.value_width(model.hidden_size)),
    }


def relations(policy: LinearAttentionPolicy, model: Any) -> Iterator[Fault]:
    """Widths that do not fit together, and options that only some feature maps have."""
    heads = policy.num_attention_heads
    if policy.normalize and policy.feature_map == "identity":
        message = "normalize needs features that are not negative, and those of feature_map 'identity' have any sign"
        yield Fault(("feature_map",), message, code="E105", remedy="set normalize: false")
    if policy.feature_map != "favor":
        for option in ("num_features", "orthogonal", "redraw_interval"):
            if getattr(policy, option) is not None:
                message = f"{option!r} belongs to feature_map 'favor', not to {policy.feature_map!r}"
                yield Fault((option,), message, code="E105")
    if policy.decay != "none" and not policy.causal:
        yield Fault(("decay",), "a decay runs along time, and needs causal: true", code="E105")
    yield from rope_faults(policy.rope_parameters)
    if policy.head_dim is None and model.hidden_size % heads:
        message = f"hidden_size {model.hidden_size} is not divisible by num_attention_heads {heads}"
        yield Fault(("num_attention_heads",), message, remedy="give head_dim, or change one of the two")
    else:
        yield from rotary_width_faults(policy.rope_parameters, policy.key_width(model.hidden_size))


GPU = ("triton", "fla", "chunkwise", "eager", "host")
CPU = ("chunkwise", "eager")


def order(device_type: str, features: Mapping[str, Value]) -> tuple[str, ...]:
    """Best first."""
    return CPU if device_type == "cpu" else GPU


OFFERED: Mapping[str, OneOf | AtMost | None] = {
    "feature_map": OneOf("elu", "favor", "relu", "identity"),
    "normalize": ANY,
    "bidirectional": ANY,
    "decay": ANY,
    "width": ANY,
    "segments": ANY,
    "padding": ANY,
    "initial_state": ANY,
    "deterministic": ANY,
}

KERNELS = (
    Kernel(
        name="triton",
        entry="attncompiler.mechanisms.linear_attention.kernels.triton:KERNEL",
        needs=needs_of_triton({**OFFERED, "width": AtMost(256)}),
        summary="built-in passes of the recurrence, in chunks and groups of them: memory linear in the length",
    ),
    Kernel(
        name="fla",
        entry="attncompiler.mechanisms.linear_attention.kernels.fla:KERNEL",
        needs=Needs(
            features={
                "feature_map": OneOf("elu", "relu", "identity"),
                "normalize": ANY,
                "decay": ANY,
                "width": AtMost(256),
                "initial_state": ANY,
            },
            device_types=("cuda",),
            dtypes=("bfloat16",),  # it keeps states between chunks in the keys' dtype, and sums overflow in fp16
            vendor="nvidia",
            min_compute_capability=(8, 0),
            packages={"fla": "pip install flash-linear-attention"},
            known={
                "feature_map": "it has no running maximum for features that are exponentials",
                "bidirectional": "it is causal",
                "segments": "they need a host read of their lengths",
                "padding": "it has no mask",
                "deterministic": "its tiles are timed anew in every process",
            },
            wrong=(
                Wrong(
                    "fla", (0, 0, 0), (0, 6, 0), "only 0.6.0 and later were read; early ones have heads before tokens"
                ),
                Wrong(
                    "triton",
                    (3, 4, 0),
                    (3, 7, 1),
                    "on Hopper its gradients are wrong with decays (flash-linear-attention #640); without them that of "
                    "a single token ended in an illegal memory access (chunk_bwd_kernel_dv of 0.6.0 on an H200)",
                    compute_capability=9,
                    backward=True,
                ),
            ),
        ),
        summary="flash-linear-attention's chunks in Triton: causal, with decays and states, of features made in torch",
    ),
    Kernel(
        name="chunkwise",
        entry="attncompiler.mechanisms.linear_attention.kernels.chunkwise:KERNEL",
        needs=Needs(features=OFFERED),
        summary="plain torch over chunks of the sequence and a running state: memory linear in the length",
    ),
    Kernel(
        name="eager",
        entry="attncompiler.mechanisms.linear_attention.reference:EAGER",
        needs=Needs(features=OFFERED),
        summary="the reference itself: every option, memory quadratic in the length",
    ),
)

MECHANISM = Mechanism(
    name="linear_attention",
    policy=LinearAttentionPolicy,
    kernels=KERNELS,
    names=GPU,
    order=order,
    causal=lambda policy: policy.causal,
    features=features,
    cost="attncompiler.mechanisms.linear_attention.cost:cost",
    layer="attncompiler.mechanisms.linear_attention.layer:LinearAttention",
    operator="attncompiler.mechanisms.linear_attention.op:OPERATOR",
    function="attncompiler.mechanisms.linear_attention.op:linear_attention",
    reference="attncompiler.mechanisms.linear_attention.reference:linear_attention",
    cases="attncompiler.mechanisms.linear_attention.cases:CASES",
    relations=relations,
)
