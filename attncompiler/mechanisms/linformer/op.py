"""Linformer's operator, and the function that users call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attncompiler.blocks.autocast import autocast
from attncompiler.errors import InputError, fail
from attncompiler.mechanisms.base import Value
from attncompiler.mechanisms.linformer.cost import operator_flops
from attncompiler.mechanisms.linformer.documents import extents, last_queries
from attncompiler.runtime.implementation import Tensors
from attncompiler.runtime.inputs import (
    boolean_mask,
    check_device,
    check_dtypes,
    check_shapes,
    kernel_names,
    silenced,
)
from attncompiler.runtime.operator import Operator, OperatorOptions, define, options_text

INPUTS = ("q", "k", "v", "key_projection", "value_projection", "segment_ids", "attention_mask")


class LinformerOptions(OperatorOptions):
    """What a call of the operator asks, beside its tensors: nothing of its own."""


def _fake(inputs: Tensors, options: LinformerOptions) -> dict[str, Tensor]:
    q, v = inputs["q"], inputs["v"]
    B, T, H, _ = q.shape
    return {"out": q.new_empty(B, T, H, v.shape[-1])}


def _features(inputs: Tensors, options: LinformerOptions) -> Mapping[str, Value]:
    return {"segments": "segment_ids" in inputs, "padding": "attention_mask" in inputs}


OPERATOR = define(
    Operator(
        name="linformer",
        inputs=INPUTS,
        differentiable=("q", "k", "v", "key_projection", "value_projection"),
        outputs=("out",),
        differentiable_outputs=("out",),
        sequence=dict.fromkeys(("q", "k", "v", "segment_ids", "attention_mask", "out"), 1),
        low_precision=("q", "k", "v", "key_projection", "value_projection"),
        options=LinformerOptions,
        fake=_fake,
        features=_features,
        flops=operator_flops,
    )
)


@torch.compiler.allow_in_graph
def linformer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_projection: Tensor,
    value_projection: Tensor,
    *,
    segment_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    kernel: str | Sequence[str] = "auto",
) -> Tensor:
    """Attention over a sequence projected to R tokens (Wang et al. 2020, https://arxiv.org/abs/2006.04768, equation 7).

    q (B, T, H, D), k (B, S, H, D), v (B, S, H, V), projections (R, P) or one per head (H, R, P), all of one dtype
    → out (B, T, H, V) = softmax(D^-1/2 · q (E k)ᵀ) F v. P is at least S; token s uses column s, and columns from S
    on are not read: one projection serves every shorter sequence.

    `segment_ids` (B, S), equal ids being one contiguous run, keep packed documents apart: a query meets its own
    document alone, whose columns count from its first token. P is then at least the longest document's length, and
    no more than that is read.
    `attention_mask` (B, S) is non-zero for real tokens. Padding counts as zeros before projecting, and columns count
    from the first real token, so that padding on either side changes nothing. Query t reads column S − T + t of
    both, and gives 0 where it is padding. `kernel` is "auto", a name, or the list of the only kernels allowed.

    Raises InputError (E401 shapes, E402 dtypes, E403 arguments, E404 devices) and KernelError (E501) when no allowed
    kernel offers what is asked.
    """
    options = LinformerOptions(kernel=kernel_names("linformer", kernel))
    tensors = check(q, k, v, key_projection, value_projection, segment_ids, attention_mask)
    return OPERATOR(tensors, options_text(options))["out"]


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_projection: Tensor,
    value_projection: Tensor,
    segment_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> dict[str, Tensor | None]:
    """The operator's inputs by name, after one check of shapes, dtypes and devices at the door."""
    q, k, v, key_projection, value_projection = autocast(q, k, v, key_projection, value_projection)
    floating = {"q": q, "k": k, "v": v, "key_projection": key_projection, "value_projection": value_projection}
    tensors: dict[str, Tensor | None] = {
        **floating,
        "segment_ids": segment_ids,
        "attention_mask": boolean_mask(attention_mask),
    }
    sizes = check_shapes(
        tensors,
        {
            "q": "BTHD",
            "k": "BSHD",
            "v": "BSHV",
            "key_projection": "HRP" if key_projection.dim() == 3 else "RP",
            "value_projection": "HRP" if value_projection.dim() == 3 else "RP",
            "segment_ids": "BS",
            "attention_mask": "BS",
        },
    )
    check_device(tensors)
    check_dtypes(tensors, OPERATOR.low_precision)
    longest = sizes["S"]
    if longest > sizes["P"] and segment_ids is not None and not torch.compiler.is_compiling():
        longest = int(extents(segment_ids, tensors["attention_mask"])[1].max())
    if longest > sizes["P"]:
        raise fail(
            InputError,
            "E401",
            f"the projections have {sizes['P']} columns, and a sequence {longest} tokens",
            remedy="raise max_position_embeddings, which the projections are made for",
        )
    if sizes["T"] > sizes["S"] and not (segment_ids is None and attention_mask is None):
        name = "attention_mask" if segment_ids is None else "segment_ids"
        raise fail(InputError, "E401", f"{name} covers {sizes['S']} keys, and there are {sizes['T']} queries")
    mask = tensors["attention_mask"]
    if mask is None:
        return tensors
    return {**tensors, **silenced({"q": q}, last_queries(mask, sizes["T"])), **silenced({"k": k, "v": v}, mask)}
