"""torch's two fused attention kernels for NVIDIA GPUs, below F.scaled_dot_product_attention, which hides the lse.

FlashAttention-2 serves half precision where a band of keys says what is visible: full, causal, windows without globals.
Its causal flag and its window are aligned to the bottom right, as ours are, and it serves grouped heads without
repetition (`flash_attn/flash_api.cpp` in torch).

The memory-efficient kernel serves the rest: fp32, in which each product is three of tf32, as exact as fp32 whatever
`allow_tf32` says (`mem_eff_attention/` in torch: OpMultiplyAddFastF32); masks, which are added to the scores; and calls
that must be repeatable, for FlashAttention's backward adds up in any order.

Both take heads whose width is a multiple of 16 bytes: others are widened by zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attncompiler.mechanisms.attention.op import AttentionOptions
from attncompiler.mechanisms.attention.pattern import Causal, Full, SlidingWindow, is_band
from attncompiler.mechanisms.attention.visibility import visible
from attncompiler.mechanisms.attention.widths import rounded, widened
from attncompiler.runtime.implementation import Tensors

MASK_ROWS = 2**22
"""Elements of the mask that are made at once, so that making it needs little more memory than it has itself."""
LSE_ROWS = 32
"""The memory-efficient backward reads the lse in blocks of so many rows."""
NO_MASK, CAUSAL_FROM_BOTTOM_RIGHT = 0, 2
"""The memory-efficient kernel's names of them."""


