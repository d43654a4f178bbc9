"""One query a sequence, as in decoding: a single row of scores, without blocks or tiles.

Shapes: g = H / K query heads read one key head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attncompiler.blocks.underflow import LOG2_E, exp2_
from attncompiler.mechanisms.attention.op import AttentionOptions
from attncompiler.mechanisms.attention.pattern import Causal, Full, Pattern, retained
from attncompiler.mechanisms.attention.visibility import positions, visible
from attncompiler.runtime.implementation import Tensors

LOWEST = -1e30
"""A score in base 2 that stands for −∞ where −∞ − (−∞) would be no number; below every score there is."""
ROW = 2**22
"""Scores that one row is made of at most."""


def serves(inputs: Tensors, options: AttentionOptions) -> bool:
    """Whether a call is of this form, small enough to be held at once, and without dropout."""
    B, T, H, _ = inputs["q"].shape
    return T == 1 and B * H * inputs["k"].shape[1] <= ROW and not options.dropout


def forward(inputs: Tensors, options: AttentionOptions) -> dict[str, Tensor]:
    """q (B, 1, H, D), k (B, S, K, D), v (B, S, K, V) → out (B, 1, H, V), lse (B, H, 1), both without sinks."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    (B, _, H, D), K = q.shape, k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    unit = LOG2_E if options.softcap is None else 1 / options.softcap
    queries = q.to(dtype).reshape(B, K, H // K, D) * (options.softmax_scale(D) * unit)
    scores = queries @ k.to(dtype).permute(0, 2, 3, 1)
    if options.softcap is not None:
        scores = scores.tanh_().mul_(options.softcap * LOG2_E)
    if "alibi_slopes" in inputs:
        i, j = positions(inputs)
        slopes = inputs["alibi_slopes"].to(dtype).view(K, -1, 1)
        scores.addcmul_((i - j).abs().to(dtype)[:, None, None], slopes, value=-LOG2_E)
    if not _sees_all(inputs, options.pattern):
        seen = visible(inputs, options.pattern, layer=options.layer)
        scores.masked_fill_(~seen[:, None], -torch.inf)
    largest = scores.amax(-1, keepdim=True).clamp_(min=LOWEST)
    weights = exp2_(scores.sub_(largest))
    total = weights.sum(-1, keepdim=True)
    normaliser = largest + total.log2()
    total.clamp_(min=torch.finfo(dtype).tiny)  # less than the sum of a row that sees something, which is at least 1
    out = (weights @ v.to(dtype).transpose(1, 2)).div_(total)
    return {"out": out.view(B, 1, H, -1).to(q.dtype), "lse": normaliser.view(B, H, 1) / LOG2_E}


def _sees_all(inputs: Tensors, pattern: Pattern) -> bool:
    """Whether the query sees every key there is, as indices alone tell."""
    if inputs.keys() & {"segment_ids", "attention_mask", "q_positions"}:
        return False
    if isinstance(pattern, (Full, Causal)):
        return True
    kept, S = retained(pattern), inputs["k"].shape[1]
    return kept.recent is not None and kept.start(S - 1) <= kept.first
