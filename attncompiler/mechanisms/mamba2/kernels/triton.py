"""The built-in GPU kernel: passes of the gated recurrence in Triton (`recurrence/`), imported where they first run."""

from __future__ import annotations

import torch
from torch import Tensor

from attncompiler.mechanisms.mamba2.op import Mamba2Options
from attncompiler.runtime.implementation import Implementation, Tensors


def forward(inputs: Tensors, options: Mamba2Options) -> dict[str, Tensor]:
    """out (B, T, H, P) in x's dtype and final_state (B, H, P, N) in fp32."""
    from attncompiler.mechanisms.mamba2.recurrence import kernel

    with torch.cuda.device_of(inputs["x"]):
        return kernel.forward(inputs, options)


def backward(grads: Tensors, inputs: Tensors, outputs: Tensors, options: Mamba2Options) -> dict[str, Tensor]:
    """The gradient of every differentiable input that is present."""
    from attncompiler.mechanisms.mamba2.recurrence import kernel

    with torch.cuda.device_of(inputs["x"]):
        return kernel.backward(grads, inputs, outputs, options)


KERNEL = Implementation(forward, backward)
