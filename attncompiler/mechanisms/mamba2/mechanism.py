"""Mamba-2's spec fields and kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

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
    Wrong,
    needs_of_triton,
)

Limit = Annotated[float, Field(allow_inf_nan=True)]
Limits = Annotated[tuple[Limit, Limit], Field(strict=False)]


class Mamba2Policy(Policy):
    """A Mamba-2 (SSD) mixer; field names are those of HF's Mamba2Config, defaults too where they fit any size.

    `num_heads` follows from the sizes and may be left out; `n_groups` is 1, as in mamba-ssm. `time_step_limit` is the
    range that time steps are clamped to; absent, [0, ∞]. `rms_norm: false` leaves out the gated norm before the output
    projection, and `norm_before_gate` puts the gate behind it, as in mamba-ssm. `rescale_prenorm_residual`, on as in
    mamba-ssm, divides the first weights of the output projection by √layers.
    """

    kind: Literal["mamba2"]
    num_heads: Size | None = None
    head_dim: Size = 64
    state_size: Size = 128
    expand: int = Field(default=2, ge=1, lt=2**10)
    n_groups: Size = 1
    conv_kernel: Size = 4
    chunk_size: Size = 256
    use_conv_bias: bool = True
    use_bias: bool = False
    hidden_act: Literal["silu"] = "silu"
    rms_norm: bool = True
    norm_before_gate: bool = False
    time_step_min: Factor = 0.001
    time_step_max: Factor = 0.1
    time_step_floor: Factor = 1e-4
    time_step_limit: Limits | None = None
    rescale_prenorm_residual: bool = True

    def channels(self, hidden_size: int) -> int:
        """E = H·P: the channels of all heads."""
        return self.expand * hidden_size

    def heads(self, hidden_size: int) -> int:
        """H: the number of heads."""
        return self.channels(hidden_size) // self.head_dim

    @property
    def limits(self) -> tuple[float, float]:
        """The range of the time steps."""
        return self.time_step_limit or (0.0, math.inf)


def features(policy: Mamba2Policy, model: Any) -> Mapping[str, Value]:
    """What a layer of this policy asks of every kernel; the operator adds what a call's inputs ask."""
    return {
        "gate": not policy.rms_norm,
        "groups": policy.n_groups if policy.n_groups > 1 else None,
        "dt_limit": policy.limits != (0.0, math.inf),
        "width": max(policy.head_dim, policy.state_size),
    }


LIBRARY_CHUNKS = (64, 128, 256)
"""numbers of tokens that mamba-ssm takes as a chunk: its own tests have the first two, its layers the last"""


def library_chunk(chunk_size: int) -> int:
    """The largest of them that is no more than asked for, or the least."""
    return max((size for size in LIBRARY_CHUNKS if size <= chunk_size), default=LIBRARY_CHUNKS[0])


