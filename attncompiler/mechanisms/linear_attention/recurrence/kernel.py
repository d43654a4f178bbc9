"""Forward and backward as passes of the recurrence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attncompiler.blocks.recurrence.decays import decay_gradient
from attncompiler.blocks.recurrence.launch import (
    Found,
    Map,
    Order,
    Side,
    products,
    run,
)
from attncompiler.blocks.recurrence.passes import Added
from attncompiler.blocks.segments import run_numbers
from attncompiler.mechanisms.linear_attention.op import LinearAttentionOptions
from attncompiler.runtime.implementation import Tensors

MAPS: dict[str, Map] = {"elu": "elu", "relu": "relu", "identity": "none"}


class Call:
    """A call's tensors and how they are cut."""

    def __init__(self, inputs: Tensors, options: LinearAttentionOptions, order: Order | None = None):
        self.inputs, self.options = inputs, options
        self.q, self.k, self.v = inputs["q"], inputs["k"], inputs["v"]
        self.B, self.T, self.H, self.R = self.q.shape
        self.V = self.v.shape[-1]
        self.map: Map = MAPS[options.feature_map]
        real = inputs.get("attention_mask")
        self.order = order or Order(inputs.get("log_decay"), run_numbers(inputs.get("segment_ids"), real), real)
        self.wide: dict[str, Any] = {"dtype": torch.float32, "device": self.q.device}

    def reversed(self) -> Call:
        """The tokens from last to first, none of which sees itself, after no state."""
        names = ("q", "k", "v", "segment_ids", "attention_mask")
        inputs = {name: self.inputs[name].flip(1) for name in names if name in self.inputs}
        real = inputs.get("attention_mask")
        runs = None if self.order.runs is None else _renumbered(self.order.runs)
        return Call(inputs, self.options, Order(None, runs, real, strict=True))

    def initial(self) -> tuple[Tensor, Tensor] | None:
        """S and z before the first token, or None where there was nothing."""
        if "initial_s" not in self.inputs:
            return None
        grown = self.inputs["initial_m"].exp()
        return self.inputs["initial_s"] * grown[..., None, None], self.inputs["initial_z"] * grown[..., None]


def _renumbered(runs: Tensor) -> Tensor:
    """The runs of tokens from last to first, counted from 0 there."""
    return (runs[:, -1:] - runs).flip(1)


def _flat(s: Tensor, z: Tensor) -> Tensor:
    """A state (B, H, K, W) and its sums of one width more as the pass takes them."""
    return torch.cat([s.flatten(2), z], -1)


def _apart(part: Tensor) -> Tensor:
    """In memory of its own."""
    return part.clone(memory_format=torch.contiguous_format)


# --- forward ------------------------------------------------------------------------------------------------------


def forward(inputs: Tensors, options: LinearAttentionOptions) -> dict[str, Tensor]:
    call = Call(inputs, options)
    initial = call.initial()
    before = None if initial is None else _flat(*initial)
    if options.causal:
        out, total, final = _sums(call, before, whole=True)
    else:
        upto, total, final = _sums(call, before, whole=False)
        behind, more, _ = _sums(call.reversed(), None, whole=False)
        out, total = _joined(call, upto + behind.flip(1), total + more.flip(1))
    assert final is not None
    split = call.R * call.V
    return {
        "out": out,
        "normalizer": total,
        "final_s": _apart(final[..., :split].unflatten(-1, (call.R, call.V))),
        "final_z": _apart(final[..., split:]),
        "final_m": torch.zeros(call.B, call.H, **call.wide),
    }


def _sums(call: Call, initial: Tensor | None, *, whole: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """out and the normaliser, or, where those sums are not the whole, the numerator and φ(q)·z in fp32; and the state
    behind."""
    options = call.options
    found = run(
        Side(call.q, call.map),
        Side(call.k, call.map),
        Side(call.v),
        call.order,
        H=call.H,
        extra="total",
        normalize=whole and options.normalize,
        eps=options.eps,
        scale=options.scale if whole else 1.0,
        initial=initial,
        final=True,
        out_dtype=None if whole else torch.float32,
    )
    assert found.total is not None
    total = found.total if options.normalize or not whole else torch.ones_like(found.total)
    return found.out, total, found.final


def _joined(call: Call, numerator: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """out and the normaliser of sums over all tokens."""
    options, real = call.options, call.order.real
    total = total + options.eps if options.normalize else torch.ones_like(total)
    if real is not None:
        total = total.masked_fill(~real[..., None], 1)
    return (options.scale * numerator / total[..., None]).to(call.q.dtype), total


# --- backward -----------------------------------------------------------------------------------------------------


def backward(grads: Tensors, inputs: Tensors, outputs: Tensors, options: LinearAttentionOptions) -> dict[str, Tensor]:
    call = Call(inputs, options)
    dout = grads.get("out")
    if dout is None:
        dout = torch.zeros_like(outputs["out"])
    normalizer = outputs["normalizer"].contiguous()
    share = options.scale / normalizer
    if options.normalize:
        dz = products(dout, outputs["out"], -1 / normalizer)
    else:
        dz = torch.zeros_like(share)
    real = call.order.real
    if real is not None:
        share, dz = share.masked_fill(~real[..., None], 0), dz.masked_fill(~real[..., None], 0)
    final = None
    if "final_s" in grads or "final_z" in grads:
        nothing = torch.zeros(call.B, call.H, call.R, call.V, **call.wide)
        final = grads.get("final_s", nothing), grads.get("final_z", nothing[..., 0])
    found = _gradients(call, dout, share, dz, call.initial(), final)
    if not options.causal:
        more = _gradients(call.reversed(), dout.flip(1), share.flip(1), dz.flip(1), None, None)
        for name in "qkv":
            found[name] += more[name].flip(1)
    if "initial_s" in inputs:
        grown = inputs["initial_m"].exp()
        found["initial_s"] = found["initial_s"] * grown[..., None, None]
        found["initial_z"] = found["initial_z"] * grown[..., None]
    return {name: found[name] for name in found if name in inputs}


def _gradients(
    call: Call,
    dout: Tensor,
    share: Tensor,
    dz: Tensor,
    initial: tuple[Tensor, Tensor] | None,
    final: tuple[Tensor, Tensor] | None,
) -> dict[str, Tensor]:
    """The gradients of one direction, by those of the numerator, share · dout, and of φ(q)·z."""
    q, k = Side(call.q, call.map), Side(call.k, call.map)
    v, numerator = Side(call.v), Side(dout, factor=share)
    decayed = call.order.decay is not None
    start, end = (None if each is None else _flat(each[0].mT, each[1]) for each in (initial, final))

    def turned(x: Side, y: Side, u: Side, raw: Tensor, added: Added, state: Tensor | None, *, reverse: bool) -> Found:
        return run(
            x,
            y,
            u,
            call.order,
            H=call.H,
            reverse=reverse,
            extra="added",
            added=added,
            slope=call.map,
            raw=Side(raw),
            dots="passing" if decayed else "none",
            initial=state,
            final=True,
        )

    dq = turned(numerator, v, k, call.q, Added(dz, None), start, reverse=False)
    dk = turned(v, numerator, q, call.k, Added(None, dz), end, reverse=True)
    behind = None if final is None else final[0].flatten(2).contiguous()
    dv = run(k, q, numerator, call.order, H=call.H, reverse=True, initial=behind)
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
        log_decay = decay_gradient(dq, dk, met, call.T, call.order.runs)
        real = call.order.real
        found["log_decay"] = log_decay if real is None else log_decay.masked_fill(~real[..., None], 0)
    return found
