"""The oracle: the whole score matrix, in fp32 or better, rounded where a kernel in the same dtype must round."""

from __future__ import annotations

import torch
from torch import Tensor

from attncompiler.mechanisms.attention.dropout import kept
from attncompiler.mechanisms.attention.op import OPERATOR, AttentionOptions
from attncompiler.mechanisms.attention.visibility import positions, visible
from attncompiler.runtime.implementation import Tensors, from_reference


def attention(inputs: Tensors, options: AttentionOptions) -> dict[str, Tensor]:
    """q (B, T, H, D), k (B, S, K, D), v (B, S, K, V) → out (B, T, H, V) in q's dtype, lse (B, H, T) in fp32 or fp64."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
    accumulate = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(accumulate).unflatten(2, (K, H // K))
    scores = torch.einsum("btkgd,bskd->bkgts", grouped, k.to(accumulate)) * options.softmax_scale(D)
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if "alibi_slopes" in inputs:
        i, j = positions(inputs)
        slopes = inputs["alibi_slopes"].to(accumulate).view(K, H // K, 1, 1)
        scores = scores - slopes * (i[:, :, None] - j[:, None]).abs()[:, None, None]
    scores = scores.masked_fill(~visible(inputs, options.pattern, layer=options.layer)[:, None, None], -torch.inf)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    sink = scores.new_full((), -torch.inf)
    if "sinks" in inputs:
        sink = inputs["sinks"].to(accumulate).view(K, H // K, 1, 1)
    # where no key is seen the sink is not either: its exponential could be ∞, whose gradient times 0 is NaN
    sink = torch.where(empty, -torch.inf, sink)
    largest = torch.maximum(scores.amax(-1, keepdim=True), sink).detach()
    largest = torch.where(empty, 0, largest)
    weights = torch.exp(scores - largest)
    total = torch.where(empty, 1, weights.sum(-1, keepdim=True) + torch.exp(sink - largest))
    probabilities = weights / total
    if options.dropout:
        index = [torch.arange(size, device=q.device) for size in (B, T, S)]
        keep = kept(inputs["dropout_seed"], options.dropout, H, *index).unflatten(1, (K, H // K))
        probabilities = probabilities * keep.to(accumulate)
    probabilities = probabilities.to(v.dtype).to(accumulate)
    out = torch.einsum("bkgts,bskv->btkgv", probabilities, v.to(accumulate)).flatten(2, 3).to(q.dtype)
    lse = torch.where(empty, -torch.inf, largest + total.log())
    return {"out": out, "lse": lse.squeeze(-1).flatten(1, 2).detach()}


EAGER = from_reference(attention, OPERATOR.differentiable)
