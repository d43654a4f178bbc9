"""Forward and backward as passes of the recurrence."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attncompiler.blocks.recurrence.decays import decay_gradient
from attncompiler.blocks.recurrence.launch import Found, Map, Order, Side, divided, features, run
from attncompiler.blocks.recurrence.passes import Added
from attncompiler.blocks.segments import run_numbers
from attncompiler.mechanisms.linear_attention.op import LinearAttentionOptions
from attncompiler.mechanisms.linear_attention.recurrence.favor import Projection, Tops, tops_of
from attncompiler.mechanisms.linear_attention.recurrence.step import step
from attncompiler.runtime.implementation import Tensors

MAPS: dict[str, Map] = {"elu": "elu", "relu": "relu", "identity": "none", "favor": "exp"}


class Call:
    """A call's tensors: φ(q), φ(k) and v, and how tokens count for one another.

    Of favor's, φ are multiples of a token's largest, and sums multiples of exp(M): `projection` and `tops` are its own.
    """

    def __init__(self, inputs: Tensors, options: LinearAttentionOptions):
        self.inputs, self.options = inputs, options
        self.map: Map = MAPS[options.feature_map]
        self.v, self.real = inputs["v"], inputs.get("attention_mask")
        runs, decay = run_numbers(inputs.get("segment_ids"), self.real), inputs.get("log_decay")
        self.decayed = decay is not None
        self.projection: Projection | None = None
        self.tops: Tops | None = None
        if self.map == "exp":
            self.projection = Projection.of(inputs["projection"], self.v.dtype)
            (self.q, m_q), (self.k, m_k) = (self.projection.features(inputs[name]) for name in "qk")
            self.tops = tops_of(m_q, m_k, decay, runs, self.real, inputs.get("initial_m"), options.causal)
            decay = self.tops.decay
        else:
            self.q, self.k = features(inputs["q"], inputs["k"], self.map)
        self.B, self.T, self.H, self.R = self.q.shape
        self.V = self.v.shape[-1]
        self.order = Order(decay, runs, self.real)
        if self.tops is not None:
            self.order = replace(self.order, marks=self.tops.marks, first=self.tops.first)
        self.others = Order(None, runs, self.real, strict=True)
        """of the sums over what comes later, where those count too: a token is in the first sums already"""
        self.wide: dict[str, Any] = {"dtype": torch.float32, "device": self.q.device}

    @property
    def levels(self) -> Tensor | None:
        """(B, H, T): the logarithms of what a token's sums are multiples of; None where they are what they are."""
        return None if self.tops is None else self.tops.levels

    @property
    def columns(self) -> Tensor | None:
        """(B, H, T): what keys are multiplied by; None where that is 1, or marks say it."""
        return None if self.tops is None else self.tops.columns

    def grown(self) -> Tensor:
        """(B, H): what the state before the first token is multiplied by as the passes have it."""
        m = self.inputs["initial_m"]
        if self.tops is None:
            return m.exp()
        if self.options.causal:  # the first token's decay leads from this m to its own
            return (m != -math.inf).to(m.dtype)
        return (m - self.tops.m[..., 0].clamp(min=torch.finfo(m.dtype).min)).exp()

    def initial(self) -> tuple[Tensor, Tensor] | None:
        """S and z before the first token, or None where there was nothing."""
        if "initial_s" not in self.inputs:
            return None
        grown = self.grown()
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
    if inputs["q"].shape[1] == 1 and options.feature_map != "favor":  # whose features are found apart
        return step(inputs, options, MAPS[options.feature_map])
    call = Call(inputs, options)
    initial = call.initial()
    before = None if initial is None else _flat(*initial)
    found = _sums(call, before)
    if options.causal:
        out, total = found.out, found.total
        assert total is not None
    else:
        out, total = _joined(call, found, _sums(call, None, later=True))
    if not options.normalize:
        total = torch.ones_like(total) if call.tops is None else torch.zeros_like(total)
    assert found.final is not None
    split = call.R * call.V
    return {
        "out": out,
        "normalizer": total,
        "final_s": _apart(found.final[..., :split].unflatten(-1, (call.R, call.V))),
        "final_z": _apart(found.final[..., split:]),
        "final_m": torch.zeros(call.B, call.H, **call.wide) if call.tops is None else _apart(call.tops.m[..., -1]),
    }


