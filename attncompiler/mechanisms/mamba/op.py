"""Mamba's operator, and the function that users call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attncompiler.blocks.autocast import autocast
from attncompiler.errors import InputError, fail
from attncompiler.mechanisms.base import Value
from attncompiler.mechanisms.mamba.cost import operator_flops
from attncompiler.runtime.implementation import Tensors
from attncompiler.runtime.inputs import (
    boolean_mask,
    check_device,
    check_dtypes,
    check_shapes,
    kernel_names,
)
from attncompiler.runtime.operator import Operator, OperatorOptions, define, options_text

INPUTS = ("u", "dt", "a", "b", "c", "d", "z", "dt_bias", "initial_state", "segment_ids", "attention_mask")
"""b and c are (B, T, G, N) here, whether there are groups or not"""


class MambaOptions(OperatorOptions):
    """What a call of the operator asks, beside its tensors."""

    dt_softplus: bool = True


def _fake(inputs: Tensors, options: MambaOptions) -> dict[str, Tensor]:
    u = inputs["u"]
    wide = torch.promote_types(u.dtype, torch.float32)
    return {
        "out": u.new_empty(u.shape),
        "final_state": u.new_empty(u.shape[0], u.shape[2], inputs["a"].shape[1], dtype=wide),
    }


def _features(inputs: Tensors, options: MambaOptions) -> Mapping[str, Value]:
    groups, one_token = inputs["b"].shape[2], inputs["u"].shape[1] == 1
    return {
        "gate": "z" in inputs,
        "groups": groups if groups > 1 else None,
        "width": inputs["a"].shape[1],
        "segments": "segment_ids" in inputs,
        "padding": "attention_mask" in inputs,
        "initial_state": "initial_state" in inputs and ("before one token" if one_token else True),
    }


OPERATOR = define(
    Operator(
        name="mamba",
        inputs=INPUTS,
        differentiable=("u", "dt", "a", "b", "c", "d", "z", "dt_bias", "initial_state"),
        outputs=("out", "final_state"),
        differentiable_outputs=("out", "final_state"),
        sequence=dict.fromkeys(("u", "dt", "b", "c", "z", "segment_ids", "attention_mask", "out"), 1),
        low_precision=("u", "dt", "b", "c", "z"),
        options=MambaOptions,
        fake=_fake,
        features=_features,
        flops=operator_flops,
    )
)


@torch.compiler.allow_in_graph
def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    segment_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    kernel: str | Sequence[str] = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba's selective scan (Gu & Dao 2023, https://arxiv.org/abs/2312.00752, algorithm 2), channels last.

    u, dt, z (B, T, E), B and C (B, T, N) or (B, T, G, N), all of one dtype; A (E, N), D and dt_bias (E,) → out
    (B, T, E) in that dtype:

        Δ = softplus(dt + dt_bias);  h[t] = exp(Δ[t]·A) h[t−1] + Δ[t]·u[t]·B[t];  out = (C·h + D·u) · silu(z)

    Channel e reads group e div (E div G) of B and C. `dt_softplus=False` takes Δ = dt + dt_bias. `initial_state`
    (B, E, N) is h before the first token, else 0; `return_state` also gives h after the last. A, D, dt_bias and the
    states are fp32 (fp64 for fp64 inputs) whatever the dtype, and both states are differentiable.

    `segment_ids` (B, T), equal ids being one contiguous run, keep packed documents apart: the initial state belongs
    to the first, the final state is the last one's. `attention_mask` (B, T) is non-zero for real tokens; padding gives
    0 and leaves the state as it is. `kernel` is "auto", a name, or the list of the only kernels allowed.

    Raises InputError (E401 shapes, E402 dtypes, E403 arguments, E404 devices) and KernelError (E501) when no allowed
    kernel offers what is asked.
    """
    tensors = check(u, dt, A, B, C, D, z, dt_bias, initial_state, segment_ids, attention_mask)
    options = MambaOptions(kernel=kernel_names("mamba", kernel), dt_softplus=bool(dt_softplus))
    results = OPERATOR(tensors, options_text(options))
    return (results["out"], results["final_state"]) if return_state else results["out"]


def check(
    u: Tensor,
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
    u, dt, B, C = autocast(u, dt, B, C)
    tensors: dict[str, Tensor | None] = {
        "u": u,
        "dt": dt,
        "b": B.unsqueeze(2) if B.dim() == 3 else B,
        "c": C.unsqueeze(2) if C.dim() == 3 else C,
        "z": None if z is None else autocast(z)[0],
        "a": A,
        "d": D,
        "dt_bias": dt_bias,
        "initial_state": initial_state,
        "segment_ids": segment_ids,
        "attention_mask": boolean_mask(attention_mask),
    }
    layouts = {"u": "BTE", "dt": "BTE", "a": "EN", "b": "BTGN", "c": "BTGN", "d": "E", "z": "BTE", "dt_bias": "E"}
    sizes = check_shapes(tensors, {**layouts, "initial_state": "BEN", "segment_ids": "BT", "attention_mask": "BT"})
    check_device(tensors)
    if sizes["E"] % sizes["G"]:
        raise fail(InputError, "E401", f"{sizes['E']} channels are not a multiple of {sizes['G']} groups")
    return check_dtypes(tensors, OPERATOR.low_precision, ("a", "d", "dt_bias", "initial_state"))
