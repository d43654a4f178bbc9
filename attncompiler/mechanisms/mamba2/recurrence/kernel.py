"""Forward and backward as passes of the recurrence."""

from __future__ import annotations

import torch
from torch import Tensor

from attncompiler.blocks.recurrence.launch import Found, Order, Side, run
from attncompiler.blocks.segments import run_numbers
from attncompiler.mechanisms.mamba2.op import Mamba2Options
from attncompiler.mechanisms.mamba2.recurrence.launch import gradients
from attncompiler.mechanisms.mamba2.recurrence.step import step
from attncompiler.mechanisms.mamba2.recurrence.steps import time_steps, time_steps_gradient
from attncompiler.runtime.implementation import Tensors


class Call:
    """A call's tensors, and its time steps Δ, `factor` (B, H, T) in fp32, 0 on padding."""

    def __init__(self, inputs: Tensors, options: Mamba2Options):
        self.inputs, self.options = inputs, options
        self.x, self.b, self.c = inputs["x"], inputs["b"], inputs["c"]
        self.B, self.T, self.H, self.P = self.x.shape
        self.G, self.N = self.b.shape[2:]
        self.real = inputs.get("attention_mask")
        self.factor, decay = time_steps(inputs["dt"], inputs.get("dt_bias"), inputs["a"], self.real, options)
        runs = run_numbers(inputs.get("segment_ids"), self.real)
        self.order = Order(decay.transpose(1, 2), runs, self.real)

    def shared(self, tensor: Tensor) -> Side:
        """B or C, which all heads of a group read."""
        return Side(tensor, share=self.H // self.G)

    @property
    def skip(self) -> Tensor | None:
        """D as (H, P)."""
        d = self.inputs.get("d")
        return d if d is None or d.dim() == 2 else d[:, None].expand(-1, self.P)


def forward(inputs: Tensors, options: Mamba2Options) -> dict[str, Tensor]:
    """out (B, T, H, P) in x's dtype and final_state (B, H, P, N) in fp32."""
    if inputs["x"].shape[1] == 1:
        return step(inputs, options)
    call = Call(inputs, options)
    z = inputs.get("z")
    found = _read(call, None if z is None else Side(z), call.x.dtype)
    assert found.final is not None
    state = found.final.unflatten(-1, (call.N, call.P)).mT
    return {"out": found.out, "final_state": state.clone(memory_format=torch.contiguous_format)}


def _read(call: Call, z: Side | None, dtype: torch.dtype) -> Found:
    """(C·h + D·x) · silu(z), and the state behind."""
    initial = call.inputs.get("initial_state")
    return run(
        call.shared(call.c),
        call.shared(call.b),
        Side(call.x),
        call.order,
        H=call.H,
        scales=call.factor,
        skip=call.skip,
        z=z,
        most_tokens=call.options.chunk_size,
        initial=None if initial is None else _turned(initial),
        final=True,
        out_dtype=dtype,
    )


def _turned(state: Tensor) -> Tensor:
    """A state (B, H, P, N) as the pass over rows of C takes it: (N, P), flat."""
    return state.mT.flatten(2).contiguous()


def backward(grads: Tensors, inputs: Tensors, outputs: Tensors, options: Mamba2Options) -> dict[str, Tensor]:
    """The gradient of every differentiable input that is present."""
    call = Call(inputs, options)
    found: dict[str, Tensor] = {}
    dout = grads["out"] if "out" in grads else torch.zeros_like(call.x)
    dy = _ungated(call, dout, found)
    end, start = grads.get("final_state"), inputs.get("initial_state")
    met = gradients(
        call.x,
        call.b,
        call.c,
        dy,
        call.factor,
        call.order,
        call.skip,
        "d" in inputs and inputs["d"].dim() == 1,
        None if start is None else _turned(start),
        None if end is None else _turned(end),
        options.chunk_size,
    )
    found |= {"x": met.x, "b": met.b, "c": met.c}
    if start is not None:
        found["initial_state"] = met.initial.view(call.B, call.H, call.N, call.P).mT.contiguous()
    found["dt"], sums = time_steps_gradient(
        *(met.dots, met.passing, call.factor, inputs["a"], inputs["dt"], inputs.get("dt_bias"), call.real),
        *(met.tokens, options),
    )
    return found | sums


def _ungated(call: Call, dout: Tensor, found: dict[str, Tensor]) -> Tensor:
    """The gradient of C·h + D·x in x's dtype, 0 on padding; those of z, and of D of (H, P), are put into `found`."""
    inputs = call.inputs
    if call.real is not None:
        dout = dout.masked_fill(~call.real[..., None, None], 0)
    if "z" in inputs:
        z = inputs["z"].float()
        if call.real is not None:
            z = z.masked_fill(~call.real[..., None, None], 0)
        y = _read(call, None, torch.float32).out
        sigmoid = torch.sigmoid(z)
        found["z"] = (dout * y * sigmoid * (1 + z * (1 - sigmoid))).to(inputs["z"].dtype)
        dout = dout * (z * sigmoid)
    if "d" in inputs and inputs["d"].dim() == 2:
        x = inputs["x"] if call.real is None else inputs["x"].masked_fill(~call.real[..., None, None], 0)
        found["d"] = (dout.float() * x.float()).sum((0, 1))
    return dout.to(call.x.dtype)
