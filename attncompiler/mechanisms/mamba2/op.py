"""Mamba-2's operator, and the function that users call."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor

from attncompiler.blocks.autocast import autocast
from attncompiler.errors import InputError, fail
from attncompiler.mechanisms.base import Value
from attncompiler.mechanisms.mamba2.cost import operator_flops
from attncompiler.mechanisms.mamba2.mechanism import elements
from attncompiler.runtime.implementation import Tensors
from attncompiler.runtime.inputs import (
    boolean_mask,
    check_device,
    check_dtypes,
    check_shapes,
    kernel_names,
    whole,
)
from attncompiler.runtime.operator import Operator, OperatorOptions, define, options_text

INPUTS = ("x", "dt", "a", "b", "c", "d", "z", "dt_bias", "initial_state", "segment_ids", "attention_mask")
NO_LIMIT = (0.0, math.inf)


class Mamba2Options(OperatorOptions):
    """What a call of the operator asks, beside its tensors. `chunk_size` bounds the chunks, and never the result."""

    dt_softplus: bool = True
    dt_limit: tuple[float, float] = Field(default=NO_LIMIT, strict=False)
    chunk_size: int = Field(default=64, ge=1)


def _fake(inputs: Tensors, options: Mamba2Options) -> dict[str, Tensor]:
    x = inputs["x"]
    B, _, H, P = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    return {"out": x.new_empty(x.shape), "final_state": x.new_empty(B, H, P, inputs["b"].shape[3], dtype=wide)}


def _features(inputs: Tensors, options: Mamba2Options) -> Mapping[str, Value]:
    x, (groups, state) = inputs["x"], inputs["b"].shape[2:]
    return {
        "gate": "z" in inputs,
        "groups": groups if groups > 1 else None,
        "dt_limit": options.dt_limit != NO_LIMIT,
        "skip_per_channel": "d" in inputs and inputs["d"].dim() == 2,
        "segments": "segment_ids" in inputs,
        "padding": "attention_mask" in inputs,
        "initial_state": "initial_state" in inputs,
        "width": max(x.shape[3], state),
        "elements": elements(tuple(x.shape), groups, state, options.chunk_size),
    }


OPERATOR = define(
    Operator(
        name="mamba2",
        inputs=INPUTS,
        differentiable=("x", "dt", "a", "b", "c", "d", "z", "dt_bias", "initial_state"),
        outputs=("out", "final_state"),
        differentiable_outputs=("out", "final_state"),
        sequence=dict.fromkeys(("x", "dt", "b", "c", "z", "segment_ids", "attention_mask", "out"), 1),
        low_precision=("x", "dt", "b", "c", "z"),
        options=Mamba2Options,
        fake=_fake,
        features=_features,
        flops=operator_flops,
    )
)


@torch.compiler.allow_in_graph
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = NO_LIMIT,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    segment_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    kernel: str | Sequence[str] = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-2's state space duality (Dao & Gu 2024, https://arxiv.org/abs/2405.21060, section 6).

    x, z (B, T, H, P), dt (B, T, H), B and C (B, T, G, N), all of one dtype; A and dt_bias (H,), D (H,) or (H, P) → out
    (B, T, H, P) in that dtype:

        Δ = clamp(softplus(dt + dt_bias), dt_limit)
        h[t] = exp(Δ[t]·A) h[t−1] + Δ[t]·x[t] B[t]ᵀ;  out = (h C + D·x) · silu(z)

    Head h reads group h div (H div G) of B and C. `dt_softplus=False` clamps dt + dt_bias itself. `chunk_size` is the
    most tokens a kernel may take as one chunk, or the fewest it can (16 for triton, 64 for mamba_ssm); results do not
    depend on it.
    `initial_state` (B, H, P, N) is h before the first token, else 0; `return_state` also gives h after the last. A, D,
    dt_bias and the states are fp32 (fp64 for fp64 inputs) whatever the dtype, and both states are differentiable.

    `segment_ids` (B, T), equal ids being one contiguous run, keep packed documents apart: the initial state belongs
    to the first, the final state is the last one's. `attention_mask` (B, T) is non-zero for real tokens; padding gives
    0 and leaves the state as it is. `kernel` is "auto", a name, or the list of the only kernels allowed.

    Raises InputError (E401 shapes, E402 dtypes, E403 arguments, E404 devices) and KernelError (E501) when no allowed
    kernel offers what is asked.
    """
    if not isinstance(dt_limit, (tuple, list)) or [type(limit) in (int, float) for limit in dt_limit] != [True, True]:
        raise fail(InputError, "E403", f"dt_limit must be a low and a high limit, not {dt_limit!r}")
    low, high = map(float, dt_limit)
    if not low < high:
        raise fail(InputError, "E403", f"dt_limit must be a range that rises, not ({low:g}, {high:g})")
    options = Mamba2Options(
        kernel=kernel_names("mamba2", kernel),
        dt_softplus=bool(dt_softplus),
        dt_limit=(low, high),
        chunk_size=whole("chunk_size", chunk_size, 1),
    )
    tensors = check(x, dt, A, B, C, D, z, dt_bias, initial_state, segment_ids, attention_mask)
    results = OPERATOR(tensors, options_text(options))
    return (results["out"], results["final_state"]) if return_state else results["out"]


def check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> dict[str, Tensor | None]:
    """The operator's inputs by name, after one check of shapes, dtypes and devices at the door."""
    x, dt, B, C = autocast(x, dt, B, C)
    tensors: dict[str, Tensor | None] = {
        "x": x,
        "dt": dt,
        "b": B,
        "c": C,
        "z": None if z is None else autocast(z)[0],
        "a": A,
        "d": D,
        "dt_bias": dt_bias,
        "initial_state": initial_state,
        "segment_ids": segment_ids,
        "attention_mask": boolean_mask(attention_mask),
    }
    layouts = {"x": "BTHP", "dt": "BTH", "a": "H", "b": "BTGN", "c": "BTGN", "z": "BTHP", "dt_bias": "H"}
    layouts["d"] = "H" if D is None or D.dim() == 1 else "HP"
    sizes = check_shapes(tensors, {**layouts, "initial_state": "BHPN", "segment_ids": "BT", "attention_mask": "BT"})
    check_device(tensors)
    if sizes["H"] % sizes["G"]:
        raise fail(InputError, "E401", f"{sizes['H']} heads are not a multiple of {sizes['G']} groups")
    return check_dtypes(tensors, OPERATOR.low_precision, ("a", "d", "dt_bias", "initial_state"))
