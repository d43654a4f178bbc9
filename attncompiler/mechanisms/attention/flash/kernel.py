"""Which programs run for a call."""

from __future__ import annotations

import math

import torch
import triton

from attncompiler.blocks.gpu import Device, device_of
from attncompiler.mechanisms.attention import residues, sinks
from attncompiler.mechanisms.attention.flash import hopper
from attncompiler.mechanisms.attention.flash.backward import delta_kernel, gather_kernel, spread_kernel
from attncompiler.mechanisms.attention.flash.forward import attend_kernel, merge_kernel
from attncompiler.mechanisms.attention.flash.launch import (
    CACHE,
    Blocks,
    blocks_for,
    gathering_blocks,
    padded,
    precision,
    scoring_of,
    sizes_of,
    strided,
    widths,
)
from attncompiler.mechanisms.attention.flash.sight import Sight
from attncompiler.mechanisms.attention.op import AttentionOptions
from attncompiler.mechanisms.attention.pattern import Strided
from attncompiler.runtime.implementation import Tensors

FEW_ROWS = 64
"""Rows of a token's heads and few tokens, as in decoding, that are packed into one tile."""
WAVES = 8
"""Programs for each multiprocessor that a decode's keys are split among at least, where there are keys enough."""


LONG_CLASS = 64
"""Tokens of a class of a strided pattern that fill a tile well enough for the class to be a sequence of its own."""


def forward(inputs: Tensors, options: AttentionOptions) -> dict[str, torch.Tensor]:
    """q (B, T, H, D), k (B, S, K, D), v (B, S, K, V) → out (B, T, H, V), lse (B, H, T)."""
    inputs = _side_by_side(inputs)
    if not _by_class(inputs, options):
        return _forward(inputs, options)
    keys = {name: tensor for name, tensor in inputs.items() if name != "sinks"}
    results = residues.forward(_forward, keys, options, widen=False)
    if "sinks" in inputs:
        results["out"], results["lse"] = sinks.join(results["out"], results["lse"], inputs["sinks"])
    return results


def _side_by_side(inputs: Tensors) -> Tensors:
    """The inputs, of which what has one number for each head is laid out so, as the kernels read it."""
    apart = [name for name in ("sinks", "alibi_slopes") if name in inputs and not inputs[name].is_contiguous()]
    return {**inputs, **{name: inputs[name].contiguous() for name in apart}} if apart else inputs


def _by_class(inputs: Tensors, options: AttentionOptions) -> bool:
    """Whether a strided pattern of single tokens has classes that are worth a sequence each: every tile of the whole
    sequence holds a token of every class, and would be met."""
    pattern, T = options.pattern, inputs["q"].shape[1]
    single = isinstance(pattern, Strided) and pattern.block_size == 1 and LONG_CLASS * pattern.stride <= T
    return single and residues.splits(inputs, options)


