"""FlashAttention-4 (https://arxiv.org/abs/2603.05451), of the package flash-attn-4: CuTe kernels, compiled when met.

Its forward and backward are called apart, below flash_attn_func, which keeps what it saves to itself. Its causal mask
and window are aligned to the bottom right, as ours are, and it serves grouped heads without repetition. Heads are
widened by zeros to one width for queries, keys and values alike, a multiple of `WIDTH`. A sink joins at the end
(`attention/sinks.py`): out and lse with it are all that the backward must know of it.

What it offers and is not asked for here, with the finding, stands beside its needs in `mechanism.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attncompiler.mechanisms.attention import sinks
from attncompiler.mechanisms.attention.op import AttentionOptions
from attncompiler.mechanisms.attention.pattern import SlidingWindow
from attncompiler.mechanisms.attention.widths import rounded, widened
from attncompiler.runtime.implementation import Implementation, Tensors

WIDTH = 32
"""It takes multiples of 8, but at 8, 16, 40, 48, 72 and 80 its gradients on Hopper are wrong from 65 tokens on, and at
112 its backward does not compile (seen with 4.0.0b36; flash-attention #2896 names the cause): its tiles are then of 16
columns where its sums are laid out by 32."""


def visibility(options: AttentionOptions, S: int) -> dict[str, Any]:
    """What is visible of S keys, in its words: `causal`, or how far left and right of its own key a query sees."""
    pattern = options.pattern
    if isinstance(pattern, SlidingWindow) and pattern.window < S:
        return {"causal": False, "window_size_left": pattern.window - 1, "window_size_right": 0}
    return {"causal": pattern.causal, "window_size_left": None, "window_size_right": None}


def _wide(inputs: Tensors, *tensors: Tensor) -> list[Tensor]:
    width = rounded(max(inputs["q"].shape[-1], inputs["v"].shape[-1]), WIDTH)
    return [widened(tensor.detach(), width).contiguous() for tensor in tensors]


def _narrow(tensor: Tensor, width: int) -> Tensor:
    return tensor if tensor.shape[-1] == width else tensor[..., :width].contiguous()


def forward(inputs: Tensors, options: AttentionOptions) -> dict[str, Tensor]:
    """q (B, T, H, D), k (B, S, K, D), v (B, S, K, V) → out (B, T, H, V), lse (B, H, T)."""
    from flash_attn.cute.interface import _flash_attn_fwd

    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    with torch.cuda.device_of(q):  # the library launches on the current device
        found, lse, *_ = _flash_attn_fwd(
            *_wide(inputs, q, k, v),
            softmax_scale=options.softmax_scale(q.shape[-1]),
            **visibility(options, k.shape[1]),
            return_lse=True,
        )
    out = _narrow(found, v.shape[-1])
    if "sinks" in inputs:
        out, lse = sinks.join(out, lse, inputs["sinks"])
    return {"out": out, "lse": lse.contiguous()}


def backward(grads: Tensors, inputs: Tensors, outputs: Tensors, options: AttentionOptions) -> dict[str, Tensor]:
    """The gradients of q, k, v and sinks, from the probabilities that the lse gives back."""
    from flash_attn.cute.interface import _flash_attn_bwd

    q, k, v, lse = inputs["q"], inputs["k"], inputs["v"], outputs["lse"]
    with torch.cuda.device_of(q):
        found = _flash_attn_bwd(
            *_wide(inputs, q, k, v, outputs["out"], grads["out"]),
            lse,
            softmax_scale=options.softmax_scale(q.shape[-1]),
            **visibility(options, k.shape[1]),
        )
    named = {name: _narrow(grad, inputs[name].shape[-1]) for name, grad in zip("qkv", found[:3], strict=True)}
    if "sinks" in inputs:
        named["sinks"] = sinks.gradient(inputs["sinks"], outputs["out"], lse, grads["out"])
    return named


KERNEL = Implementation(forward, backward)
