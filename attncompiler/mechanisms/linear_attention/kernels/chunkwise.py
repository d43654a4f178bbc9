"""Chunks of the sequence and a running state, in plain torch: memory linear in the length, in both directions.

Inside a chunk every pair of tokens is met, as in the reference; what came before a chunk arrives as the state
(Katharopoulos et al. 2020, section 3.3; chunks as in Hua et al. 2022, https://arxiv.org/abs/2202.10447, section 3.2).
Chunks are handled a span at a time, so that what lies between input and output stays small. Beside this file are its
tokens and features (spans.py), its sums (sums.py) and their gradients (sums_backward.py).

Packed segments, decays and favor's stabiliser are all said by the weights (weights.py) that pairs of tokens, tokens and
boundaries, and pairs of boundaries have for one another: products of features are multiplied by them, forward and
backward. A state reaches a later chunk by the matrix `reach`; the backward goes over the spans in reverse with the same
matrix. Favor's sums are multiples of 2^(m[query] + M), constants to the gradient: what they multiply they divide again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attncompiler.blocks.underflow import LOG2_E, exp2_
from attncompiler.mechanisms.linear_attention.cost import CHUNK, SPAN
from attncompiler.mechanisms.linear_attention.op import LinearAttentionOptions
from attncompiler.mechanisms.linear_attention.spans import Tokens
from attncompiler.mechanisms.linear_attention.sums import State, Sums, scaled, sums_of
from attncompiler.mechanisms.linear_attention.sums_backward import Above, sums_backward
from attncompiler.runtime.implementation import Implementation, Tensors


def forward(inputs: Tensors, options: LinearAttentionOptions) -> dict[str, Tensor]:
    """Every output of the operator; `out` in q's dtype, the rest in fp32 (fp64 for fp64)."""
    tokens = Tokens.of(inputs, options, CHUNK, SPAN)
    B, T, H, _ = tokens.q.shape
    V = tokens.v.shape[-1]
    out = torch.empty(B, T, H, V, dtype=tokens.q.dtype, device=tokens.q.device)
    nothing = 0.0 if tokens.favor else 1.0
    normalizer = torch.full((B, T, H), nothing, dtype=tokens.wide, device=tokens.q.device)
    state = initial = _initial(inputs, tokens)
    for rows, sums, after in sums_of(tokens, initial, options.causal):
        state = after
        out[:, rows] = _quotient(sums, normalizer[:, rows], options)
    if tokens.real is not None:
        out.masked_fill_(~tokens.real[..., None, None], 0)
        normalizer.masked_fill_(~tokens.real[..., None], nothing)
    return {
        "out": out,
        "normalizer": normalizer,
        "final_s": state.sums[..., :V].clone(memory_format=torch.contiguous_format),
        "final_z": state.sums[..., V].clone(memory_format=torch.contiguous_format),
        "final_m": torch.zeros_like(state.sums[..., 0, 0]) if state.m is None else state.m / LOG2_E,
    }


def backward(grads: Tensors, inputs: Tensors, outputs: Tensors, options: LinearAttentionOptions) -> dict[str, Tensor]:
    """Gradients of q, k, v and, when they are given, of the decays and of the initial state."""
    tokens = Tokens.of(inputs, options, CHUNK, SPAN)
    V = tokens.v.shape[-1]
    initial = _initial(inputs, tokens)
    final_grad = torch.zeros_like(initial.sums)
    if "final_s" in grads:
        final_grad[..., :V] = grads["final_s"]
    if "final_z" in grads:
        final_grad[..., V] = grads["final_z"]
    above = Above(grads.get("out"), outputs["out"], outputs["normalizer"], tokens.real, options)
    found = sums_backward(tokens, initial, above, final_grad)
    gradients = {"q": found.q, "k": found.k, "v": found.v}
    if found.log_decay is not None:
        gradients["log_decay"] = found.log_decay
    if "initial_s" in inputs:
        state_grad = found.state if tokens.favor else found.state * inputs["initial_m"].exp()[..., None, None]
        gradients["initial_s"] = state_grad[..., :V].clone(memory_format=torch.contiguous_format)
        gradients["initial_z"] = state_grad[..., V].clone(memory_format=torch.contiguous_format)
    return gradients


KERNEL = Implementation(forward, backward)


def _initial(inputs: Tensors, tokens: Tokens) -> State:
    """The state before the first token."""
    B, _, H, _ = tokens.q.shape
    device = tokens.q.device
    if "initial_s" not in inputs:
        sums = torch.zeros(B, H, tokens.R, tokens.v.shape[-1] + 1, dtype=tokens.wide, device=device)
        return State(sums, sums.new_full((B, H), -math.inf) if tokens.favor else None)
    sums = torch.cat([inputs["initial_s"], inputs["initial_z"][..., None]], -1)
    if tokens.favor:
        return State(sums, inputs["initial_m"] * LOG2_E)
    return State(sums * inputs["initial_m"].exp()[..., None, None], None)


def _quotient(sums: Sums, normalizer: Tensor, options: LinearAttentionOptions) -> Tensor:
    """scale · φ(q)·S over φ(q)·z + eps, which is written to `normalizer`; its logarithm for favor.

    Favor's sums and eps are divided by the larger of 2^m and eps, so that neither overflows.
    """
    result = sums.values[..., :-1] * options.scale
    if sums.m is None:
        if options.normalize:
            normalizer[:] = sums.values[..., -1] + options.eps
            result /= normalizer[..., None]
    elif options.normalize:
        above_eps = sums.m - math.log2(options.eps)
        shrink, eps = exp2_(above_eps.clamp(max=0)), exp2_(-above_eps.clamp(min=0))
        divisor = (sums.values[..., -1] * shrink + eps).clamp_(min=torch.finfo(eps.dtype).tiny)
        normalizer[:] = divisor.log() + above_eps.clamp(min=0) / LOG2_E + math.log(options.eps)
        result *= (shrink / divisor)[..., None]
    else:
        result = scaled(result, sums.m[..., None])
    return result
