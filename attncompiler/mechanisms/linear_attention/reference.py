"""The oracle: every pair of tokens, in fp32 or better."""

from __future__ import annotations

import torch
from torch import Tensor

from attncompiler.blocks.segments import run_numbers
from attncompiler.mechanisms.linear_attention.op import OPERATOR, LinearAttentionOptions
from attncompiler.runtime.implementation import Tensors, from_reference


def features(x: Tensor, feature_map: str) -> Tensor:
    """φ(x). elu(x) + 1 is written as exp(x) below 0, where the sum would lose what is small."""
    if feature_map == "elu":
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())
    return x.relu() if feature_map == "relu" else x


def linear_attention(inputs: Tensors, options: LinearAttentionOptions) -> dict[str, Tensor]:
    """q, k (B, T, H, D), v (B, T, H, V) → out (B, T, H, V) in q's dtype, and the final state in fp32 or fp64."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    B, T, H, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    phi_q, phi_k = features(q.to(wide), options.feature_map), features(k.to(wide), options.feature_map)
    values = v.to(wide)
    everywhere = torch.ones(B, T, dtype=torch.bool, device=q.device)
    real = inputs.get("attention_mask", everywhere)
    runs = run_numbers(inputs.get("segment_ids"), inputs.get("attention_mask"))
    runs = torch.zeros_like(real, dtype=torch.int64) if runs is None else runs

    seen = (runs[:, :, None] == runs[:, None]) & real[:, None]
    if options.causal:
        seen = seen & torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    weights = torch.einsum("bthd,bshd->bhts", phi_q, phi_k) * seen[:, None]
    initial_s, initial_z = _initial(inputs, phi_k, values)
    in_first = (runs == 0).to(wide)
    numerator = torch.einsum("bhts,bshv->bthv", weights, values)
    numerator = numerator + torch.einsum("bt,bthd,bhdv->bthv", in_first, phi_q, initial_s)
    normalizer = torch.ones_like(numerator[..., 0])
    if options.normalize:
        total = weights.sum(-1).transpose(1, 2) + torch.einsum("bt,bthd,bhd->bth", in_first, phi_q, initial_z)
        normalizer = torch.where(real[..., None], total + options.eps, 1)
    out = torch.where(real[..., None, None], options.scale * numerator / normalizer[..., None], 0)

    in_last = runs == runs[:, -1:]
    last_keys = phi_k * (in_last & real)[..., None, None]
    keeps_initial = in_first[:, -1, None, None]
    return {
        "out": out.to(q.dtype),
        "normalizer": normalizer,
        "final_s": torch.einsum("bthd,bthv->bhdv", last_keys, values) + keeps_initial[..., None] * initial_s,
        "final_z": last_keys.sum(1) + keeps_initial * initial_z,
        "final_m": phi_k.new_zeros(B, H),
    }


def _initial(inputs: Tensors, phi_k: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The sums S (B, H, D, V) and z (B, H, D) that the initial state stands for; 0 without one."""
    B, _, H, D = phi_k.shape
    if "initial_s" not in inputs:
        return phi_k.new_zeros(B, H, D, values.shape[-1]), phi_k.new_zeros(B, H, D)
    growth = inputs["initial_m"].exp()[..., None]
    return inputs["initial_s"] * growth[..., None], inputs["initial_z"] * growth


EAGER = from_reference(linear_attention, OPERATOR.differentiable)
