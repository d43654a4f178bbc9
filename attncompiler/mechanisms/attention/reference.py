"""The oracle: the whole score matrix, in fp32 or better, rounded where a kernel in the same dtype must round."""

from __future__ import annotations

import torch
from torch import Tensor

from attncompiler.mechanisms.attention.op import OPERATOR, AttentionOptions
from attncompiler.mechanisms.attention.visibility import visible
from attncompiler.runtime.implementation import Tensors, from_reference


def attention(inputs: Tensors, options: AttentionOptions) -> dict[str, Tensor]:
    """q (B, T, H, D), k (B, S, K, D), v (B, S, K, V) → out (B, T, H, V) in q's dtype, lse (B, H, T) in fp32 or fp64."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    accumulate = torch.promote_types(q.dtype, torch.float32)
    heads_per_key = q.shape[2] // k.shape[2]
    grouped = q.to(accumulate).unflatten(2, (k.shape[2], heads_per_key))
    scores = torch.einsum("btkgd,bskd->bkgts", grouped, k.to(accumulate)) * options.softmax_scale(q.shape[-1])
    seen = visible(inputs, options.pattern)[:, None, None]
    scores = scores.masked_fill(~seen, -torch.inf)
    largest = scores.amax(-1, keepdim=True).detach()
    largest = torch.where(largest.isfinite(), largest, 0)
    weights = torch.exp(scores - largest)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    probabilities = (weights / torch.where(empty, 1, total)).to(v.dtype).to(accumulate)
    out = torch.einsum("bkgts,bskv->btkgv", probabilities, v.to(accumulate)).flatten(2, 3).to(q.dtype)
    lse = torch.where(empty, -torch.inf, largest + total.log())
    return {"out": out, "lse": lse.squeeze(-1).flatten(1, 2).detach()}


EAGER = from_reference(attention, OPERATOR.differentiable)
