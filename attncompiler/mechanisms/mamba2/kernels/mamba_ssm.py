"""mamba-ssm's state space duality in Triton (Dao & Gu 2024), and its update of a state for one token.

Its passes are called below `mamba_chunk_scan_combined`, which keeps what it saves to itself: without a gate its
backward needs no more than inputs and the gradients from above, with one what was gated, which its forward gives.
Segments are numbered from 0, as the initial state belongs to the first. It counts a tensor's elements in 32 bits, by
strides too, so that it is given none but whole tensors.

Its update of a state reads D and the bias whether they are there or not (ops/triton/selective_state_update.py), and
clamps no time steps: it is given zeros, and softplus's steps without limits alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attncompiler.blocks.segments import run_numbers
from attncompiler.mechanisms.mamba2.mechanism import library_chunk
from attncompiler.mechanisms.mamba2.op import NO_LIMIT, Mamba2Options
from attncompiler.runtime.implementation import Implementation, Tensors


def forward(inputs: Tensors, options: Mamba2Options) -> dict[str, Tensor]:
    """out (B, T, H, P) in x's dtype and final_state (B, H, P, N) in fp32."""
    with torch.cuda.device_of(inputs["x"]):
        if inputs["x"].shape[1] == 1 and options.dt_softplus and options.dt_limit == NO_LIMIT:
            return _step(inputs)
        out, _, _, _, _, final_state, *_ = _passes(inputs, options)
    return {"out": out, "final_state": final_state}


def backward(grads: Tensors, inputs: Tensors, outputs: Tensors, options: Mamba2Options) -> dict[str, Tensor]:
    """The gradient of every differentiable input that is present."""
    from mamba_ssm.ops.triton.ssd_combined import _mamba_chunk_scan_combined_bwd

    with torch.cuda.device_of(inputs["x"]):
        read = _passes(inputs, options)[1] if "z" in inputs else outputs["out"]
        above = grads["out"].contiguous() if "out" in grads else torch.zeros_like(read)
        final = grads["final_state"].contiguous() if "final_state" in grads else None
        positional, named = _arguments(inputs, options)
        found = _mamba_chunk_scan_combined_bwd(
            above, *positional, read, library_chunk(options.chunk_size), **named, dfinal_states=final
        )
    names = ("x", "dt", "a", "b", "c", "d", "z", "dt_bias", "initial_state")
    return {name: grad.to(inputs[name].dtype) for name, grad in zip(names, found, strict=True) if name in inputs}


KERNEL = Implementation(forward, backward)


def _arguments(inputs: Tensors, options: Mamba2Options) -> tuple[list[Tensor], dict[str, Any]]:
    """What both directions take: x, dt, A, B and C, and by name the rest."""
    given = {name: tensor.contiguous() for name, tensor in inputs.items()}
    runs = run_numbers(given.get("segment_ids"), None)
    return [given[name] for name in ("x", "dt", "a", "b", "c")], {
        "D": given.get("d"),
        "z": given.get("z"),
        "dt_bias": given.get("dt_bias"),
        "initial_states": given.get("initial_state"),
        "seq_idx": None if runs is None else runs.to(torch.int32),
        "dt_softplus": options.dt_softplus,
        "dt_limit": options.dt_limit,
    }


def _passes(inputs: Tensors, options: Mamba2Options) -> tuple[Tensor, ...]:
    """out, what of it was gated, its own time steps and sums, the states of all chunks, the final state."""
    from mamba_ssm.ops.triton.ssd_combined import _mamba_chunk_scan_combined_fwd

    positional, named = _arguments(inputs, options)
    results: tuple[Tensor, ...] = _mamba_chunk_scan_combined_fwd(
        *positional, library_chunk(options.chunk_size), **named
    )
    return results


def _step(inputs: Tensors) -> dict[str, Tensor]:
    """One token. What is the same for all of a head's channels is given without a copy, as it looks for."""
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    x, dt = inputs["x"][:, 0], inputs["dt"][:, 0]
    (B, H, P), N = x.shape, inputs["b"].shape[3]
    state = x.new_zeros(B, H, P, N, dtype=torch.float32)
    if "initial_state" in inputs:
        state.copy_(inputs["initial_state"])
    nothing = torch.zeros(H, dtype=torch.float32, device=x.device)
    skip, bias = inputs.get("d", nothing), inputs.get("dt_bias", nothing)
    out = selective_state_update(
        state,
        x,
        dt[..., None].expand(B, H, P),
        inputs["a"][:, None, None].expand(H, P, N),
        inputs["b"][:, 0],
        inputs["c"][:, 0],
        D=skip if skip.dim() == 2 else skip[:, None].expand(H, P),
        z=inputs["z"][:, 0] if "z" in inputs else None,
        dt_bias=bias[:, None].expand(H, P),
        dt_softplus=True,
    )
    return {"out": out[:, None].contiguous(), "final_state": state}
