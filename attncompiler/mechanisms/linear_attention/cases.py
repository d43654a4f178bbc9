"""Hypothesis strategies for linear attention's calls, and its benchmark shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from attncompiler.mechanisms.case import (
    VALUE_KINDS,
    Case,
    Cases,
    Options,
    Wanted,
    among,
    head_width,
    heads,
    one_large,
    perhaps,
    rotary,
    values,
)
from attncompiler.mechanisms.linear_attention.mechanism import FeatureMap
from attncompiler.mechanisms.linear_attention.op import OPERATOR, LinearAttentionOptions

FEATURE_MAPS: tuple[tuple[FeatureMap, bool], ...] = (
    ("elu", True),
    ("elu", False),
    ("favor", True),
    ("favor", False),
    ("relu", True),
    ("relu", False),
    ("identity", False),
)
"""feature maps, with and without normaliser"""
DECAYS = ("none", "none", "heads", "tokens", "resets")
EPS, SCALES = (1e-6, 1e-2), (1.0, 0.3)


class Widths(NamedTuple):
    """Of heads, and random features."""

    heads: Sequence[int]
    features: Sequence[int]


NARROW, WIDE = Widths((4, 8, 20), (1, 7, 24)), Widths((64, 128, 256), (64, 128, 256))


@st.composite
def plain(draw: st.DrawFn, min_length: int = 1) -> Case:
    """No segments, no padding, no initial state."""
    return _make(draw, draw(st.integers(min_length, 70)))


@st.composite
def extras(draw: st.DrawFn, widths: Widths = NARROW) -> Case:
    """Packed segments, padding on either side, an initial state."""
    T = draw(st.integers(1, 150))
    case = _make(draw, T, widths)
    B, _, H, D = case.tensors["q"].shape
    R, V = len(case.tensors["projection"]) if "projection" in case.tensors else D, case.tensors["v"].shape[-1]
    added: dict[str, Tensor] = {}
    index = torch.arange(T)
    if draw(st.booleans()):
        cuts = torch.tensor([draw(st.integers(0, T)) for _ in range(2)])
        added["segment_ids"] = (index[:, None] >= cuts).sum(1).expand(B, T).contiguous()
    if draw(st.booleans()):
        counts = [draw(st.integers(0, T)) for _ in range(B)]
        left = draw(st.booleans())
        added["attention_mask"] = torch.stack([(index >= n) if left else (index < T - n) for n in counts])
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
        kind = draw(st.sampled_from(VALUE_KINDS))
        # as a state that the operator gave: z sums features that are not negative, and S averages values by them
        z = values(draw(st.sampled_from(VALUE_KINDS)), (B, H, R), generator).abs()
        added["initial_s"] = values(kind, (B, H, R, V), generator) * z[..., None]
        added["initial_z"] = z
        added["initial_m"] = values("normal", (B, H), generator)
    return case.given(**added)


def _make(draw: st.DrawFn, T: int, widths: Widths = NARROW) -> Case:
    B, H = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    D, features = draw(st.sampled_from(widths.heads)), draw(st.sampled_from(widths.features))
    V = draw(st.sampled_from([D, D, 12]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    kinds = [draw(st.sampled_from(VALUE_KINDS)) for _ in range(3)]
    if widths is WIDE:
        kinds = one_large(*kinds)
    feature_map, normalize = draw(st.sampled_from(FEATURE_MAPS))
    tensors = {
        name: values(kind, (B, T, H, width), generator)
        for name, kind, width in zip(("q", "k", "v"), kinds, (D, D, V), strict=True)
    }
    causal = draw(st.booleans())
    if feature_map == "favor":
        tensors["projection"] = torch.randn(features, D, generator=generator).double()
    decay = draw(st.sampled_from(DECAYS)) if causal else "none"
    if decay != "none":
        tensors["log_decay"] = log_decay(decay, (B, T, H), generator)
    options = LinearAttentionOptions(
        feature_map=feature_map,
        normalize=normalize,
        causal=causal,
        eps=draw(st.sampled_from(EPS)),
        scale=draw(st.sampled_from(SCALES)),
    )
    return Case(OPERATOR, tensors, options, causal=causal)


def log_decay(kind: str, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Decays (B, T, H) in fp64: one of each head, as retention's; one of each token; or some that leave nothing."""
    if kind == "heads":
        return -torch.rand(shape[-1], generator=generator).double().expand(shape).contiguous() / 4
    each = torch.nn.functional.logsigmoid(4 * torch.randn(shape, generator=generator)).double()
    if kind == "resets":
        return torch.where(torch.rand(shape, generator=generator) < 0.05, -1e4, each / 16)
    return each


# --- policies -----------------------------------------------------------------------------------------------------

LEAST = {"kind": "linear_attention", "num_attention_heads": 1}
FEATURE_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "elu": {"normalize": st.booleans()},
    "relu": {"normalize": st.booleans()},
    "favor": {
        "normalize": st.booleans(),
        "num_features": st.sampled_from([8, 20]),
        "orthogonal": st.booleans(),
        "redraw_interval": st.integers(1, 9),
    },
    "identity": {},
}
"""feature_map → the options it takes; the features of identity have any sign, and are not normalised"""


def _features(wanted: Wanted) -> st.SearchStrategy[Options]:
    probes: list[Options] = [{"feature_map": each, "normalize": each != "identity"} for each in FEATURE_OPTIONS]
    offered = [each for each in probes if wanted.built({**LEAST, **each})]
    mapped = st.sampled_from(offered).flatmap(
        lambda probe: st.fixed_dictionaries(
            {name: st.just(value) for name, value in probe.items() if name == "feature_map" or not value},
            optional=dict(FEATURE_OPTIONS[probe["feature_map"]]),
        )
    )
    return st.one_of(perhaps(normalize=st.booleans()), mapped)


def _order(wanted: Wanted) -> st.SearchStrategy[Options]:
    """A direction in time, or a decay along it."""
    return st.one_of(
        among("causal", wanted.offered(LEAST, "causal", [True, False])),
        among("decay", wanted.offered(LEAST, "decay", ["none", "retention", "scalar"])),
    )


@st.composite
def policies(draw: st.DrawFn, wanted: Wanted) -> Options:
    """Every option that is built, in all combinations."""
    options: Options = {"kind": "linear_attention", **draw(heads(wanted.hidden_size))}
    options |= draw(perhaps(v_head_dim=st.sampled_from([8, 12, 4])))
    options |= draw(rotary(wanted, LEAST, head_width(options, wanted.hidden_size)))
    names = ("feature_map", "normalize", "num_features", "orthogonal", "redraw_interval")
    options |= draw(wanted.group(names, _features(wanted)))
    options |= draw(wanted.group(("causal", "decay"), _order(wanted)))
    for name, choices in (("attention_bias", ["none", "qkv", "all"]), ("eps", [1e-3]), ("scale", [0.3])):
        options |= draw(wanted.group([name], among(name, choices)))
    return options


CASES = Cases(
    draw=plain,
    extras=extras,
    wide=partial(extras, WIDE),
    policies=policies,
    bench=(
        {"B": 1, "T": 4096, "H": 8, "D": 64, "causal": True},
        {"B": 4, "T": 512, "H": 8, "D": 32, "causal": True},
        {"B": 4, "T": 512, "H": 8, "D": 32, "causal": False},
        {"B": 1, "T": 4096, "H": 8, "D": 64, "R": 256, "causal": True},
    ),
)
