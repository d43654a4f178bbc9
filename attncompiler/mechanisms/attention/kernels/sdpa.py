"""torch's own fused attention, below F.scaled_dot_product_attention, which hides the lse.

On a GPU that is FlashAttention-2 or the memory-efficient kernel (`fused`). The flash attention for CPUs reads
(B, T, H, D) through transposed views and serves grouped heads without repetition. Its causal flag is aligned to the top
left, so it stands for ours only where T = S. Any other visibility is an additive mask of T × S.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attncompiler.mechanisms.attention import fused, sinks
from attncompiler.mechanisms.attention.op import AttentionOptions
from attncompiler.mechanisms.attention.visibility import visible
from attncompiler.runtime.implementation import Implementation, Tensors

MASK_ROWS = 2**20
"""Elements of the mask that are made at once, so that making it needs no more memory than it has itself."""


def _causal_flag(inputs: Tensors, options: AttentionOptions) -> bool:
    """Whether no query sees a key of a later index, so that torch may skip the upper triangle.

    torch fills it with −∞ before it scales: a scale that is not positive would make that NaN or +∞.
    """
    square = inputs["q"].shape[1] == inputs["k"].shape[1]
    positive = options.scale is None or options.scale > 0
    indexed = "q_positions" not in inputs and "kv_segment_ids" not in inputs
    return options.pattern.causal and square and positive and indexed


def _mask(inputs: Tensors, options: AttentionOptions) -> Tensor | None:
    """What to add to the scores, (B or 1, 1, T, S) of 0 and −∞ in q's dtype; None where the causal flag says it all."""
    q, T, S = inputs["q"], inputs["q"].shape[1], inputs["k"].shape[1]
    plain = not inputs.keys() & {"segment_ids", "attention_mask", "q_positions"}
    kind = options.pattern.kind
    if plain and (kind == "full" or (kind == "causal" and (T == 1 or _causal_flag(inputs, options)))):
        return None
    rows = max(1, MASK_ROWS // S)
    parts = []
    for start in range(0, T, rows):
        seen = visible(inputs, options.pattern, slice(start, start + rows), layer=options.layer)
        parts.append(torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, -torch.inf))
    return torch.cat(parts, 1)[:, None]


def _heads_first(tensor: Tensor) -> Tensor:
    """(B, T, H, D) → (B, H, T, D), a view; torch's kernel reads rows of D as contiguous without a check."""
    return (tensor if tensor.stride(-1) == 1 else tensor.contiguous()).transpose(1, 2)


def forward(inputs: Tensors, options: AttentionOptions) -> dict[str, Tensor]:
    """q (B, T, H, D), k (B, S, K, D), v (B, S, K, V) → out (B, T, H, V), lse (B, H, T); on a CPU V = D."""
    out, lse = (fused.forward if inputs["q"].is_cuda else _on_cpu)(inputs, options)
    if "sinks" in inputs:
        out, lse = sinks.join(out, lse, inputs["sinks"])
    return {"out": out, "lse": lse}


def _on_cpu(inputs: Tensors, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    mask = _mask(inputs, options)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        _heads_first(q),
        _heads_first(k),
        _heads_first(v),
        0.0,
        _causal_flag(inputs, options),
        attn_mask=mask,
        scale=options.softmax_scale(q.shape[-1]),
    )
    if mask is not None:
        lse = lse.masked_fill((mask == -torch.inf).all(-1), -torch.inf)  # torch leaves 0 there
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def backward(grads: Tensors, inputs: Tensors, outputs: Tensors, options: AttentionOptions) -> dict[str, Tensor]:
    """The gradients of q, k, v and sinks, from the probabilities that the lse gives back."""
    run = fused.backward if inputs["q"].is_cuda else _backward_on_cpu
    found = dict(zip("qkv", run(grads["out"], inputs, outputs, options), strict=True))
    if "sinks" in inputs:
        found["sinks"] = sinks.gradient(inputs["sinks"], outputs["out"], outputs["lse"], grads["out"])
    return found


def _backward_on_cpu(dout: Tensor, inputs: Tensors, outputs: Tensors, options: AttentionOptions) -> tuple[Tensor, ...]:
    q, lse = inputs["q"], outputs["lse"]
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        _heads_first(dout),
        _heads_first(q),
        _heads_first(inputs["k"]),
        _heads_first(inputs["v"]),
        _heads_first(outputs["out"]),
        lse.masked_fill(lse == -torch.inf, 0.0),  # −∞ − −∞ is no number; the mask alone makes such a row 0
        0.0,
        _causal_flag(inputs, options),
        attn_mask=_mask(inputs, options),
        scale=options.softmax_scale(q.shape[-1]),
    )
    return tuple(grad.transpose(1, 2).contiguous() for grad in found)


KERNEL = Implementation(forward, backward)
