"""The built-in GPU kernel: the scan in Triton (`recurrence/`), imported where it first runs."""

from __future__ import annotations

import torch
from torch import Tensor

from attncompiler.mechanisms.mamba.op import MambaOptions
from attncompiler.runtime.implementation import Implementation, Tensors


def forward(inputs: Tensors, options: MambaOptions) -> dict[str, Tensor]:
    """out (B, T, E) in u's dtype and final_state (B, E, N) in fp32."""
    from attncompiler.mechanisms.mamba.recurrence import kernel

    with torch.cuda.device_of(inputs["u"]):
        return kernel.forward(inputs, options)


def backward(grads: Tensors, inputs: Tensors, outputs: Tensors, options: MambaOptions) -> dict[str, Tensor]:
    """The gradient of every differentiable input that is present."""
    from attncompiler.mechanisms.mamba.recurrence import kernel

    with torch.cuda.device_of(inputs["u"]):
        return kernel.backward(grads, inputs, outputs, options)


KERNEL = Implementation(forward, backward)
