"""Attention's operator, and the function that users call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from attncompiler.blocks.autocast import autocast
from attncompiler.errors import InputError, fail
from attncompiler.mechanisms.attention.cost import operator_flops
from attncompiler.mechanisms.attention.pattern import PATTERNS, Causal, Pattern, is_band
from attncompiler.mechanisms.attention.visibility import query_mask
from attncompiler.mechanisms.base import Value
from attncompiler.runtime.implementation import Tensors
from attncompiler.runtime.inputs import (
    boolean_mask,
    check_device,
    check_dtypes,
    check_shapes,
    kernel_names,
    number,
    silenced,
    whole,
)
from attncompiler.runtime.operator import Operator, OperatorOptions, define, options_text

INPUTS = (
    "q",
    "k",
    "v",
    "sinks",
    "alibi_slopes",
    "segment_ids",
    "kv_segment_ids",
    "attention_mask",
    "q_positions",
    "kv_positions",
    "dropout_seed",
)


class AttentionOptions(OperatorOptions):
    """What a call of the operator asks, beside its tensors."""

    pattern: Pattern = Causal()
    scale: float | None = None
    softcap: float | None = None
    dropout: float = 0.0
    layer: int = 0

    def softmax_scale(self, head_dim: int) -> float:
        return head_dim**-0.5 if self.scale is None else self.scale


def _fake(inputs: Tensors, options: AttentionOptions) -> dict[str, Tensor]:
    q, v = inputs["q"], inputs["v"]
    B, T, H, _ = q.shape
    return {
        "out": q.new_empty(B, T, H, v.shape[-1]),
        "lse": q.new_empty(B, H, T, dtype=torch.promote_types(q.dtype, torch.float32)),
    }


def _features(inputs: Tensors, options: AttentionOptions) -> Mapping[str, Value]:
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    masks = {
        "segments": "segment_ids" in inputs,
        "padding": "attention_mask" in inputs,
        "positions": "q_positions" in inputs,
    }
    B, T, S = q.shape[0], q.shape[1], k.shape[1]
    pattern, positive = options.pattern, options.scale is None or options.scale > 0
    dense = any(masks.values()) or pattern.kind not in ("full", "causal")
    dense = dense or (pattern.kind == "causal" and T != 1 and not (T == S and positive))
    copies = B * (
        k.shape[2] if B > 1 and k.shape[2] != q.shape[2] else 1
    )  # one for each key head where they are grouped
    mask_bytes = (copies if any(masks.values()) else 1) * T * S * q.element_size() if dense else 0
    band = is_band(pattern) and positive and not any(masks.values())
    band = band and (T <= S if pattern.kind == "causal" else T == S)
    drawn_on_device = pattern.kind == "random" and (masks["positions"] or (any(masks.values()) and not pattern.causal))
    unequal = "fewer queries than keys" if T < S else "more queries than keys" if T > S else None
    return {
        "pattern": pattern.kind,
        "head_dim": q.shape[-1],
        "softcap": options.softcap,
        "dropout": options.dropout,
        "sinks": "sinks" in inputs,
        "alibi": "alibi_slopes" in inputs,
        "value_width": v.shape[-1] if v.shape[-1] != q.shape[-1] else None,
        "lengths": None if pattern.kind == "full" else unequal,
        "single_token": T == 1 or S == 1,
        "non_positive_scale": not positive,
        "mask_bytes": 0 if band else mask_bytes,
        "band_mask_bytes": mask_bytes if band else 0,
        "drawn_on_device": drawn_on_device,
        **masks,
    }


OPERATOR = define(
    Operator(
        name="attention",
        inputs=INPUTS,
        differentiable=("q", "k", "v", "sinks"),
        outputs=("out", "lse"),
        differentiable_outputs=("out",),
        sequence={
            **dict.fromkeys(("q", "k", "v", "segment_ids", "kv_segment_ids", "attention_mask"), 1),
            **dict.fromkeys(("q_positions", "kv_positions", "out"), 1),
            "lse": 2,
        },
        low_precision=("q", "k", "v"),
        options=AttentionOptions,
        fake=_fake,
        features=_features,
        flops=operator_flops,
        logarithms=("lse",),
    )
)

_pattern = TypeAdapter(Pattern)


def as_pattern(pattern: str | Mapping[str, Any] | Pattern) -> Pattern:
    """A pattern from its kind, from a mapping as in YAML, or as it is. Raises InputError (E403) when it is none."""
    if isinstance(pattern, PATTERNS):
        return pattern
    return _named(pattern) if isinstance(pattern, str) else _read(pattern)


def _read(pattern: str | Mapping[str, Any]) -> Pattern:
    try:
        return _pattern.validate_python({"kind": pattern} if isinstance(pattern, str) else pattern)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise fail(
            InputError, "E403", f"pattern {pattern!r} is not valid: {place + ': ' if place else ''}{first['msg']}"
        ) from None


_named = lru_cache(maxsize=64)(_read)


@torch.compiler.allow_in_graph
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: str | Mapping[str, Any] | Pattern = "causal",
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    segment_ids: Tensor | None = None,
    kv_segment_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    q_positions: Tensor | None = None,
    kv_positions: Tensor | None = None,
    dropout: float = 0.0,
    dropout_seed: Tensor | None = None,
    layer: int = 0,
    deterministic: bool = False,
    return_lse: bool = False,
    kernel: str | Sequence[str] = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention under a visibility pattern (Vaswani et al. 2017, equation 1).

    q (B, T, H, D), k (B, S, K, D), v (B, S, K, V) of one dtype → out (B, T, H, V); with `return_lse` also the natural
    logarithm of the softmax's denominator, (B, H, T) in fp32 (fp64 for fp64), −∞ on rows that see nothing.

    `pattern` is a kind, a mapping as in YAML, or a pattern. `scale` defaults to D^-1/2. For T ≠ S the last query is
    aligned with the last key. `segment_ids` (B, T), equal ids being one contiguous run, keep packed documents apart;
    `kv_segment_ids` (B, S) are needed with them when T ≠ S. `attention_mask` (B, S) is non-zero for real tokens;
    query t reads mask[S − T + t]; rows of padding give 0. `q_positions` (B, T) and `kv_positions` (B, S) replace the
    positions the pattern is read at; on a GPU they lie between −2^30 and 2^30, which no kernel checks.

    In order: `softcap` c makes a score c·tanh(score / c) (Gemma 2, https://arxiv.org/abs/2408.00118, section 2);
    `alibi_slopes` (H,) take slope · |i − j| from it (Press et al. 2022, https://arxiv.org/abs/2108.12409), i and j
    being positions; what the pattern hides is hidden; `sinks` (H,) add exp(sink) to the denominator of a row that
    sees something (GPT-OSS). Slopes and sinks are in fp32 (fp64 for fp64), and sinks are differentiable. `dropout`
    zeroes that share of the probabilities by a mask that follows from `dropout_seed` (1,), int64, and indices alone
    (`mechanisms/attention/dropout.py`); without a seed one is drawn from torch's generator.

    `layer` numbers the layer for a pattern that differs from layer to layer, which is
    `random` alone. `kernel` is "auto", a name, or the list of the only kernels allowed.

    Raises InputError (E401 shapes, E402 dtypes, E403 arguments, E404 devices) and KernelError (E501) when no allowed
    kernel offers what is asked.
    """
    dropout = _share(dropout)
    if dropout_seed is not None and not dropout:
        raise fail(InputError, "E403", "dropout_seed needs dropout")
    if dropout_seed is None and dropout:
        dropout_seed = new_seed(q.device)
    tensors = check(
        q,
        k,
        v,
        segment_ids,
        kv_segment_ids,
        attention_mask,
        q_positions,
        kv_positions,
        sinks,
        alibi_slopes,
        dropout_seed,
    )
    text = _options_text(
        kernel_names("attention", kernel),
        bool(deterministic),
        as_pattern(pattern),
        None if scale is None else number("scale", scale),
        None if softcap is None else number("softcap", softcap, above=0),
        dropout,
        whole("layer", layer, 0),
    )
    results = OPERATOR(tensors, text)
    return (results["out"], results["lse"]) if return_lse else results["out"]


