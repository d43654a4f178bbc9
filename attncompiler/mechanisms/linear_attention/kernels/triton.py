"""The built-in GPU kernel: passes of the gated recurrence in Triton (`recurrence/`), imported where they first run."""

from __future__ import annotations

import torch
from torch import Tensor

from attncompiler.mechanisms.linear_attention.op import LinearAttentionOptions
from attncompiler.runtime.implementation import Implementation, Tensors


def forward(inputs: Tensors, options: LinearAttentionOptions) -> dict[str, Tensor]:
    """Every output of the operator; `out` in q's dtype, the rest in fp32."""
    from attncompiler.mechanisms.linear_attention.recurrence import kernel

    with torch.cuda.device_of(inputs["q"]):
        return kernel.forward(inputs, options)


def backward(grads: Tensors, inputs: Tensors, outputs: Tensors, options: LinearAttentionOptions) -> dict[str, Tensor]:
    """Gradients of q, k, v and, when they are given, of the decays and of the initial state."""
    from attncompiler.mechanisms.linear_attention.recurrence import kernel

    with torch.cuda.device_of(inputs["q"]):
        return kernel.backward(grads, inputs, outputs, options)


KERNEL = Implementation(forward, backward)
