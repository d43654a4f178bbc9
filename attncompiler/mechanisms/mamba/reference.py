"""The oracle: the recurrence itself, token by token, in fp32 or better."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attncompiler.blocks.segments import run_numbers
from attncompiler.mechanisms.mamba.op import OPERATOR, MambaOptions
from attncompiler.runtime.implementation import Tensors, from_reference


def selective_scan(inputs: Tensors, options: MambaOptions) -> dict[str, Tensor]:
    """u, dt, z (B, T, E), a (E, N), b, c (B, T, G, N) → out (B, T, E) in u's dtype, final_state in fp32 or fp64."""
    dtype = inputs["u"].dtype
    wide = torch.promote_types(dtype, torch.float32)
    u, dt, a, b, c = (inputs[name].to(wide) for name in ("u", "dt", "a", "b", "c"))
    B, T, E = u.shape
    real = inputs.get("attention_mask", torch.ones(B, T, dtype=torch.bool, device=u.device))[..., None]
    dt = torch.where(real, dt, 0)  # before anything is taken of it: NaN in padding must not reach a gradient
    delta = dt + inputs["dt_bias"] if "dt_bias" in inputs else dt
    # above its threshold torch takes softplus(x) as x, which by default is wrong in the tenth digit
    delta = F.softplus(delta, threshold=40) if options.dt_softplus else delta
    delta = torch.where(real, delta, 0)
    u, b, c = torch.where(real, u, 0), torch.where(real[..., None], b, 0), torch.where(real[..., None], c, 0)
    b, c = (each.repeat_interleave(E // each.shape[2], 2) for each in (b, c))
    decay = torch.exp(delta[..., None] * a)
    if "segment_ids" in inputs:
        runs = run_numbers(inputs["segment_ids"], inputs.get("attention_mask"))
        starts = F.pad(runs[:, 1:] != runs[:, :-1], (1, 0))
        decay = torch.where(starts[..., None, None], 0, decay)

    state = inputs.get("initial_state", u.new_zeros(B, E, a.shape[1]))
    read = []
    for t in range(T):
        state = decay[:, t] * state + (delta[:, t] * u[:, t])[..., None] * b[:, t]
        read.append((state * c[:, t]).sum(-1))
    out = torch.stack(read, 1)
    if "d" in inputs:
        out = out + inputs["d"] * u
    if "z" in inputs:
        out = out * F.silu(torch.where(real, inputs["z"].to(wide), 0))
    return {"out": torch.where(real, out, 0).to(dtype), "final_state": state.clone()}


EAGER = from_reference(selective_scan, OPERATOR.differentiable)
