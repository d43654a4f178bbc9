"""Linear attention's operator, and the function that users call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attncompiler.blocks.autocast import autocast
from attncompiler.errors import InputError, fail
from attncompiler.mechanisms.base import Value
from attncompiler.mechanisms.linear_attention.cost import operator_flops
from attncompiler.mechanisms.linear_attention.mechanism import FeatureMap
from attncompiler.runtime.implementation import Tensors
from attncompiler.runtime.inputs import (
    boolean_mask,
    check_device,
    check_dtypes,
    check_shapes,
    kernel_names,
    number,
    silenced,
)
from attncompiler.runtime.operator import Operator, OperatorOptions, define, options_text

INPUTS = (
    "q",
    "k",
    "v",
    "projection",
    "log_decay",
    "initial_s",
    "initial_z",
    "initial_m",
    "segment_ids",
    "attention_mask",
)
State = tuple[Tensor, Tensor, Tensor]
"""S (B, H, R, V), z (B, H, R) and m (B, H), in fp32, or fp64 where q is."""
WIDE = ("projection", "log_decay", "initial_s", "initial_z", "initial_m")


class LinearAttentionOptions(OperatorOptions):
    """What a call of the operator asks, beside its tensors: `projection` (R, D) for favor, `log_decay` (B, T, H).

    Beside `out` and the final state the operator gives `normalizer` (B, T, H), which its backward divides by:
    φ(q)·z + eps, or 1 on padding and without `normalize`; for favor, whose features are exponentials, its logarithm.
    """

    feature_map: FeatureMap = "elu"
    causal: bool = True
    normalize: bool = True
    eps: float = 1e-6
    scale: float = 1.0


def _fake(inputs: Tensors, options: LinearAttentionOptions) -> dict[str, Tensor]:
    q, v = inputs["q"], inputs["v"]
    B, T, H, D = q.shape
    R, V = inputs["projection"].shape[0] if "projection" in inputs else D, v.shape[-1]
    wide = torch.promote_types(q.dtype, torch.float32)
    return {
        "out": q.new_empty(B, T, H, V),
        "normalizer": q.new_empty(B, T, H, dtype=wide),
        "final_s": q.new_empty(B, H, R, V, dtype=wide),
        "final_z": q.new_empty(B, H, R, dtype=wide),
        "final_m": q.new_empty(B, H, dtype=wide),
    }


def _features(inputs: Tensors, options: LinearAttentionOptions) -> Mapping[str, Value]:
    features = inputs["projection"].shape[0] if "projection" in inputs else inputs["q"].shape[-1]
    return {
        "feature_map": options.feature_map,
        "normalize": options.normalize,
        "bidirectional": not options.causal,
        "decay": "log_decay" in inputs,
        "width": max(features, inputs["v"].shape[-1]),
        "segments": "segment_ids" in inputs,
        "padding": "attention_mask" in inputs,
        "initial_state": "initial_s" in inputs,
    }


OPERATOR = define(
    Operator(
        name="linear_attention",
        inputs=INPUTS,
        differentiable=("q", "k", "v", "log_decay", "initial_s", "initial_z"),
        outputs=("out", "normalizer", "final_s", "final_z", "final_m"),
        differentiable_outputs=("out", "final_s", "final_z"),
        sequence=dict.fromkeys(("q", "k", "v", "log_decay", "segment_ids", "attention_mask", "out", "normalizer"), 1),
        low_precision=("q", "k", "v"),
        options=LinearAttentionOptions,
        fake=_fake,
        features=_features,
        flops=operator_flops,
    )
)


@torch.compiler.allow_in_graph
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: FeatureMap = "elu",
    projection: Tensor | None = None,
    causal: bool = True,
    normalize: bool = True,
    eps: float = 1e-6,
    log_decay: Tensor | None = None,
    scale: float = 1.0,
    initial_state: State | None = None,
    return_state: bool = False,
    segment_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    kernel: str | Sequence[str] = "auto",
) -> Tensor | tuple[Tensor, State]:
    """Linear attention (Katharopoulos et al. 2020, https://arxiv.org/abs/2006.16236, equations 4 to 12).

    q, k (B, T, H, D), v (B, T, H, V) of one dtype → out (B, T, H, V), out = scale · φ(q)·S / (φ(q)·z + eps), or
    scale · φ(q)·S without `normalize`; S = Σ φ(k)vᵀ and z = Σ φ(k) run over the tokens so far when `causal`, else over
    all of them. φ is elu(x) + 1, max(x, 0) for "relu", x for "identity" (only without `normalize`), and for "favor"
    (Choromanski et al. 2021, https://arxiv.org/abs/2009.14794) exp(w·x̂ − |x̂|²/2) / √R for each of the R rows w of
    `projection` (R, D), x̂ being x · D^-¼. Features that fp32 cannot hold are no matter: they are kept as multiples of
    the largest so far, and eps is scaled with them.

    `log_decay` (B, T, H), or (H,) for every token, is the logarithm of what a token leaves of S and z before it adds
    its own: S[t] = exp(log_decay[t])·S[t−1] + φ(k[t])v[t]ᵀ. It should not be above 0, where the sums would grow and may
    overflow; nothing is too far below. It needs `causal`.

    `initial_state` is (S (B, H, R, V), z (B, H, R), m (B, H)) and stands for S·exp(m) and z·exp(m); it is
    differentiable but for m. `return_state` gives the state after the last token, likewise. Its m is a constant: 0, or
    for favor the logarithm of the largest feature of a key (decayed, and −∞ before the first). All in fp32, fp64 for
    fp64. Not causal, a token sees the initial state and its whole segment.

    `segment_ids` (B, T), equal ids being one contiguous run, keep packed documents apart: the initial state belongs
    to the first, the final state is the last one's. `attention_mask` (B, T) is non-zero for real tokens; padding gives
    0 and leaves the state as it is. `kernel` is "auto", a name, or the list of the only kernels allowed.

    Raises InputError (E401 shapes, E402 dtypes, E403 arguments, E404 devices) and KernelError (E501) when no allowed
    kernel offers what is asked.
    """
    options = LinearAttentionOptions(
        kernel=kernel_names("linear_attention", kernel),
        feature_map=_feature_map(feature_map, normalize, projection),
        causal=_causal(causal, log_decay),
        normalize=bool(normalize),
        eps=number("eps", eps, above=0),
        scale=number("scale", scale),
    )
    tensors = check(q, k, v, initial_state, segment_ids, attention_mask, projection, log_decay)
    results = OPERATOR(tensors, options_text(options))
    if not return_state:
        return results["out"]
    return results["out"], (results["final_s"], results["final_z"], results["final_m"])


def _feature_map(name: FeatureMap, normalize: bool, projection: Tensor | None) -> FeatureMap:
    if name not in ("elu", "favor", "relu", "identity"):
        raise fail(InputError, "E403", f"unknown feature_map {name!r}; known: elu, favor, relu, identity")
    if name == "identity" and normalize:
        raise fail(
            InputError,
            "E403",
            "normalize needs features that are not negative, and those of feature_map 'identity' have any sign",
            remedy="pass normalize=False",
        )
    if (name == "favor") != (projection is not None):
        raise fail(
            InputError, "E403", f"feature_map 'favor' takes a projection (R, D), and no other does; not {name!r}"
        )
    return name


def _causal(causal: bool, log_decay: Tensor | None) -> bool:
    if not causal and log_decay is not None:
        raise fail(InputError, "E403", "a decay runs along time, and needs causal=True", remedy="leave log_decay out")
    return bool(causal)


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: State | None = None,
    segment_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    projection: Tensor | None = None,
    log_decay: Tensor | None = None,
) -> dict[str, Tensor | None]:
    """The operator's inputs by name, after one check of shapes, dtypes and devices at the door.

    A log_decay (H,) of all tokens becomes (B, T, H), which takes no memory.
    """
    q, k, v = autocast(q, k, v)
    if initial_state is not None and not (
        isinstance(initial_state, (tuple, list))
        and len(initial_state) == 3
        and all(isinstance(part, Tensor) for part in initial_state)
    ):
        raise fail(InputError, "E403", "initial_state must be the three tensors (S, z, m)")
    s, z, m = (None, None, None) if initial_state is None else initial_state
    tensors: dict[str, Tensor | None] = {
        "q": q,
        "k": k,
        "v": v,
        "projection": projection,
        "log_decay": log_decay,
        "initial_s": s,
        "initial_z": z,
        "initial_m": m,
        "segment_ids": segment_ids,
        "attention_mask": boolean_mask(attention_mask),
    }
    state_width = "D" if projection is None else "R"
    check_shapes(
        tensors,
        {
            "q": "BTHD",
            "k": "BTHD",
            "v": "BTHV",
            "projection": "RD",
            "log_decay": "H" if log_decay is not None and log_decay.dim() == 1 else "BTH",
            "initial_s": f"BH{state_width}V",
            "initial_z": f"BH{state_width}",
            "initial_m": "BH",
            "segment_ids": "BT",
            "attention_mask": "BT",
        },
    )
    check_device(tensors)
    tensors = check_dtypes(tensors, OPERATOR.low_precision, WIDE)
    decay, mask = tensors["log_decay"], tensors["attention_mask"]
    if decay is not None:
        tensors["log_decay"] = decay = decay.expand(q.shape[:3])
    if mask is None:
        return tensors
    silent = silenced({"q": q, "k": k, "v": v} if decay is None else {"q": q, "k": k, "v": v, "log_decay": decay}, mask)
    return {**tensors, **silent}