def elements(x: tuple[int, ...], groups: int, state: int, chunk_size: int) -> int:
    """How many numbers the largest tensor has that mamba-ssm makes of x (B, T, H, P): one like x, B or C, the states
    of all chunks, or the products of each chunk's B and C."""
    B, T, H, P = x
    chunk = library_chunk(chunk_size)
    chunks = -(-T // chunk)
    return B * max(T * H * P, T * groups * state, chunks * H * P * state, chunks * groups * chunk**2)


def sized(policy: Mamba2Policy, size: MixerSize) -> Mapping[str, Value]:
    """How large tensors become."""
    x = (size.batch, size.seq_len, policy.heads(size.hidden_size), policy.head_dim)
    return {"elements": elements(x, policy.n_groups, policy.state_size, policy.chunk_size)}


def relations(policy: Mamba2Policy, model: Any) -> Iterator[Fault]:
    """Numbers of channels, heads and groups that do not fit together, and ranges that are empty."""
    channels = policy.channels(model.hidden_size)
    product = f"expand {policy.expand} × hidden_size {model.hidden_size} = {channels}"
    if channels % policy.head_dim:
        yield Fault(("head_dim",), f"{product} is not divisible by head_dim {policy.head_dim}")
    else:
        heads = channels // policy.head_dim
        if policy.num_heads is not None and policy.num_heads != heads:
            message = f"{product} makes {heads} heads of head_dim {policy.head_dim}, not num_heads {policy.num_heads}"
            yield Fault(("num_heads",), message, remedy="leave num_heads out, or change one of the sizes")
        if heads % policy.n_groups:
            message = f"{product} makes {heads} heads, which is not divisible by n_groups {policy.n_groups}"
            yield Fault(("n_groups",), message)
    if policy.time_step_min > policy.time_step_max:
        message = f"time_step_min {policy.time_step_min:g} is above time_step_max {policy.time_step_max:g}"
        yield Fault(("time_step_min",), message, "E105")
    low, high = policy.limits
    if not 0 <= low < high:
        message = f"time_step_limit [{low:g}, {high:g}] is not a range of positive numbers"
        yield Fault(("time_step_limit",), message, "E105")
    if policy.norm_before_gate and not policy.rms_norm:
        yield Fault(("norm_before_gate",), "norm_before_gate needs the norm: rms_norm is false", "E105")


GPU = ("triton", "mamba_ssm", "chunkwise", "eager", "host")
CPU = ("chunkwise", "eager")


def order(device_type: str, features: Mapping[str, Value]) -> tuple[str, ...]:
    """Best first."""
    return CPU if device_type == "cpu" else GPU


OFFERED: Mapping[str, OneOf | AtMost | None] = {
    "gate": ANY,
    "groups": ANY,
    "dt_limit": ANY,
    "skip_per_channel": ANY,
    "width": ANY,
    "elements": ANY,
    "segments": ANY,
    "padding": ANY,
    "initial_state": ANY,
    "deterministic": ANY,
}

KERNELS = (
    Kernel(
        name="triton",
        entry="attncompiler.mechanisms.mamba2.kernels.triton:KERNEL",
        needs=needs_of_triton({**OFFERED, "width": AtMost(256)}),
        summary="built-in passes of the recurrence, in chunks and groups of them: memory linear in the length",
    ),
    Kernel(
        name="mamba_ssm",
        entry="attncompiler.mechanisms.mamba2.kernels.mamba_ssm:KERNEL",
        needs=Needs(
            features={
                "gate": ANY,
                "groups": ANY,
                "dt_limit": ANY,
                "skip_per_channel": ANY,
                "width": AtMost(256),
                "elements": AtMost(2**31 - 1),
                "segments": ANY,
                "initial_state": ANY,
            },
            device_types=("cuda",),
            dtypes=("bfloat16",),  # it keeps states between chunks in C's dtype, and they overflow in fp16
            vendor="nvidia",
            min_compute_capability=(8, 0),
            packages={"mamba_ssm": "pip install mamba-ssm --no-build-isolation"},
            known={
                "elements": "it counts a tensor's elements in 32 bits",
                "padding": "it has no mask",
                "deterministic": "its gradients of A, D and the time steps are added up in any order",
            },
            wrong=(Wrong("mamba_ssm", (0, 0, 0), (2, 0, 0), "state space duality came with 2.0"),),
        ),
        summary="mamba-ssm's passes in Triton, and its update of a state for one token",
    ),
    Kernel(
        name="chunkwise",
        entry="attncompiler.mechanisms.mamba2.kernels.chunkwise:KERNEL",
        needs=Needs(features=OFFERED),
        summary="plain torch: matrix products inside chunks, a running state between them; memory linear in the length",
    ),
    Kernel(
        name="eager",
        entry="attncompiler.mechanisms.mamba2.reference:EAGER",
        needs=Needs(features=OFFERED),
        summary="the reference itself: the recurrence token by token, every state kept for the backward",
    ),
)

MECHANISM = Mechanism(
    name="mamba2",
    policy=Mamba2Policy,
    kernels=KERNELS,
    names=GPU,
    order=order,
    causal=lambda policy: True,
    features=features,
    cost="attncompiler.mechanisms.mamba2.cost:cost",
    layer="attncompiler.mechanisms.mamba2.layer:Mamba2Mixer",
    operator="attncompiler.mechanisms.mamba2.op:OPERATOR",
    function="attncompiler.mechanisms.mamba2.op:ssd",
    reference="attncompiler.mechanisms.mamba2.reference:ssd",
    cases="attncompiler.mechanisms.mamba2.cases:CASES",
    relations=relations,
    sized=sized,
)
