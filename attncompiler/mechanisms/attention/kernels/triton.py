"""The built-in GPU kernel: flash attention in Triton (`attention/flash`), which is imported where it first runs."""

from __future__ import annotations

import torch
from torch import Tensor

from attncompiler.mechanisms.attention.op import AttentionOptions
from attncompiler.runtime.implementation import Implementation, Tensors


def forward(inputs: Tensors, options: AttentionOptions) -> dict[str, Tensor]:
    """q (B, T, H, D), k (B, S, K, D), v (B, S, K, V) → out (B, T, H, V), lse (B, H, T)."""
    from attncompiler.mechanisms.attention.flash import kernel

    with torch.cuda.device_of(inputs["q"]):
        return kernel.forward(inputs, options)


def backward(grads: Tensors, inputs: Tensors, outputs: Tensors, options: AttentionOptions) -> dict[str, Tensor]:
    """The gradients of q, k, v and sinks, from the probabilities that the lse gives back."""
    from attncompiler.mechanisms.attention.flash import kernel

    with torch.cuda.device_of(inputs["q"]):
        return kernel.backward(grads, inputs, outputs, options)


KERNEL = Implementation(forward, backward)
