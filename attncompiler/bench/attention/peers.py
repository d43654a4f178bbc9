"""The peers: torch's FlashAttention 2 and cuDNN, FlexAttention, FlashAttention 4, and on a CPU torch's SDPA.

Each computes the row's function by what it offers for that; where it offers nothing it is absent, with the reason.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attncompiler.bench.attention.inputs import Inputs
from attncompiler.bench.grid.contestants import Absent, Call, Contestant

MASK_ELEMENTS = 2**34
"""the largest T × T that FlexAttention is asked to build its block mask of"""


def peers(device_type: str) -> tuple[Contestant, ...]:
    """Those that run on a device."""
    prepared: dict[str, Callable[[Inputs], Call]] = {"SDPA": sdpa}
    if device_type == "cuda":
        prepared = {"FA2": flash, "cuDNN": cudnn, "Flex": flex, "FA4": flash4}
    return tuple(Contestant(name, "peer", prepare) for name, prepare in prepared.items())


def tokens_first(out: Tensor) -> Tensor:
    """(B, H, T, D) → (B, T, H, D)."""
    return out.transpose(1, 2)


def sdpa(inputs: Inputs) -> Call:
    """F.scaled_dot_product_attention: its causal flag, or a boolean mask that is made before it is timed.

    Right padding needs no mask of a causal call: no real query sees it.
    """
    row = inputs.row
    flagged = row.layout != "packed" and row.pattern["kind"] in ("causal", "full")
    return _sdpa(inputs, mask=None if flagged else inputs.dense())


def flash(inputs: Inputs) -> Call:
    """torch's FlashAttention 2: below SDPA, or by its own operator for windows and packed documents."""
    row, kind = inputs.row, inputs.row.pattern["kind"]
    if row.layout != "packed" and kind in ("causal", "full"):
        return _sdpa(inputs, backend="FLASH_ATTENTION")
    windows = _windows(inputs)
    run = torch.ops.aten._flash_attention_forward
    sides: dict[str, Any] = {} if windows is None else dict(zip(WINDOW_SIDES, windows, strict=True))
    if row.layout == "packed":
        q, k, v = inputs.packed
        offsets, longest = inputs.offsets, max(row.lengths)

        def packed() -> Tensor:
            arguments = (offsets, offsets, longest, longest, 0.0, row.causal, False)
            out: Tensor = run(q, k, v, *arguments, **sides)[0]
            return out

        return Call(packed, (q, k, v), lambda out: out[None])
    q, k, v = inputs.qkv

    def forward() -> Tensor:
        out: Tensor = run(q, k, v, None, None, row.T, row.S, 0.0, row.causal, False, **sides)[0]
        return out

    return Call(forward, (q, k, v))


def cudnn(inputs: Inputs) -> Call:
    """cuDNN's fused attention, below SDPA."""
    if inputs.row.layout == "packed" or inputs.row.pattern["kind"] not in ("causal", "full"):
        raise Absent("torch offers cuDNN causal and full attention alone")
    return _sdpa(inputs, backend="CUDNN_ATTENTION")


def flex(inputs: Inputs) -> Call:
    """FlexAttention through torch.compile; its block mask is built before it is timed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    row = inputs.row
    if row.layout == "padded":
        raise Absent("it is measured on the packed rows")
    if row.T * row.S > MASK_ELEMENTS:
        raise Absent(f"its block mask is built from all {row.T:,} × {row.S:,} pairs")
    q, k, v = inputs.heads_first
    mask = None
    if row.backward and (row.layout == "packed" or row.pattern["kind"] != "full"):
        mask = create_block_mask(inputs.mask(), None, None, row.T, row.S, device=inputs.device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def forward() -> Tensor:
        out: Tensor = compiled(q, k, v, block_mask=mask, enable_gqa=row.H != row.K)
        return out

    return Call(forward, (q, k, v), tokens_first)


def flash4(inputs: Inputs) -> Call:
    """FlashAttention 4 (flash-attn-4), with its window where the row has one."""
    if importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn.cute") is None:
        raise Absent("flash-attn-4 is not installed")
    library = importlib.import_module("flash_attn.cute.interface")
    row, windows = inputs.row, _windows(inputs)
    options = {"causal": row.causal, "window_size": windows or (None, None)}
    if row.layout == "packed":
        q, k, v = inputs.packed
        offsets, longest = inputs.offsets, max(row.lengths)
        ends = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": longest, "max_seqlen_k": longest}
        run = library.flash_attn_varlen_func
        return Call(lambda: _first(run(q, k, v, **ends, **options)), (q, k, v), lambda out: out[None])
    q, k, v = inputs.qkv
    return Call(lambda: _first(library.flash_attn_func(q, k, v, **options)), (q, k, v))


WINDOW_SIDES = ("window_size_left", "window_size_right")


def _windows(inputs: Inputs) -> tuple[int, int] | None:
    """How many keys on either side of its own a query sees; None where there is no window. Raises Absent."""
    pattern, causal = inputs.row.pattern, inputs.row.causal
    if pattern["kind"] in ("causal", "full"):
        return None
    if pattern["kind"] != "sliding_window" or pattern.get("global_tokens"):
        raise Absent("it has no such mask")
    return pattern["window"] - 1, 0 if causal else pattern["window"] - 1


def _sdpa(inputs: Inputs, mask: Tensor | None = None, backend: str | None = None) -> Call:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = inputs.heads_first
    row = inputs.row
    # its flag is aligned to the top left: one query at the end sees all keys without it
    flag = {"is_causal": row.causal and mask is None and row.T > 1, "enable_gqa": row.H != row.K}

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **flag)

    def chosen() -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, str(backend))):
            return forward()

    return Call(forward if backend is None else chosen, (q, k, v), tokens_first)


def _first(result: Any) -> Tensor:
    """The output of what may be the output and its lse."""
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out
