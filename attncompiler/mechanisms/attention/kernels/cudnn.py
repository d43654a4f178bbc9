"""cuDNN's fused attention, below F.scaled_dot_product_attention, which hides the lse.

It reads (B, T, H, D) through transposed views, serves grouped heads without repetition, and takes heads whose width is
a multiple of 8: others are widened by zeros. Its causal flag is aligned to the top left, so it stands for ours only
where T = S.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attncompiler.mechanisms.attention import sinks
from attncompiler.mechanisms.attention.op import AttentionOptions
from attncompiler.mechanisms.attention.widths import rounded, widened
from attncompiler.runtime.implementation import Implementation, Tensors


def _heads_first(tensor: Tensor) -> Tensor:
    """(B, T, H, D) → (B, H, T, D′), a view where D is a multiple of 8."""
    return widened(tensor, rounded(tensor.shape[-1])).transpose(1, 2)


def forward(inputs: Tensors, options: AttentionOptions) -> dict[str, Tensor]:
    """q (B, T, H, D), k (B, S, K, D), v (B, S, K, V) → out (B, T, H, V), lse (B, H, T)."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    found, stats, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        _heads_first(q),
        _heads_first(k),
        _heads_first(v),
        None,
        True,
        0.0,
        options.pattern.causal,
        False,
        scale=options.softmax_scale(q.shape[-1]),
    )
    out, lse = found.transpose(1, 2)[..., : v.shape[-1]].contiguous(), stats.reshape(stats.shape[:3])
    if "sinks" in inputs:
        out, lse = sinks.join(out, lse, inputs["sinks"])
    return {"out": out, "lse": lse}


def backward(grads: Tensors, inputs: Tensors, outputs: Tensors, options: AttentionOptions) -> dict[str, Tensor]:
    """The gradients of q, k, v and sinks, from the probabilities that the lse gives back."""
    q, k, v, lse = inputs["q"], inputs["k"], inputs["v"], outputs["lse"]
    seed = torch.zeros((), dtype=torch.int64, device=q.device)  # of a dropout that there is not
    found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        _heads_first(grads["out"]),
        _heads_first(q),
        _heads_first(k),
        _heads_first(v),
        _heads_first(outputs["out"]),
        lse[..., None].contiguous(),
        seed,
        seed,
        None,
        None,
        None,
        q.shape[1],
        k.shape[1],
        0.0,
        options.pattern.causal,
        scale=options.softmax_scale(q.shape[-1]),
    )
    grads_by_name = {
        name: grad.transpose(1, 2)[..., : inputs[name].shape[-1]].contiguous()
        for name, grad in zip("qkv", found, strict=True)
    }
    if "sinks" in inputs:
        grads_by_name["sinks"] = sinks.gradient(inputs["sinks"], outputs["out"], lse, grads["out"])
    return grads_by_name


KERNEL = Implementation(forward, backward)