def _sums(call: Call, initial: Tensor | None, *, later: bool = False) -> Found:
    """out, the normaliser, and the state behind; or where those sums are not the whole, the numerator and φ(q)·z."""
    options = call.options
    whole = options.causal
    levels = call.levels if whole else None
    return run(
        Side(call.q),
        Side(call.k),
        Side(call.v),
        call.others if later else call.order,
        H=call.H,
        reverse=later,
        extra="total",
        scales=call.columns,
        levels=levels,
        normalize=whole and options.normalize,
        eps=options.eps if levels is None else math.log(options.eps),
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
    if call.levels is not None:
        return _of_multiples(call, call.levels.transpose(1, 2), numerator, total)
    total = total + options.eps if options.normalize else torch.ones_like(total)
    if call.real is not None:
        total = total.masked_fill(~call.real[..., None], 1)
    return (options.scale * numerator / total[..., None]).to(call.v.dtype), total


def _of_multiples(call: Call, levels: Tensor, numerator: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """out and the normaliser's logarithm, of sums that are multiples of exp(levels): levels and total (B, T, H)."""
    options = call.options
    if options.normalize:
        above = levels - math.log(options.eps)
        larger, shrink = above.clamp(min=0), above.clamp(max=0).exp()
        divisor = (total * shrink + (-larger).exp()).clamp(min=torch.finfo(total.dtype).tiny)
        out, total = numerator * (shrink / divisor)[..., None], divisor.log() + larger + math.log(options.eps)
    else:
        half = (levels / 2).exp()[..., None]
        out = numerator * half * half
    if call.real is not None:
        total = total.masked_fill(~call.real[..., None], 0)
    return (options.scale * out).to(call.v.dtype), total


# --- backward -----------------------------------------------------------------------------------------------------


def backward(grads: Tensors, inputs: Tensors, outputs: Tensors, options: LinearAttentionOptions) -> dict[str, Tensor]:
    """The gradients of q, k, v, decays and the initial state, by one pass each; of m, which does not move, none."""
    call = Call(inputs, options)
    dout = grads.get("out")
    if dout is None:
        dout = torch.zeros_like(outputs["out"])
    if options.normalize or call.levels is not None:
        numerator, dz = divided(dout, outputs["out"], outputs["normalizer"], options.scale, call.real, call.levels)
    else:
        numerator = dout if options.scale == 1 else options.scale * dout
    if not options.normalize:
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
    if call.projection is not None:
        for name in "qk":
            found[name] = call.projection.gradient(found[name], inputs[name])
    if "initial_s" in inputs:
        grown = call.grown()
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
    start, end = (None if each is None else _flat(each[0].mT, each[1]) for each in (initial, final))

    def turned(x: Side, y: Side, u: Side, raw: Side, added: Added, state: Tensor | None, *, keys: bool) -> Found:
        return run(
            x,
            y,
            u,
            order,
            H=call.H,
            reverse=later ^ keys,
            extra="added",
            added=added,
            scales=None if keys else call.columns,
            factor=call.columns if keys else None,
            slope=call.map,
            raw=raw,
            dots=call.decayed,
            initial=state,
            final=True,
            dtype=call.v.dtype,
            out_dtype=None if call.projection is None else call.q.dtype,
        )

    dq = turned(rows, v, k, q, Added(dz, None), start, keys=False)
    dk = turned(v, rows, q, k, Added(None, dz), end, keys=True)
    behind = None if final is None else final[0].flatten(2).contiguous()
    dv = run(k, q, rows, order, H=call.H, reverse=not later, factor=call.columns, initial=behind, dtype=call.v.dtype)
    if call.columns is not None and dk.dots is not None:
        dk = replace(dk, dots=dk.dots * call.columns)
    assert dk.final is not None
    split = call.R * call.V
    found = {
        "q": dq.out,
        "k": dk.out,
        "v": dv.out,
        "initial_s": _apart(dk.final[..., :split].unflatten(-1, (call.V, call.R)).mT),
        "initial_z": _apart(dk.final[..., split:]),
    }
    if call.decayed:
        met = None if start is None else (start * dk.final).sum(-1)
        found["log_decay"] = decay_gradient(dq, dk, met, order)
    return found