@lru_cache(maxsize=1024)
def _options_text(
    kernel: tuple[str, ...],
    deterministic: bool,
    pattern: Pattern,
    scale: float | None,
    softcap: float | None,
    dropout: float,
    layer: int,
) -> str:
    options = AttentionOptions(
        kernel=kernel,
        deterministic=deterministic,
        pattern=pattern,
        scale=scale,
        softcap=softcap,
        dropout=dropout,
        layer=layer,
    )
    return options_text(options)


def _share(dropout: float) -> float:
    if not 0 <= number("dropout", dropout) < 1:
        raise fail(InputError, "E403", f"dropout must be at least 0 and below 1, not {dropout}")
    return float(dropout)


def new_seed(device: torch.device) -> Tensor:
    """A seed (1,) for dropout from torch's own generator, which torch.manual_seed sets and checkpointing replays."""
    return torch.randint(2**62, (1,), device=device)


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor | None = None,
    kv_segment_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    q_positions: Tensor | None = None,
    kv_positions: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_seed: Tensor | None = None,
) -> dict[str, Tensor | None]:
    """The operator's inputs by name, after one check of shapes, dtypes and devices at the door."""
    q, k, v = autocast(q, k, v)
    tensors = {
        "q": q,
        "k": k,
        "v": v,
        "sinks": sinks,
        "alibi_slopes": alibi_slopes,
        "segment_ids": segment_ids,
        "kv_segment_ids": kv_segment_ids,
        "attention_mask": boolean_mask(attention_mask),
        "q_positions": q_positions,
        "kv_positions": kv_positions,
        "dropout_seed": dropout_seed,
    }
    sizes = check_shapes(
        tensors,
        {
            "q": "BTHD",
            "k": "BSKD",
            "v": "BSKV",
            "sinks": "H",
            "alibi_slopes": "H",
            "segment_ids": "BT",
            "kv_segment_ids": "BS",
            "attention_mask": "BS",
            "q_positions": "BT",
            "kv_positions": "BS",
            "dropout_seed": "1",
        },
    )
    if sizes.get("1", 1) != 1:
        raise fail(InputError, "E401", f"dropout_seed is one number, not {sizes['1']}")
    if dropout_seed is not None and dropout_seed.dtype != torch.int64:
        raise fail(InputError, "E402", f"dropout_seed must be torch.int64, not {dropout_seed.dtype}")
    check_device(tensors)
    tensors = check_dtypes(tensors, OPERATOR.low_precision, ("sinks", "alibi_slopes"))
    if sizes["H"] % sizes["K"]:
        raise fail(InputError, "E401", f"{sizes['H']} query heads are not a multiple of {sizes['K']} key heads")
    if (q_positions is None) != (kv_positions is None):
        raise fail(InputError, "E403", "q_positions and kv_positions must be given together")
    if kv_segment_ids is not None and segment_ids is None:
        raise fail(InputError, "E403", "kv_segment_ids needs segment_ids")
    if segment_ids is not None and kv_segment_ids is None and sizes["T"] != sizes["S"]:
        raise fail(InputError, "E403", "segment_ids with T ≠ S needs kv_segment_ids")
    mask = tensors["attention_mask"]
    if mask is not None:
        tensors |= silenced({"q": q}, query_mask(mask, sizes["T"], sizes["S"])) | silenced({"k": k, "v": v}, mask)
    return tensors
