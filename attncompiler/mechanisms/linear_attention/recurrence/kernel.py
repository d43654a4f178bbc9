"""Forward and backward as passes of the recurrence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attncompiler.blocks.recurrence.decays import decay_gradient
from attncompiler.blocks.recurrence.launch import Found, Map, Order, Side, divided, features, run
from attncompiler.blocks.recurrence.passes import Added
from attncompiler.blocks.segments import run_numbers
from attncompiler.mechanisms.linear_attention.op import LinearAttentionOptions
from attncompiler.runtime.implementation import Tensors

MAPS: dict[str, Map] = {"elu": "elu", "relu": "relu", "identity": "none"}


class Call:
    """A call's tensors: φ(q), φ(k) and v, and how tokens count for one another."""

    def __init__(self, inputs: Tensors, options: LinearAttentionOptions):
        self.inputs, self.options = inputs, options
        self.map: Map = MAPS[options.feature_map]
        self.q, self.k = features(inputs["q"], inputs["k"], self.map)
        self.v = inputs["v"]
        self.B, self.T, self.H, self.R = self.q.shape
        self.V = self.v.shape[-1]
        self.real = inputs.get("attention_mask")
        runs = run_numbers(inputs.get("segment_ids"), self.real)
        self.order = Order(inputs.get("log_decay"), runs, self.real)
        self.others = Order(None, runs, self.real, strict=True)
        """of the sums over what comes later, where those count too: a token is in the first sums already"""
        self.wide: dict[str, Any] = {"dtype": torch.float32, "device": self.q.device}

    def initial(self) -> tuple[Tensor, Tensor] | None:
        """S and z before the first token, or None where there was nothing."""
        if "initial_s" not in self.inputs:
            return None
        grown = self.inputs["initial_m"].exp()
        return self.inputs["initial_s"] * grown[..., None, None], self.inputs["initial_z"] * grown[..., None]


def _flat(s: Tensor, z: Tensor) -> Tensor:
    """A state (B, H, K, W) and its sums of one width more as the pass takes them."""
    return torch.cat([s.flatten(2), z], -1)


def _apart(part: Tensor) -> Tensor:
    """In memory of its own."""
    return part.clone(memory_format=torch.contiguous_format)


# --- forward ------------------------------------------------------------------------------------------------------


def forward(inputs: Tensors, options: LinearAttentionOptions) -> dict[str, Tensor]:
    """out (B, T, H, V) in v's dtype; in fp32 the normaliser (B, T, H), and S (B, H, R, V), z (B, H, R) and m (B, H)."""
    call = Call(inputs, options)
    initial = call.initial()
    before = None if initial is None else _flat(*initial)
    if options.causal:
        found = _sums(call, before)
        out, total = found.out, found.total
        assert total is not None
        if not options.normalize:
            total = torch.ones_like(total)
    else:
        found = _sums(call, before)
        out, total = _joined(call, found, _sums(call, None, later=True))
    assert found.final is not None
    split = call.R * call.V
    return {
        "out": out,
        "normalizer": total,
        "final_s": _apart(found.final[..., :split].unflatten(-1, (call.R, call.V))),
        "final_z": _apart(found.final[..., split:]),
        "final_m": torch.zeros(call.B, call.H, **call.wide),
    }


def _sums(call: Call, initial: Tensor | None, *, later: bool = False) -> Found:
    """out, the normaliser, and the state behind; or where those sums are not the whole, the numerator and φ(q)·z."""
    options = call.options
    whole = options.causal
    return run(
        Side(call.q),
        Side(call.k),
        Side(call.v),
        call.others if later else call.order,
        H=call.H,
        reverse=later,
        extra="total",
        normalize=whole and options.normalize,
        eps=options.eps,
        scale=options.scale if whole else 1.0,
        initial=initial,
        final=not later,
        out_dtype=None if whole else torch.float32,
    )


