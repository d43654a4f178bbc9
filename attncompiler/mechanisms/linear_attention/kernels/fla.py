"""flash-linear-attention's gated recurrence in chunks of 64 tokens (Yang & Zhang 2024), as its simple GLA has it.

Its own normalised form is another function: the factor `scale` cancels in it, its eps is 1e-10, and the keys' running
sum is kept in their dtype (fla/ops/linear_attn/utils.py, 0.6.0). So it is asked for sums alone, and the normaliser is
one more column of the values, all ones: what is φ(q)·[S, z] then is one call, decays and states included.

Decays are cut off at `LEAST`: it exponentiates differences of sums over a chunk, where a decay that leaves nothing
would take all that is short beside it, and −∞ would give NaN. Features are made in fp32 and rounded, as it takes them.

What it calls in its forward and backward has changed between its versions (the decays' base, for one), so its backward
is reached through autograd, which runs its forward again.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from attncompiler.mechanisms.linear_attention.op import OPERATOR, LinearAttentionOptions
from attncompiler.runtime.implementation import Implementation, Tensors, differentiate

LEAST = -104.0
"""The logarithm of the least decay: below it fp32 has none, and 64 of them sum to a number exact to 2⁻¹⁰."""
MULTIPLE = 8
"""Widths are rounded up to multiples of it: it refuses the gradients of values at odd ones (ops/common/chunk_o.py)."""


def features(x: Tensor, feature_map: str, width: int) -> Tensor:
    """x (B, T, H, D) → φ(x) (B, T, H, width) in x's dtype, zeros after D."""
    wide = x.float()
    if feature_map == "elu":
        wide = torch.where(wide > 0, wide + 1, wide.clamp(max=0).exp())
    elif feature_map == "relu":
        wide = wide.relu()
    return pad(wide.to(x.dtype), (0, width - x.shape[-1]))


def rounded(width: int) -> int:
    """The next width that is a multiple."""
    return -(-width // MULTIPLE) * MULTIPLE


def forward(inputs: Tensors, options: LinearAttentionOptions) -> dict[str, Tensor]:
    """Every output of the operator; `out` in q's dtype, the rest in fp32."""
    from fla.ops.simple_gla import chunk_simple_gla

    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    (B, T, H, D), V = q.shape, v.shape[-1]
    R, columns = rounded(D), rounded(V + 1)
    values = torch.cat([v, v.new_ones(B, T, H, 1), v.new_zeros(B, T, H, columns - V - 1)], -1)
    sums, state = chunk_simple_gla(
        features(q, options.feature_map, R),
        features(k, options.feature_map, R),
        values,
        g=inputs["log_decay"].clamp(min=LEAST) if "log_decay" in inputs else None,
        scale=1.0 if options.normalize else options.scale,
        initial_state=_initial(inputs, R, columns),
        output_final_state=True,
    )
    out, normalizer = sums[..., :V], torch.ones(B, T, H, dtype=torch.float32, device=q.device)
    if options.normalize:
        normalizer = sums[..., V].float() + options.eps
        out = (options.scale * out.float() / normalizer[..., None]).to(q.dtype)
    return {
        "out": out.contiguous(),
        "normalizer": normalizer,
        "final_s": state[:, :, :D, :V].contiguous(),
        "final_z": state[:, :, :D, V].contiguous(),
        "final_m": state.new_zeros(B, H),
    }


KERNEL = Implementation(forward, differentiate(forward, OPERATOR.differentiable))


def _initial(inputs: Tensors, rows: int, columns: int) -> Tensor | None:
    """[S, z] before the first token, (B, H, rows, columns) with zeros around them."""
    if "initial_s" not in inputs:
        return None
    sums = torch.cat([inputs["initial_s"], inputs["initial_z"][..., None]], -1)
    sums = sums * inputs["initial_m"].exp()[..., None, None]
    return pad(sums, (0, columns - sums.shape[-1], 0, rows - sums.shape[-2]))
