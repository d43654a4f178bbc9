"""Linformer's spec fields and kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from attncompiler.mechanisms.base import ANY, Fault, Kernel, Mechanism, Needs, Policy, Size, Value


class LinformerPolicy(Policy):
    """A Linformer mixer; field names are HF's where HF has one."""

    kind: Literal["linformer"]
    num_attention_heads: Size
    head_dim: Size | None = None
    attention_bias: Literal["none", "qkv", "all"] = "none"
    projected_length: Size
    share: Literal["none", "heads", "kv"] = "heads"
    causal: bool = False

    def head_width(self, hidden_size: int) -> int:
        """D: the width of a head of queries, keys and values."""
        return self.head_dim or hidden_size // self.num_attention_heads

    def projection_shape(self, max_position_embeddings: int) -> tuple[int, ...]:
        """(H, R, P) with `share: none`, else (R, P): the shape of a projection along a sequence of up to P tokens."""
        shape = (self.projected_length, max_position_embeddings)
        return (self.num_attention_heads, *shape) if self.share == "none" else shape


MOST_NUMBERS = 2**50
"""in one projection; torch counts the bytes of a tensor in 63 bits"""


def features(policy: LinformerPolicy, model: Any) -> Mapping[str, Value]:
    """What a layer of this policy asks of every kernel; the operator adds what a call's inputs ask."""
    return {}


def relations(policy: LinformerPolicy, model: Any) -> Iterator[Fault]:
    """Causality, which Linformer cannot have, and widths that do not fit together."""
    if policy.causal:
        message = "linformer cannot be causal: each projected key sums keys of the whole sequence, later ones included"
        yield Fault(("causal",), message, code="E105", remedy="use attention or linear_attention where order counts")
    if policy.projected_length > model.max_position_embeddings:
        message = (
            f"projected_length {policy.projected_length} is above max_position_embeddings "
            f"{model.max_position_embeddings}, and would lengthen the sequence"
        )
        yield Fault(("projected_length",), message)
    count = math.prod(policy.projection_shape(model.max_position_embeddings))
    if count >= MOST_NUMBERS:
        message = f"a projection of {count:.1e} numbers (projected_length × max_position_embeddings) fits nowhere"
        yield Fault(("projected_length",), message)
    heads = policy.num_attention_heads
    if policy.head_dim is None and model.hidden_size % heads:
        message = f"hidden_size {model.hidden_size} is not divisible by num_attention_heads {heads}"
        yield Fault(("num_attention_heads",), message, remedy="give head_dim, or change one of the two")


GPU = ("sdpa", "triton", "chunkwise", "eager", "host")
CPU = ("sdpa", "eager")


def order(device_type: str, features: Mapping[str, Value]) -> tuple[str, ...]:
    """Best first."""
    return CPU if device_type == "cpu" else GPU


KERNELS = (
    Kernel(
        name="sdpa",
        entry="attncompiler.mechanisms.linformer.kernels.sdpa:KERNEL",
        needs=Needs(features={"segments": ANY, "padding": ANY, "deterministic": ANY}),
        summary="keys and values projected by one matrix product each, then torch's fused attention",
    ),
    Kernel(
        name="eager",
        entry="attncompiler.mechanisms.linformer.reference:EAGER",
        needs=Needs(features={"segments": ANY, "padding": ANY, "deterministic": ANY}),
        summary="the reference itself: every option, all T×R scores in memory",
    ),
)

MECHANISM = Mechanism(
    name="linformer",
    policy=LinformerPolicy,
    kernels=KERNELS,
    names=GPU,
    order=order,
    causal=lambda policy: False,
    features=features,
    cost="attncompiler.mechanisms.linformer.cost:cost",
    layer="attncompiler.mechanisms.linformer.layer:Linformer",
    operator="attncompiler.mechanisms.linformer.op:OPERATOR",
    function="attncompiler.mechanisms.linformer.op:linformer",
    reference="attncompiler.mechanisms.linformer.reference:linformer",
    cases="attncompiler.mechanisms.linformer.cases:CASES",
    relations=relations,
    bounded=True,
)
