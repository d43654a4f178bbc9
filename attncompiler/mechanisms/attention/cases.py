"""Hypothesis strategies for attention's calls, and its benchmark shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st

from attncompiler.mechanisms.attention.op import OPERATOR, AttentionOptions
from attncompiler.mechanisms.attention.pattern import (
    Causal,
    Chunked,
    Full,
    LocalGlobal,
    Pattern,
    Random,
    SlidingWindow,
    Strided,
)
from attncompiler.mechanisms.case import (
    LARGE_KINDS,
    VALUE_KINDS,
    Case,
    Cases,
    Options,
    Wanted,
    among,
    head_width,
    heads,
    one_large,
    rotary,
    values,
)

SCORE_OPTIONS = ("sinks", "alibi", "softcap")
NARROW, WIDE = (8, 16, 20), (64, 128, 256)
"""of heads"""
BLOCKS = st.sampled_from([1, 3, 4, 16])
PATTERNS: st.SearchStrategy[Pattern] = st.one_of(
    st.just(Causal()),
    st.just(Full()),
    st.builds(
        SlidingWindow,
        window=st.integers(1, 40),
        global_tokens=st.integers(0, 5),
        causal=st.booleans(),
    ),
    st.builds(Strided, stride=st.integers(1, 9), window=st.integers(1, 6), block_size=BLOCKS, causal=st.booleans()),
    st.builds(
        LocalGlobal,
        block_size=BLOCKS,
        local_blocks=st.integers(1, 6),
        global_blocks=st.integers(0, 3),
        causal=st.booleans(),
    ),
    st.builds(
        Random,
        block_size=BLOCKS,
        random_blocks=st.integers(1, 4),
        local_blocks=st.integers(1, 3),
        global_blocks=st.integers(0, 2),
        seed=st.integers(0, 9),
        causal=st.booleans(),
    ),
    st.builds(Chunked, chunk=st.integers(1, 40)),
)


@st.composite
def plain(draw: st.DrawFn, min_length: int = 1) -> Case:
    """T = S, no segments, no padding."""
    return _make(draw, draw(st.integers(min_length, 70)), None)


@st.composite
def extras(draw: st.DrawFn, widths: Sequence[int] = NARROW) -> Case:
    """Lengths that differ, packed segments, padding on either side, explicit positions."""
    T = draw(st.integers(1, 40))
    S = draw(st.sampled_from([T, T + draw(st.integers(0, 30)), max(1, T - 3)]))
    case = _make(draw, T, S, widths)
    B = case.tensors["q"].shape[0]
    added: dict[str, Any] = {}
    if draw(st.booleans()):
        cuts = torch.tensor([draw(st.integers(0, S)) for _ in range(2)])
        segments = (torch.arange(S)[:, None] >= cuts).sum(1).expand(B, S).contiguous()
        if T <= S:
            added |= {"segment_ids": segments[:, S - T :].contiguous(), "kv_segment_ids": segments}
    if draw(st.booleans()):
        rows = [draw(st.tuples(st.integers(0, S), st.integers(0, S // 2))) for _ in range(B)]
        index = torch.arange(S)
        left = draw(st.booleans())
        added["attention_mask"] = torch.stack([(index >= a) if left else (index < S - a) for a, _ in rows])
    if draw(st.integers(0, 3)) == 0:
        order = torch.randperm(S, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
        added |= {
            "kv_positions": order.expand(B, S).contiguous(),
            "q_positions": torch.arange(S, S + T).expand(B, T).contiguous(),
        }
    return case.given(**added)


def _make(draw: st.DrawFn, T: int, S: int | None, widths: Sequence[int] = NARROW) -> Case:
    S = T if S is None else S
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 4), (2, 2)]))
    D = draw(st.sampled_from(widths))
    V = draw(st.sampled_from([D, D, 12]))
    B = draw(st.integers(1, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    kind = draw(st.sampled_from(VALUE_KINDS))
    queries, of_values = one_large(kind, kind) if widths is WIDE else (kind, kind)
    tensors = {
        "q": values(queries, (B, T, kv_heads * group, D), generator),
        # scores of large q and large k lose eps · |score| to an fp32 lse in every flash kernel, torch's own included
        "k": values(
            draw(st.sampled_from(VALUE_KINDS)) if kind not in LARGE_KINDS else "normal",
            (B, S, kv_heads, D),
            generator,
        ),
        "v": values(of_values, (B, S, kv_heads, V), generator),
    }
    H = kv_heads * group
    scores = draw(st.one_of(st.just(frozenset[str]()), st.frozensets(st.sampled_from(SCORE_OPTIONS), min_size=1)))
    if "sinks" in scores:
        tensors["sinks"] = values("normal", (H,), generator) * draw(st.sampled_from([1, 10]))
    if "alibi" in scores:
        tensors["alibi_slopes"] = torch.rand(H, generator=generator, dtype=torch.float64)
    options = AttentionOptions(
        pattern=draw(PATTERNS),
        # of wide heads a smaller one: where scores leave one key alone, gradients are less than the budget rounds
        scale=draw(st.sampled_from([None, 0.05 if widths is WIDE else 0.2])),
        softcap=draw(st.sampled_from([2.0, 30.0])) if "softcap" in scores else None,
        layer=draw(st.sampled_from([0, 3])),
    )
    return Case(OPERATOR, tensors, options, causal=options.pattern.causal)


# --- policies -----------------------------------------------------------------------------------------------------

_blocks, _few, _many = st.integers(1, 8), st.integers(0, 4), st.integers(1, 8) | st.integers(1, 24)
_causal = {"causal": st.booleans()}
PATTERN_OPTIONS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "causal": ({}, {}),
    "full": ({}, {}),
    "sliding_window": ({"window": _many}, {"global_tokens": _few, **_causal}),
    "strided": ({"stride": _blocks, "window": _blocks}, {"block_size": _blocks, **_causal}),
    "local_global": ({"block_size": _blocks, "local_blocks": st.integers(1, 3)}, {"global_blocks": _few, **_causal}),
    "random": (
        {"block_size": _blocks, "random_blocks": st.integers(1, 3)},
        {"local_blocks": st.integers(1, 3), "global_blocks": _few, "seed": st.integers(0, 99), **_causal},
    ),
    "chunked": ({"chunk": _many}, {}),
}
"""kind → the options it needs, and those it takes"""
LEAST = {"kind": "attention", "num_attention_heads": 1}


def patterns(wanted: Wanted) -> st.SearchStrategy[Options]:
    """Patterns as a spec holds them, of every kind that is built, or of the kind of `wanted.like` alone."""
    kinds = [wanted.like.get("pattern", {}).get("kind", "causal")] if wanted.like else list(PATTERN_OPTIONS)
    probes = [{"kind": kind, **dict.fromkeys(PATTERN_OPTIONS[kind][0], 1)} for kind in kinds]
    offered = [probe["kind"] for probe in wanted.offered(LEAST, "pattern", probes)]
    return st.sampled_from(offered).flatmap(
        lambda kind: st.fixed_dictionaries(
            {"kind": st.just(kind), **PATTERN_OPTIONS[kind][0]}, optional=dict(PATTERN_OPTIONS[kind][1])
        )
    )


@st.composite
def policies(draw: st.DrawFn, wanted: Wanted) -> Options:
    """Every option that is built, in all combinations."""
    options: Options = {"kind": "attention", **draw(heads(wanted.hidden_size))}
    count, width = options["num_attention_heads"], head_width(options, wanted.hidden_size)
    options |= draw(among("num_key_value_heads", [n for n in (1, 2, 4) if count % n == 0]))
    widths = wanted.offered({**LEAST, "head_dim": 8}, "v_head_dim", [12, 8, 4])
    options |= draw(among("v_head_dim", widths if len(widths) > 1 else [width]))
    options |= draw(rotary(wanted, LEAST, width))
    pattern = draw(patterns(wanted))
    options |= {} if pattern == {"kind": "causal"} and not draw(st.booleans()) else {"pattern": pattern}
    for name, choices in (
        ("attention_bias", ["none", "qkv", "all"]),
        ("qk_norm", ["none", "rms", "l2"]),
        ("query_pre_attn_scalar", [4.0, 40.0]),
        ("attn_logit_softcapping", [2.0, 0.5]),
        ("alibi", [True, False]),
        ("sinks", [True, False]),
        ("attention_dropout", [0.25, 0.0]),
    ):
        options |= draw(wanted.group([name], among(name, wanted.offered(LEAST, name, choices))))
    return options


CASES = Cases(
    draw=plain,
    extras=extras,
    wide=partial(extras, WIDE),
    policies=policies,
    patterns=patterns,
    bench=(
        {"B": 1, "T": 4096, "H": 8, "K": 8, "D": 64, "pattern": {"kind": "sliding_window", "window": 256}},
        {"B": 4, "T": 512, "H": 8, "K": 8, "D": 32, "pattern": {"kind": "causal"}},
    ),
)
