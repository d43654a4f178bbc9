"""Mamba's spec fields and kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from attncompiler.mechanisms.base import (
    ANY,
    AtMost,
    Factor,
    Fault,
    Kernel,
    Mechanism,
    Needs,
    OneOf,
    Policy,
    Size,
    Value,
    needs_of_triton,
)


class MambaPolicy(Policy):
    """A Mamba (S6) mixer; field names and defaults are those of HF's MambaConfig.

    `dt_bc_norm` normalises the time step, B and C before the scan, as Jamba does (Lieber et al. 2024,
    https://arxiv.org/abs/2403.19887); `rescale_prenorm_residual`, on as in mamba-ssm, divides the first weights of the
    output projection by √layers.
    """

    kind: Literal["mamba"]
    state_size: Size = 16
    conv_kernel: Size = 4
    expand: int = Field(default=2, ge=1, lt=2**10)
    time_step_rank: Literal["auto"] | Size = "auto"
    use_conv_bias: bool = True
    use_bias: bool = False
    hidden_act: Literal["silu"] = "silu"
    dt_bc_norm: bool = False
    time_step_min: Factor = 0.001
    time_step_max: Factor = 0.1
    time_step_floor: Factor = 1e-4
    time_step_scale: Factor = 1.0
    time_step_init_scheme: Literal["random", "constant"] = "random"
    rescale_prenorm_residual: bool = True

    def channels(self, hidden_size: int) -> int:
        """E: the channels of the scan."""
        return self.expand * hidden_size

    def rank(self, hidden_size: int) -> int:
        """R: the width that the time steps are projected through."""
        return math.ceil(hidden_size / 16) if self.time_step_rank == "auto" else self.time_step_rank


def features(policy: MambaPolicy, model: Any) -> Mapping[str, Value]:
    """What a layer of this policy asks of every kernel; the operator adds what a call's inputs ask."""
    return {"gate": True, "width": policy.state_size}


def relations(policy: MambaPolicy, model: Any) -> Iterator[Fault]:
    """A range of time steps that is empty."""
    if policy.time_step_min > policy.time_step_max:
        message = f"time_step_min {policy.time_step_min:g} is above time_step_max {policy.time_step_max:g}"
        yield Fault(("time_step_min",), message, "E105")


GPU = ("triton", "mamba_ssm", "chunkwise", "eager", "host")
CPU = ("chunkwise", "eager")


def order(device_type: str, features: Mapping[str, Value]) -> tuple[str, ...]:
    """Best first."""
    return CPU if device_type == "cpu" else GPU


OFFERED: Mapping[str, OneOf | AtMost | None] = {
    "gate": ANY,
    "width": ANY,
    "groups": ANY,
    "segments": ANY,
    "padding": ANY,
    "initial_state": ANY,
    "deterministic": ANY,
}

KERNELS = (
    Kernel(
        name="triton",
        entry="attncompiler.mechanisms.mamba.kernels.triton:KERNEL",
        needs=needs_of_triton({**OFFERED, "width": AtMost(256)}),
        summary="the built-in scan, its states in registers, in groups of tokens beside each other; memory linear in T",
    ),
    Kernel(
        name="mamba_ssm",
        entry="attncompiler.mechanisms.mamba.kernels.mamba_ssm:KERNEL",
        needs=Needs(
            features={
                "gate": ANY,
                "width": AtMost(256),
                "groups": ANY,
                "initial_state": OneOf("before one token"),
            },
            device_types=("cuda",),
            dtypes=("bfloat16", "float16"),
            vendor="nvidia",
            min_compute_capability=(8, 0),
            packages=dict.fromkeys(
                ("mamba_ssm", "selective_scan_cuda"),
                "MAMBA_KEEP_CUDA_BUILD=TRUE pip install mamba-ssm --no-build-isolation",
            ),
            known={
                "segments": "its scan has no boundaries",
                "padding": "it has no mask",
                "initial_state": "its scan begins with nothing",
                "deterministic": "its gradients of A, B and C are added up in any order",
            },
            forward_only={"initial_state": "its update of a state has none"},
        ),
        summary="mamba-ssm's scan in CUDA, channels first, of whole sequences; its update of a state for one token",
    ),
    Kernel(
        name="chunkwise",
        entry="attncompiler.mechanisms.mamba.kernels.chunkwise:KERNEL",
        needs=Needs(features=OFFERED),
        summary="plain torch over chunks of the sequence, discretised one at a time: memory linear in the length",
    ),
    Kernel(
        name="eager",
        entry="attncompiler.mechanisms.mamba.reference:EAGER",
        needs=Needs(features=OFFERED),
        summary="the reference itself: the recurrence token by token, every state kept for the backward",
    ),
)

MECHANISM = Mechanism(
    name="mamba",
    policy=MambaPolicy,
    kernels=KERNELS,
    names=GPU,
    order=order,
    causal=lambda policy: True,
    features=features,
    cost="attncompiler.mechanisms.mamba.cost:cost",
    layer="attncompiler.mechanisms.mamba.layer:MambaMixer",
    operator="attncompiler.mechanisms.mamba.op:OPERATOR",
    function="attncompiler.mechanisms.mamba.op:selective_scan",
    reference="attncompiler.mechanisms.mamba.reference:selective_scan",
    cases="attncompiler.mechanisms.mamba.cases:CASES",
    relations=relations,
)
