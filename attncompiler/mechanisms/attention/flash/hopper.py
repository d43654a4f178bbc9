"""Which calls run on the kernels for Hopper, and how they are given to them."""

from __future__ import annotations

import torch
from torch import Tensor

from attncompiler.mechanisms.attention import sinks
from attncompiler.mechanisms.attention.flash import hopper_backward, hopper_forward
from attncompiler.mechanisms.attention.flash.launch import Device
from attncompiler.mechanisms.attention.flash.sight import Sight
from attncompiler.mechanisms.attention.op import AttentionOptions
from attncompiler.mechanisms.attention.pattern import Causal, Full, Random, SlidingWindow
from attncompiler.runtime.implementation import Tensors

CAPABILITY = (9, 0)
WIDTHS = (64, 128)
TILE = 128
"""Queries and keys of a listed tile."""


def serves(device: Device, inputs: Tensors, options: AttentionOptions, few_rows: int) -> bool:
    """Whether a call is one that these kernels compute: 16-bit heads of one width, seen by a pattern alone.

    A few queries, as in decoding, would leave most of a tile empty.
    """
    if device.capability != CAPABILITY or inputs["q"].dtype not in (torch.bfloat16, torch.float16):
        return False
    if not inputs.keys() <= {"q", "k", "v", "sinks"} or options.dropout:
        return False
    (T, H, D), (S, K, V) = inputs["q"].shape[1:], inputs["v"].shape[1:]
    if D != V or D not in WIDTHS or few_rows >= T * (H // K) or (options.scale is not None and options.scale <= 0):
        return False
    match options.pattern:
        case Full() | Causal() | SlidingWindow(causal=True):
            return True
        case Random():
            return False
    # a listed tile that is whole may not reach beyond the last key
    return S % TILE == 0


def forward(device: Device, inputs: Tensors, options: AttentionOptions) -> dict[str, Tensor]:
    """As the operator's forward, for a call that `serves` accepts."""
    pattern, lists, window, global_tokens = options.pattern, None, None, 0
    if isinstance(pattern, SlidingWindow) and pattern.causal:
        window, global_tokens = min(pattern.window, 2**30), min(pattern.global_tokens, 2**30)
    elif not isinstance(pattern, (Full, Causal)):
        lists = _listed(inputs, options)
    out, lse = hopper_forward.forward(
        inputs["q"],
        inputs["k"],
        inputs["v"],
        causal=pattern.causal,
        window=window,
        global_tokens=global_tokens,
        scale=options.softmax_scale(inputs["q"].shape[-1]),
        softcap=options.softcap,
        sinks=inputs.get("sinks"),
        lists=lists,
        multiprocessors=device.multiprocessors,
    )
    return {"out": out, "lse": lse}


def serves_backward(device: Device, inputs: Tensors, options: AttentionOptions) -> bool:
    """Whether the backward of a call is one that these kernels compute: of a pattern that needs no lists."""
    known = isinstance(options.pattern, (Full, Causal)) or (
        isinstance(options.pattern, SlidingWindow) and options.pattern.causal
    )
    return known and serves(device, inputs, options, 0)


def backward(grads: Tensors, inputs: Tensors, outputs: Tensors, options: AttentionOptions) -> dict[str, Tensor]:
    """As the operator's backward, for a call that `serves_backward` accepts."""
    pattern, window, global_tokens = options.pattern, None, 0
    if isinstance(pattern, SlidingWindow):
        window, global_tokens = min(pattern.window, 2**30), min(pattern.global_tokens, 2**30)
    dq, dk, dv, delta = hopper_backward.backward(
        grads["out"],
        inputs["q"],
        inputs["k"],
        inputs["v"],
        outputs["out"],
        outputs["lse"],
        causal=pattern.causal,
        window=window,
        global_tokens=global_tokens,
        scale=options.softmax_scale(inputs["q"].shape[-1]),
        softcap=options.softcap,
        deterministic=options.deterministic,
    )
    found = {"q": dq, "k": dk, "v": dv}
    if "sinks" in inputs:
        found["sinks"] = sinks.gradient_of(inputs["sinks"], outputs["lse"], delta)
    return found


def _listed(inputs: Tensors, options: AttentionOptions) -> hopper_forward.TileLists:
    """The lists of a pattern's tiles, and what its rows see of those that are not whole."""
    sight = Sight.of(inputs, options)
    tiles = sight.keys(TILE, TILE).lists
    assert tiles is not None
    assert sight.rows.table is not None
    begin, stop, low, high, global_end, _ = sight.rows.table.ptr[0]
    classes = (sight.rows.classes, sight.columns.classes)
    return hopper_forward.TileLists(
        *tiles, low, high, global_end, begin, stop, *(None if each is None else each.ptr[0] for each in classes)
    )
