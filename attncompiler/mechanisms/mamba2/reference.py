"""The oracle: the recurrence itself, token by token, in fp32 or better."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attncompiler.blocks.segments import run_numbers
from attncompiler.mechanisms.mamba2.op import OPERATOR, Mamba2Options
from attncompiler.runtime.implementation import Tensors, from_reference


def ssd(inputs: Tensors, options: Mamba2Options) -> dict[str, Tensor]:
    """x, z (B, T, H, P), dt (B, T, H), b, c (B, T, G, N) → out (B, T, H, P) in x's dtype, final_state in fp32 up."""
    dtype = inputs["x"].dtype
    wide = torch.promote_types(dtype, torch.float32)
    x, dt, a, b, c = (inputs[name].to(wide) for name in ("x", "dt", "a", "b", "c"))
    B, T, H, P = x.shape
    real = inputs.get("attention_mask", torch.ones(B, T, dtype=torch.bool, device=x.device))[..., None]
    dt = torch.where(real, dt, 0)  # before anything is taken of it: NaN in padding must not reach a gradient
    delta = dt + inputs["dt_bias"] if "dt_bias" in inputs else dt
    # above its threshold torch takes softplus(x) as x, which by default is wrong in the tenth digit
    delta = F.softplus(delta, threshold=40) if options.dt_softplus else delta
    delta = torch.where(real, delta.clamp(*options.dt_limit), 0)
    x, b, c = (torch.where(real[..., None], each, 0) for each in (x, b, c))
    b, c = (each.repeat_interleave(H // each.shape[2], 2) for each in (b, c))
    decay = torch.exp(delta * a)
    if "segment_ids" in inputs:
        runs = run_numbers(inputs["segment_ids"], inputs.get("attention_mask"))
        starts = F.pad(runs[:, 1:] != runs[:, :-1], (1, 0))
        decay = torch.where(starts[..., None], 0, decay)

    state = inputs.get("initial_state", x.new_zeros(B, H, P, b.shape[3]))
    read = []
    for t in range(T):
        write = (delta[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        state = decay[:, t, :, None, None] * state + write
        read.append((state * c[:, t, :, None]).sum(-1))
    out = torch.stack(read, 1)
    if "d" in inputs:
        out = out + inputs["d"].reshape(H, -1) * x
    if "z" in inputs:
        out = out * F.silu(torch.where(real[..., None], inputs["z"].to(wide), 0))
    return {"out": torch.where(real[..., None], out, 0).to(dtype), "final_state": state.clone()}


EAGER = from_reference(ssd, OPERATOR.differentiable)