def _forward(inputs: Tensors, options: AttentionOptions) -> dict[str, torch.Tensor]:
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    sizes, device = sizes_of(inputs), device_of(q.device)
    if hopper.serves(device, inputs, options, FEW_ROWS):
        return hopper.forward(device, inputs, options)
    out = q.new_empty(sizes.B, sizes.T, sizes.H, v.shape[-1])
    lse = q.new_empty(sizes.B, sizes.H, sizes.T, dtype=torch.float32)
    sight, group = Sight.of(inputs, options), sizes.H // sizes.K
    V = v.shape[-1]
    wide, wide_v = padded(q.shape[-1], V)
    blocks = blocks_for(device, q.dtype, wide, wide + wide_v, wide_v)
    packed = triton.next_power_of_2(group)
    splits = 1
    if sizes.T * packed <= FEW_ROWS:
        blocks = Blocks(max(16, triton.next_power_of_2(sizes.T) * packed), blocks.met, 4, blocks.num_stages)
        splits = _splits(sizes.B * sizes.K, sizes.S, blocks, device)
    else:
        packed = 1
    heads = sizes.B * (sizes.H if packed == 1 else sizes.K)
    at_once = min(heads, max(1, CACHE // (sizes.S * (q.shape[-1] + V) * q.element_size())))
    into, into_lse = out, lse
    if splits > 1:
        into = q.new_empty(splits, *out.shape, dtype=torch.float32)
        into_lse = lse.new_empty(splits, *lse.shape)
    tokens = blocks.own // packed
    grid = (triton.cdiv(sizes.T, tokens) * heads, splits)
    attend_kernel[grid](
        strided(q),
        strided(k),
        strided(v),
        into,
        into_lse,
        inputs.get("sinks") if splits == 1 else None,
        sight.keys(tokens, blocks.met),
        sight.rows,
        sight.columns,
        sight.window,
        scoring_of(inputs, options),
        *sizes,
        at_once,
        CAUSAL=sight.causal,
        DRAWS=sight.draws,
        RAGGED=sight.listed and sizes.S % blocks.met != 0,
        SPLITS=splits,
        GROUP=group,
        PACKED=packed,
        BLOCK_M=blocks.own,
        BLOCK_N=blocks.met,
        PRECISION=precision(q.dtype),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        **widths(inputs),
    )
    if splits > 1:
        merge_kernel[(sizes.T, sizes.H, sizes.B)](
            into,
            into_lse,
            out,
            lse,
            inputs.get("sinks"),
            *sizes,
            SPLITS=splits,
            BLOCK_SPLITS=triton.next_power_of_2(splits),
            V=V,
            BLOCK_V=wide_v,
        )
    return {"out": out, "lse": lse}


def _splits(programs: int, keys: int, blocks: Blocks, device: Device) -> int:
    """Among how many programs the keys of one tile of queries are split: none of them has less than a few tiles."""
    wanted = math.ceil(WAVES * device.multiprocessors / programs)
    return max(1, min(wanted, keys // (4 * blocks.met), 64))


def backward(grads: Tensors, inputs: Tensors, outputs: Tensors, options: AttentionOptions) -> dict[str, torch.Tensor]:
    """The gradients of q, k, v and sinks, from the probabilities that the lse gives back."""
    inputs = _side_by_side(inputs)
    if not _by_class(inputs, options):
        return _backward(grads, inputs, outputs, options)
    keys = {name: tensor for name, tensor in inputs.items() if name != "sinks"}
    found = residues.backward(_backward, grads, keys, outputs, options, widen=False)
    if "sinks" in inputs:
        found["sinks"] = sinks.gradient(inputs["sinks"], outputs["out"], outputs["lse"], grads["out"])
    return found


def _backward(grads: Tensors, inputs: Tensors, outputs: Tensors, options: AttentionOptions) -> dict[str, torch.Tensor]:
    q, k, v, dout, lse = inputs["q"], inputs["k"], inputs["v"], grads["out"], outputs["lse"]
    sizes, device = sizes_of(inputs), device_of(q.device)
    if hopper.serves_backward(device, inputs, options):
        return hopper.backward(device, grads, inputs, outputs, options)
    sight, group = Sight.of(inputs, options), sizes.H // sizes.K
    V = v.shape[-1]
    wide, wide_v = padded(q.shape[-1], V)
    delta = torch.empty_like(lse)
    rows = 32
    delta_kernel[(sizes.B * sizes.H, triton.cdiv(sizes.T, rows))](  # the second axis has at most 65535 programs
        strided(dout), strided(outputs["out"]), delta, *sizes, V=V, BLOCK_M=rows, BLOCK_V=wide_v
    )
    found = {name: torch.empty_like(inputs[name], memory_format=torch.contiguous_format) for name in "qkv"}
    both = wide + wide_v
    gather = gathering_blocks(device, q.dtype, both)
    # in fp32 operands are in registers, too: the sums of dq alone leave room for others
    spread = blocks_for(device, q.dtype, both, both, wide if q.dtype == torch.float32 else both)
    tensors = (strided(q), strided(k), strided(v), strided(dout), lse, delta)
    rest = (sight.rows, sight.columns, sight.window, scoring_of(inputs, options), *sizes)
    shared = {
        "CAUSAL": sight.causal,
        "DRAWS": sight.draws,
        "GROUP": group,
        "PRECISION": precision(q.dtype),
        **widths(inputs),
    }
    gather_kernel[(triton.cdiv(sizes.S, gather.own) * sizes.B * sizes.K,)](
        *tensors,
        found["k"],
        found["v"],
        sight.queries(gather.own, gather.met),
        *rest,
        BLOCK_M=gather.met,
        BLOCK_N=gather.own,
        num_warps=gather.num_warps,
        num_stages=gather.num_stages,
        **shared,
    )
    spread_kernel[(triton.cdiv(sizes.T, spread.own) * sizes.B * sizes.H,)](
        *tensors,
        found["q"],
        sight.keys(spread.own, spread.met),
        *rest,
        RAGGED=sight.listed and sizes.S % spread.met != 0,
        BLOCK_M=spread.own,
        BLOCK_N=spread.met,
        num_warps=spread.num_warps,
        num_stages=spread.num_stages,
        **shared,
    )
    if "sinks" in inputs:
        found["sinks"] = sinks.gradient_of(inputs["sinks"], lse, delta)
    return found
