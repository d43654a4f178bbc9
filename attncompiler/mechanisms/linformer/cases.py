"""Hypothesis strategies for Linformer's calls, and its benchmark shapes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from hypothesis import strategies as st

from attncompiler.mechanisms.case import (
    LARGE_KINDS,
    VALUE_KINDS,
    Case,
    Cases,
    Options,
    Wanted,
    among,
    heads,
    one_large,
    values,
)
from attncompiler.mechanisms.linformer.op import OPERATOR, LinformerOptions

COLUMNS = 160
"""of every projection: more than any drawn sequence is long, so that laws may lengthen one"""

NARROW, WIDE = (8, 16, 20), (64, 128, 256)
"""of heads"""


@st.composite
def plain(draw: st.DrawFn, min_length: int = 1) -> Case:
    """T = S, no padding."""
    T = draw(st.integers(min_length, 70))
    return _make(draw, T, T)


@st.composite
def extras(draw: st.DrawFn, widths: Sequence[int] = NARROW) -> Case:
    """Lengths that differ, packed segments, and padding on either side."""
    S = draw(st.integers(1, 70))
    T = draw(st.integers(1, S))
    case = _make(draw, T, S, widths)
    B, index = case.tensors["q"].shape[0], torch.arange(S)
    added = {}
    if draw(st.booleans()):
        cuts = torch.tensor(draw(st.lists(st.integers(1, 70), min_size=1, max_size=4)))
        added["segment_ids"] = (index[:, None] >= cuts).sum(1).expand(B, S).contiguous()
    if draw(st.booleans()):
        left = draw(st.booleans())
        counts = [draw(st.integers(0, S)) for _ in range(B)]
        added["attention_mask"] = torch.stack([(index >= n) if left else (index < S - n) for n in counts])
    return case.given(**added)


def _make(draw: st.DrawFn, T: int, S: int, widths: Sequence[int] = NARROW) -> Case:
    B, H, D = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from(widths))
    V = draw(st.sampled_from([D, D, 12]))
    R = draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    kinds = [draw(st.sampled_from(VALUE_KINDS)) for _ in range(3)]
    if widths is WIDE:
        kinds = one_large(*kinds)
    elif kinds[0] in LARGE_KINDS and kinds[1] in LARGE_KINDS:
        # the gradient of key_projection multiplies a score's rounding by queries and by keys; the budget allows for one
        kinds[0] = "normal"
    shared = draw(st.sampled_from(["none", "heads", "kv"]))
    shape = (H, R, COLUMNS) if shared == "none" else (R, COLUMNS)
    # of variance 1/S, so that projected keys are as large as keys are, and scores no larger than attention's
    key_projection = values("normal", shape, generator) * S**-0.5
    tensors = {
        "q": values(kinds[0], (B, T, H, D), generator),
        "k": values(kinds[1], (B, S, H, D), generator),
        "v": values(kinds[2], (B, S, H, V), generator),
        "key_projection": key_projection,
        "value_projection": key_projection.clone() if shared == "kv" else values("normal", shape, generator) * S**-0.5,
    }
    return Case(OPERATOR, tensors, LinformerOptions(), causal=False)


# --- policies -----------------------------------------------------------------------------------------------------


@st.composite
def policies(draw: st.DrawFn, wanted: Wanted) -> Options:
    """Every option, in all combinations; `causal` has one value that is valid."""
    options: Options = {
        "kind": "linformer",
        **draw(heads(wanted.hidden_size)),
        "projected_length": draw(st.integers(1, 12)),
    }
    for name, choices in (
        ("share", ["none", "heads", "kv"]),
        ("attention_bias", ["none", "qkv", "all"]),
        ("causal", [False]),
    ):
        options |= draw(wanted.group([name], among(name, choices)))
    return options


CASES = Cases(
    draw=plain,
    extras=extras,
    wide=partial(extras, WIDE),
    policies=policies,
    bench=(
        {"B": 1, "T": 4096, "H": 8, "D": 64, "R": 256},
        {"B": 4, "T": 512, "H": 8, "D": 32, "R": 64},
    ),
)
