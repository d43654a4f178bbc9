"""Forward and backward as passes of the recurrence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attncompiler.blocks.recurrence.decays import decay_gradient
from attncompiler.blocks.recurrence.launch import Found, Order, Side, products, run
from attncompiler.blocks.recurrence.passes import Factors
from attncompiler.blocks.segments import run_numbers
from attncompiler.mechanisms.mamba2.op import Mamba2Options
from attncompiler.runtime.implementation import Tensors


class Call:
    """A call's tensors, and its time steps Δ (B, T, H) in fp32, 0 on padding."""

    def __init__(self, inputs: Tensors, options: Mamba2Options):
        self.inputs, self.options = inputs, options
        self.x, self.b, self.c = inputs["x"], inputs["b"], inputs["c"]
        self.B, self.T, self.H, self.P = self.x.shape
        self.G, self.N = self.b.shape[2:]
        self.real = inputs.get("attention_mask")
        raw = self.masked(inputs["dt"].float())
        self.raw = raw + inputs["dt_bias"] if "dt_bias" in inputs else raw
        # above its threshold torch takes softplus(x) as x, which by default is wrong in the tenth digit
        self.free = F.softplus(self.raw, threshold=40) if options.dt_softplus else self.raw
        self.delta = self.masked(self.free.clamp(*options.dt_limit))
        self.factor = self.delta.transpose(1, 2).contiguous()
        runs = run_numbers(inputs.get("segment_ids"), self.real)
        self.order = Order(self.delta * inputs["a"], runs, self.real)

    def masked(self, x: Tensor) -> Tensor:
        """Numbers of each token and head, 0 on padding."""
        return x if self.real is None else x.masked_fill(~self.real[..., None], 0)

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
        factors=Factors(None, call.factor),
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
    most, rows, x = options.chunk_size, Side(dy), Side(call.x)
    b, c = call.shared(call.b), call.shared(call.c)
    wide = torch.float32 if call.H > call.G else call.b.dtype

    def shared(
        left: Side, right: Side, u: Side, raw: Side, factors: Factors, state: Tensor | None, *, reverse: bool
    ) -> Found:
        return run(
            left,
            right,
            u,
            call.order,
            H=call.H,
            reverse=reverse,
            factors=factors,
            raw=raw,
            dots="passing",
            most_tokens=most,
            initial=None if state is None else state.flatten(2).contiguous(),
            final=True,
            summed=call.H // call.G,
            out_dtype=wide,
        )

    dc = shared(rows, x, b, c, Factors(None, call.factor), start, reverse=False)
    found["c"] = _over_heads(call, dc.out)
    db = shared(x, rows, c, b, Factors(call.factor, None), end, reverse=True)
    found["b"] = _over_heads(call, db.out)
    assert db.final is not None
    met = None if start is None else torch.linalg.vecdot(start.flatten(2), db.final)
    log_decay = call.masked(decay_gradient(dc, db, met, call.T, call.order.runs))
    if start is not None:
        found["initial_state"] = db.final.view(call.B, call.H, call.P, call.N)
    dx = run(
        b,
        c,
        rows,
        call.order,
        H=call.H,
        reverse=True,
        raw=x,
        factor=call.factor,
        skip=call.skip,
        dots="all",
        most_tokens=most,
        initial=None if end is None else _turned(end),
    )
    assert dx.dots is not None
    found["x"] = dx.out
    found["a"] = (call.delta * log_decay).sum((0, 1))
    d_delta = log_decay * inputs["a"] + dx.dots.sum(0).transpose(1, 2)
    low, high = options.dt_limit
    d_raw = d_delta.masked_fill((call.free < low) | (call.free > high), 0)
    if options.dt_softplus:
        d_raw = d_raw * torch.sigmoid(call.raw)
    d_raw = call.masked(d_raw)
    found["dt"] = d_raw.to(inputs["dt"].dtype)
    if "dt_bias" in inputs:
        found["dt_bias"] = d_raw.sum((0, 1))
    return found


def _ungated(call: Call, dout: Tensor, found: dict[str, Tensor]) -> Tensor:
    """The gradient of C·h + D·x in x's dtype, 0 on padding; with those of z and D put into `found`."""
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
    if "d" in inputs:
        x = inputs["x"] if call.real is None else inputs["x"].masked_fill(~call.real[..., None, None], 0)
        if inputs["d"].dim() == 2:
            found["d"] = (dout.float() * x.float()).sum((0, 1))
        else:
            found["d"] = products(dout, x).sum((0, 2))
    return dout.to(call.x.dtype)


def _over_heads(call: Call, parts: Tensor) -> Tensor:
    """(B, T, parts, N) of all heads, summed to (B, T, G, N)."""
    if parts.shape[2] == call.G:
        return parts.to(call.b.dtype)
    return parts.unflatten(2, (call.G, -1)).sum(3).to(call.b.dtype)
