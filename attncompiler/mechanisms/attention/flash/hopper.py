"""Which calls run on the kernels for Hopper, and how they are given to them."""

from __future__ import annotations

import torch
from torch import Tensor

from attncompiler.blocks.gpu import Device
from attncompiler.mechanisms.attention import sinks
from attncompiler.mechanisms.attention.flash import hopper_backward, hopper_forward, hopper_tables
from attncompiler.mechanisms.attention.flash.hopper_tables import Visits
from attncompiler.mechanisms.attention.flash.launch import parts_of
from attncompiler.mechanisms.attention.op import AttentionOptions
from attncompiler.mechanisms.attention.pattern import Causal, Full, Pattern, Random, SlidingWindow
from attncompiler.runtime.implementation import Tensors

CAPABILITY = (9, 0)
WIDTHS = (64, 128)


def serves(device: Device, inputs: Tensors, options: AttentionOptions, few_rows: int) -> bool:
    """Whether a call is one that these kernels compute: 16-bit heads of one width, seen by a pattern alone, or by a
    simple one within packed segments.

    A few queries, as in decoding, would leave most of a tile empty.
    """
    if device.capability != CAPABILITY or inputs["q"].dtype not in (torch.bfloat16, torch.float16):
        return False
    if not inputs.keys() <= {"q", "k", "v", "sinks", "segment_ids"} or options.dropout:
        return False
    (T, H, D), (S, K, V) = inputs["q"].shape[1:], inputs["v"].shape[1:]
    if D != V or D not in WIDTHS or few_rows >= T * (H // K) or (options.scale is not None and options.scale <= 0):
        return False
    pattern = options.pattern
    if _simple(pattern) or ("segment_ids" in inputs and isinstance(pattern, SlidingWindow)):
        return True
    if "segment_ids" in inputs:
        return False
    if isinstance(pattern, Random):
        return hopper_tables.by_tiles(pattern, T, S)
    # a listed tile that is whole may not reach beyond the last key
    return S % hopper_tables.TILE == 0


def _simple(pattern: Pattern) -> bool:
    """Whether the kernels know a pattern by their indices."""
    return isinstance(pattern, (Full, Causal)) or (isinstance(pattern, SlidingWindow) and pattern.causal)


def _visits(inputs: Tensors, options: AttentionOptions, queries: int, transposed: bool) -> Visits | None:
    """The tables of a call whose indices do not say who sees whom, with tiles of that many queries."""
    if "segment_ids" in inputs:
        return hopper_tables.of_segments(inputs["segment_ids"], options.pattern, queries, transposed)
    if _simple(options.pattern):
        return None
    q, k = inputs["q"], inputs["k"]
    place = (options.pattern, options.layer, q.shape[1], k.shape[1], q.device)
    return hopper_tables.of_pattern(*place, queries, transposed)


def forward(device: Device, inputs: Tensors, options: AttentionOptions) -> dict[str, Tensor]:
    """As the operator's forward, for a call that `serves` accepts."""
    pattern, window, global_tokens = options.pattern, None, 0
    if isinstance(pattern, SlidingWindow):
        window, global_tokens = min(pattern.window, 2**30), min(pattern.global_tokens, 2**30)
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
        visits=_visits(inputs, options, hopper_tables.TILE, transposed=False),
        multiprocessors=device.multiprocessors,
    )
    return {"out": out, "lse": lse}


def serves_backward(device: Device, inputs: Tensors, options: AttentionOptions) -> bool:
    """Whether the backward of a call is one that these kernels compute; they keep an order of sums by indices alone."""
    known = _simple(options.pattern) and "segment_ids" not in inputs
    return (known or not options.deterministic) and serves(device, inputs, options, 0)


def backward(
    device: Device, grads: Tensors, inputs: Tensors, outputs: Tensors, options: AttentionOptions
) -> dict[str, Tensor]:
    """As the operator's backward, for a call that `serves_backward` accepts."""
    pattern, window, global_tokens = options.pattern, None, 0
    if isinstance(pattern, SlidingWindow):
        window, global_tokens = min(pattern.window, 2**30), min(pattern.global_tokens, 2**30)
    B, S, K, D = inputs["k"].shape
    visits, parts = _visits(inputs, options, hopper_backward.queries_of(D), transposed=True), 1
    if options.deterministic or (visits is None and not global_tokens):
        # keys that far more queries see than others would keep each part waiting: 24% at 131072 tokens, 64 of them
        # global. What is deterministic is computed so all the same, for its memory.
        parts = parts_of(-(-S // hopper_backward.KEYS) * B * K, K, device)
    dq, dk, dv, sums = hopper_backward.backward(
        grads["out"],
        inputs["q"],
        inputs["k"],
        inputs["v"],
        outputs["out"],
        outputs["lse"],
        causal=pattern.causal,
        window=window,
        global_tokens=global_tokens,
        scale=options.softmax_scale(D),
        softcap=options.softcap,
        deterministic=options.deterministic,
        visits=visits,
        parts=parts,
    )
    found = {"q": dq, "k": dk, "v": dv}
    if "sinks" in inputs:
        delta = sums.flatten(2)[:, :, : inputs["q"].shape[1]]
        found["sinks"] = sinks.gradient_of(inputs["sinks"], outputs["lse"], delta)
    return found