def forward(inputs: Tensors, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """q (B, T, H, D), k (B, S, K, D), v (B, S, K, V) → out (B, T, H, V), lse (B, H, T), both without sinks."""
    return (_flash if flash_serves(inputs, options) else _efficient)(inputs, options)


def backward(dout: Tensor, inputs: Tensors, outputs: Tensors, options: AttentionOptions) -> tuple[Tensor, ...]:
    """The gradients of q, k and v, from the probabilities that the lse gives back."""
    run = _flash_backward if flash_serves(inputs, options) else _efficient_backward
    found = run(dout, inputs, outputs, options)
    return tuple(grad[..., : inputs[name].shape[-1]].contiguous() for name, grad in zip("qkv", found, strict=True))


def _masked(inputs: Tensors) -> bool:
    return bool(inputs.keys() & {"segment_ids", "attention_mask", "q_positions"})


# --- FlashAttention-2 -----------------------------------------------------------------------------------------------


def flash_serves(inputs: Tensors, options: AttentionOptions) -> bool:
    """Whether FlashAttention-2 computes this call, forward and backward."""
    q, pattern = inputs["q"], options.pattern
    if q.dtype == torch.float32 or options.deterministic or _masked(inputs):
        return False
    # with more queries than keys its window loses keys (seen with torch 2.11: rows with an lse of ∞ that see some)
    window = isinstance(pattern, SlidingWindow) and not pattern.global_tokens and q.shape[1] <= inputs["k"].shape[1]
    if not (window or isinstance(pattern, (Full, Causal))):
        return False
    capability = torch.cuda.get_device_capability(q.device)
    # the backward of wider heads needs the shared memory of the large chips (`sdp_utils.cpp` in torch)
    widest = 256 if capability == (8, 0) or capability[0] in (9, 10) else 192
    return capability >= (8, 0) and _flash_width(inputs) <= widest


def _flash_width(inputs: Tensors) -> int:
    return rounded(max(inputs["q"].shape[-1], inputs["v"].shape[-1]))


@dataclass(frozen=True)
class _Band:
    """How FlashAttention-2 is told what is visible: how far left and right of its own key a query sees, None: all."""

    causal: bool
    left: int | None
    right: int | None

    @staticmethod
    def of(inputs: Tensors, options: AttentionOptions) -> _Band:
        pattern = options.pattern
        if not isinstance(pattern, SlidingWindow):
            return _Band(pattern.causal, None, None)
        reach = min(pattern.window - 1, inputs["q"].shape[1] + inputs["k"].shape[1])  # it counts in 32 bits
        return _Band(False, reach, 0 if pattern.causal else reach)


def _flash(inputs: Tensors, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    width, band = _flash_width(inputs), _Band.of(inputs, options)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *(widened(tensor, width) for tensor in (q, k, v)),
        None,
        None,
        q.shape[1],
        k.shape[1],
        0.0,
        band.causal,
        False,
        scale=options.softmax_scale(q.shape[-1]),
        window_size_left=band.left,
        window_size_right=band.right,
    )
    if q.shape[1] > k.shape[1]:
        lse = lse.masked_fill(lse == torch.inf, -torch.inf)  # its word for a row that sees nothing
    return out[..., : v.shape[-1]].contiguous(), lse.contiguous()


def _flash_backward(dout: Tensor, inputs: Tensors, outputs: Tensors, options: AttentionOptions) -> tuple[Tensor, ...]:
    q, k, lse = inputs["q"], inputs["k"], outputs["lse"]
    width, band = _flash_width(inputs), _Band.of(inputs, options)
    if q.shape[1] > k.shape[1]:
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    random = torch.zeros(2, dtype=torch.uint64, device=q.device)  # the state of a dropout that there is not
    found: tuple[Tensor, ...] = torch.ops.aten._flash_attention_backward(
        *(widened(tensor, width) for tensor in (dout, q, k, inputs["v"], outputs["out"])),
        lse,
        None,
        None,
        q.shape[1],
        k.shape[1],
        0.0,
        band.causal,
        random,
        random[:0],
        scale=options.softmax_scale(q.shape[-1]),
        window_size_left=band.left,
        window_size_right=band.right,
    )
    return found


# --- the memory-efficient kernel ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """A call as the memory-efficient kernel takes it: as many heads of keys as of queries.

    Where heads are grouped, each key head and its queries stand for one sequence of the batch: keys are moved, and each
    group reads the same ones.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    empty: Tensor | None
    """(B or 1, T), where the bias knows of rows that see nothing"""
    mask: int
    window: int | None

    @staticmethod
    def of(inputs: Tensors, options: AttentionOptions) -> _Call:
        q, k, v = (_aligned(inputs[name]) for name in "qkv")
        T, H, S, K = *q.shape[1:3], *k.shape[1:3]
        bias = empty = window = None
        mask = NO_MASK
        # with fewer queries than keys the gradients of its window are wrong (seen with torch 2.11)
        band = T == S if isinstance(options.pattern, SlidingWindow) else T <= S
        if not _masked(inputs) and is_band(options.pattern) and band:
            mask = CAUSAL_FROM_BOTTOM_RIGHT
            window = min(options.pattern.window, S) if isinstance(options.pattern, SlidingWindow) else None
        elif _masked(inputs) or not isinstance(options.pattern, Full):
            bias, empty = _bias(inputs, options)
        if H != K:
            q = apart(q, K)
            k, v = (apart(tensor, K).expand(-1, -1, H // K, -1) for tensor in (k, v))
        if bias is not None:
            if bias.shape[0] != 1 and H != K:
                bias = bias.repeat_interleave(K, 0)
            bias = bias.expand(q.shape[0], q.shape[2], -1, -1)[..., :S]
        return _Call(q, k, v, bias, empty, mask, window)


def _aligned(tensor: Tensor) -> Tensor:
    return widened(tensor, rounded(tensor.shape[-1], 16 // tensor.element_size()))


def apart(tensor: Tensor, parts: int) -> Tensor:
    """(B, T, K·G, D) → (B·K, T, G, D)."""
    return tensor.unflatten(2, (parts, -1)).transpose(1, 2).flatten(0, 1)


def together(tensor: Tensor, parts: int) -> Tensor:
    """(B·K, T, G, D) → (B, T, K·G, D)."""
    return tensor.unflatten(0, (-1, parts)).transpose(1, 2).flatten(2, 3)


def _bias(inputs: Tensors, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """What to add to the scores, (B or 1, 1, T, S′) of 0 and −∞ in q's dtype, and which rows see nothing (B or 1, T).

    S′ is S with room behind it: each row begins at a multiple of 16 bytes. Rows that see nothing are given every key,
    so that no maximum and no sum of theirs is special; what they find is dropped.
    """
    q, T, S = inputs["q"], inputs["q"].shape[1], inputs["k"].shape[1]
    rows = max(1, MASK_ROWS // S)
    bias = empty = None
    for start in range(0, T, rows):
        part = slice(start, start + rows)
        seen = visible(inputs, options.pattern, part, layer=options.layer)
        nothing = ~seen.any(-1)
        if bias is None or empty is None:
            bias = q.new_zeros(seen.shape[0], T, rounded(S, 8))
            empty = nothing.new_empty(seen.shape[0], T)
        bias[:, part, :S].masked_fill_(~(seen | nothing[..., None]), -torch.inf)
        empty[:, part] = nothing
    assert bias is not None
    assert empty is not None
    return bias[:, None], empty


def _efficient(inputs: Tensors, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    q, v, K = inputs["q"], inputs["v"], inputs["k"].shape[2]
    call = _Call.of(inputs, options)
    out, lse, *_ = torch.ops.aten._efficient_attention_forward(
        call.q,
        call.k,
        call.v,
        call.bias,
        None,
        None,
        None,
        None,
        0.0,
        call.mask,
        True,
        scale=options.softmax_scale(q.shape[-1]),
        window_size=call.window,
    )
    lse = lse[..., : q.shape[1]]
    if q.shape[2] != K:
        out, lse = together(out, K), lse.unflatten(0, (-1, K)).flatten(1, 2)
    out = out[..., : v.shape[-1]].contiguous()
    if call.empty is not None:
        out = out.masked_fill(call.empty[:, :, None, None], 0.0)
        lse = lse.masked_fill(call.empty[:, None], -torch.inf)
    return out, lse.contiguous()


def _efficient_backward(
    dout: Tensor, inputs: Tensors, outputs: Tensors, options: AttentionOptions
) -> tuple[Tensor, ...]:
    q, T, S, K = inputs["q"], inputs["q"].shape[1], *inputs["k"].shape[1:3]
    call = _Call.of(inputs, options)
    grouped = q.shape[2] != K
    # exp(score − ∞) = 0: what sees nothing has no gradient, nor have the rows behind the last
    lse = torch.nn.functional.pad(outputs["lse"], (0, -T % LSE_ROWS), value=-torch.inf)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    dout, out = _aligned(dout), _aligned(outputs["out"])
    if grouped:
        dout, out = apart(dout, K), apart(out, K)
        lse = lse.unflatten(1, (K, -1)).flatten(0, 1)
    none = torch.zeros((), dtype=torch.int64, device=q.device)  # the seed of a dropout that there is not
    dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
        dout,
        call.q,
        call.k,
        call.v,
        call.bias,
        out.contiguous(),
        None,
        None,
        T,
        S,
        lse.contiguous(),
        0.0,
        none,
        none,
        call.mask,
        False,
        scale=options.softmax_scale(q.shape[-1]),
        num_splits_key=1 if options.deterministic else None,
        window_size=call.window,
    )
    if not grouped:
        return dq, dk, dv
    return together(dq, K), *(together(grad.sum(2, keepdim=True), K) for grad in (dk, dv))
