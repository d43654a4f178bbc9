"""The oracle: every pair of tokens, in fp32 or better.

Features of `favor` are kept as exp(a − max a) beside their max a, and what a token sums as a multiple of the largest
weight among what it sees, so that only numbers up to 1 are exponentiated. Both maxima are constants to the gradient:
what is multiplied by the one is divided by the other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attncompiler.blocks.segments import run_numbers
from attncompiler.mechanisms.linear_attention.op import OPERATOR, LinearAttentionOptions
from attncompiler.runtime.implementation import Tensors, from_reference


def features(x: Tensor, feature_map: str, projection: Tensor | None) -> tuple[Tensor, Tensor]:
    """x (B, T, H, D) → φ(x)·exp(−m) (B, T, H, R) and m (B, T, H), which is 0 but for favor.

    elu(x) + 1 is written as exp(x) below 0, where the sum would lose what is small.
    """
    if projection is not None:
        x = x * x.shape[-1] ** -0.25
        logarithm = x @ projection.mT - x.square().sum(-1, keepdim=True) / 2 - math.log(len(projection)) / 2
        largest = logarithm.detach().amax(-1, keepdim=True)
        return (logarithm - largest).exp(), largest[..., 0]
    if feature_map == "elu":
        x = torch.where(x > 0, x + 1, x.clamp(max=0).exp())
    elif feature_map == "relu":
        x = x.relu()
    return x, torch.zeros_like(x[..., 0])


def linear_attention(inputs: Tensors, options: LinearAttentionOptions) -> dict[str, Tensor]:
    """q, k (B, T, H, D), v (B, T, H, V) → out (B, T, H, V) in q's dtype, and the final state in fp32 or fp64."""
    q, values = inputs["q"], inputs["v"].to(torch.promote_types(inputs["v"].dtype, torch.float32))
    B, T, *_ = q.shape
    wide, favor = values.dtype, options.feature_map == "favor"
    (phi_q, m_q), (phi_k, m_k) = (
        features(inputs[name].to(wide), options.feature_map, inputs.get("projection")) for name in ("q", "k")
    )
    real = inputs.get("attention_mask", torch.ones(B, T, dtype=torch.bool, device=q.device))
    runs = run_numbers(inputs.get("segment_ids"), inputs.get("attention_mask"))
    runs = torch.zeros_like(real, dtype=torch.int64) if runs is None else runs
    initial_s, initial_z, initial_m = _initial(inputs, phi_k, values)

    # logarithms of what a token weighs the others by (B, H, T, T), and the initial state (B, H, T)
    seen = (runs[:, :, None] == runs[:, None]) & real[:, None]
    if options.causal:
        seen = seen & torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    between, from_start = _decays(inputs.get("log_decay"), real, values)
    pairs = (between + m_k.transpose(1, 2)[:, :, None]).masked_fill(~seen[:, None], -math.inf)
    carried = (from_start + initial_m[..., None]).masked_fill(runs[:, None] != 0, -math.inf)
    top = torch.maximum(pairs.amax(-1), carried).detach() if favor else torch.zeros_like(carried)
    below = top.clamp(min=torch.finfo(wide).min)  # of a token that sees nothing, a number to subtract from −∞
    pairs, carried = (pairs - below[..., None]).exp(), (carried - below).exp()

    weights = torch.einsum("bthr,bshr->bhts", phi_q, phi_k) * pairs
    total = weights.sum(-1) + carried * torch.einsum("bthr,bhr->bht", phi_q, initial_z)
    numerator = torch.einsum("bhts,bshv->bhtv", weights, values)
    numerator = numerator + carried[..., None] * torch.einsum("bthr,bhrv->bhtv", phi_q, initial_s)
    quotient, normalizer = _quotient(numerator, total, m_q.transpose(1, 2) + below, options)
    out = torch.where(real[..., None, None], options.scale * quotient.transpose(1, 2), 0)
    nothing = 0 if favor else 1

    last_keys = pairs[:, :, -1, :, None] * phi_k.transpose(1, 2)
    keeps = carried[:, :, -1, None]
    return {
        "out": out.to(q.dtype),
        "normalizer": torch.where(real[..., None], normalizer.transpose(1, 2), nothing),
        "final_s": last_keys.mT @ values.transpose(1, 2) + keeps[..., None] * initial_s,
        "final_z": last_keys.sum(2) + keeps * initial_z,
        "final_m": top[:, :, -1],
    }


def _quotient(
    numerator: Tensor, total: Tensor, logarithm: Tensor, options: LinearAttentionOptions
) -> tuple[Tensor, Tensor]:
    """The sums over themselves and eps, and the normaliser: its logarithm for favor, whose sums are times exp(log…)."""
    if options.feature_map != "favor":
        normalizer = total + options.eps if options.normalize else torch.ones_like(total)
        return numerator / normalizer[..., None], normalizer
    if not options.normalize:
        half = (logarithm / 2).exp()[..., None]
        return numerator * half * half, torch.zeros_like(total)
    above_eps = logarithm - math.log(options.eps)
    shrink, eps = above_eps.clamp(max=0).exp(), above_eps.clamp(min=0).neg().exp()
    divisor = (total * shrink + eps).clamp(min=torch.finfo(total.dtype).tiny)
    normalizer = divisor.log() + above_eps.clamp(min=0) + math.log(options.eps)
    return numerator * (shrink / divisor)[..., None], normalizer


def _initial(inputs: Tensors, phi_k: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """S (B, H, R, V), z (B, H, R) and m (B, H) before the first token: of nothing without an initial state."""
    B, _, H, R = phi_k.shape
    if "initial_s" in inputs:
        return inputs["initial_s"], inputs["initial_z"], inputs["initial_m"]
    nothing = phi_k.new_zeros(B, H, R, values.shape[-1])
    return nothing, nothing[..., 0], phi_k.new_full((B, H), -math.inf)


def _decays(log_decay: Tensor | None, real: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of log_decay behind token s up to t, (B, H, t, s), 0 for t ≤ s, and from the first token on, (B, H, T)."""
    if log_decay is None:
        return values.new_zeros(1, 1, 1, 1), values.new_zeros(values.shape[:3]).transpose(1, 2)
    log_decay = log_decay.masked_fill(~real[..., None], 0).transpose(1, 2)
    T = log_decay.shape[-1]
    behind = torch.ones(T, T, dtype=torch.bool, device=log_decay.device).tril(-1)
    return torch.where(behind, log_decay[..., None], 0).cumsum(-2), log_decay.cumsum(-1)


EAGER = from_reference(linear_attention, OPERATOR.differentiable)