def _joined(call: Call, upto: Found, later: Found) -> tuple[Tensor, Tensor]:
    """out and the normaliser of sums over all tokens."""
    assert upto.total is not None
    assert later.total is not None
    options, numerator, total = call.options, upto.out + later.out, upto.total + later.total
    total = total + options.eps if options.normalize else torch.ones_like(total)
    if call.real is not None:
        total = total.masked_fill(~call.real[..., None], 1)
    return (options.scale * numerator / total[..., None]).to(call.v.dtype), total


# --- backward -----------------------------------------------------------------------------------------------------


def backward(grads: Tensors, inputs: Tensors, outputs: Tensors, options: LinearAttentionOptions) -> dict[str, Tensor]:
    """The gradients of q, k, v, decays and the initial state, by one pass each; of m, which does not move, none."""
    call = Call(inputs, options)
    dout = grads.get("out")
    if dout is None:
        dout = torch.zeros_like(outputs["out"])
    if options.normalize:
        numerator, dz = divided(dout, outputs["out"], outputs["normalizer"], options.scale, call.real)
    else:
        numerator = dout if options.scale == 1 else options.scale * dout
        dz = torch.zeros(call.B, call.H, call.T, **call.wide)
    final = None
    if "final_s" in grads or "final_z" in grads:
        nothing = torch.zeros(call.B, call.H, call.R, call.V, **call.wide)
        final = grads.get("final_s", nothing), grads.get("final_z", nothing[..., 0])
    found = _gradients(call, numerator, dz, call.initial(), final)
    if not options.causal:
        more = _gradients(call, numerator, dz, None, None, later=True)
        for name in "qkv":
            found[name] += more[name]
    if "initial_s" in inputs:
        grown = inputs["initial_m"].exp()
        found["initial_s"] = found["initial_s"] * grown[..., None, None]
        found["initial_z"] = found["initial_z"] * grown[..., None]
    return {name: found[name] for name in found if name in inputs}


def _gradients(
    call: Call,
    numerator: Tensor,
    dz: Tensor,
    initial: tuple[Tensor, Tensor] | None,
    final: tuple[Tensor, Tensor] | None,
    *,
    later: bool = False,
) -> dict[str, Tensor]:
    """The gradients of one direction's sums, by those of the numerator and of φ(q)·z."""
    q, k, v, rows = Side(call.q), Side(call.k), Side(call.v), Side(numerator)
    order = call.others if later else call.order
    decayed = order.decay is not None
    start, end = (None if each is None else _flat(each[0].mT, each[1]) for each in (initial, final))

    def turned(x: Side, y: Side, u: Side, raw: Side, added: Added, state: Tensor | None, *, reverse: bool) -> Found:
        return run(
            x,
            y,
            u,
            order,
            H=call.H,
            reverse=reverse,
            extra="added",
            added=added,
            slope=call.map,
            raw=raw,
            dots="passing" if decayed else "none",
            initial=state,
            final=True,
            dtype=call.v.dtype,
        )

    dq = turned(rows, v, k, q, Added(dz, None), start, reverse=later)
    dk = turned(v, rows, q, k, Added(None, dz), end, reverse=not later)
    behind = None if final is None else final[0].flatten(2).contiguous()
    dv = run(k, q, rows, order, H=call.H, reverse=not later, initial=behind, dtype=call.v.dtype)
    assert dk.final is not None
    split = call.R * call.V
    found = {
        "q": dq.out,
        "k": dk.out,
        "v": dv.out,
        "initial_s": _apart(dk.final[..., :split].unflatten(-1, (call.V, call.R)).mT),
        "initial_z": _apart(dk.final[..., split:]),
    }
    if decayed:
        met = None if start is None else (start * dk.final).sum(-1)
        log_decay = decay_gradient(dq, dk, met, call.T, order.runs)
        found["log_decay"] = log_decay if call.real is None else log_decay.masked_fill(~call.real[..., None], 0)
    return found
