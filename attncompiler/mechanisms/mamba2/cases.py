"""Hypothesis strategies for Mamba-2's calls, and its benchmark shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st

from attncompiler.mechanisms.case import VALUE_KINDS, Case, Cases, Options, Wanted, among, perhaps, values
from attncompiler.mechanisms.mamba2.op import OPERATOR, Mamba2Options


class Widths(NamedTuple):
    """Numbers of a channel's state, and channels of a head."""

    states: Sequence[int]
    heads: Sequence[int]


NARROW, WIDE = Widths((1, 4, 5), (1, 4, 6)), Widths((64, 128, 256), (16, 64, 128))


@st.composite
def plain(draw: st.DrawFn, min_length: int = 1) -> Case:
    """No segments, no padding, no initial state."""
    return _make(draw, draw(st.integers(min_length, 70)))


@st.composite
def extras(draw: st.DrawFn, widths: Widths = NARROW) -> Case:
    """An initial state, packed segments, padding on either side or amid."""
    case = _make(draw, draw(st.integers(1, 40)), widths)
    B, T, H, P = case.tensors["x"].shape
    added: dict[str, Any] = {}
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        state = values(draw(st.sampled_from(VALUE_KINDS)), (B, H, P, case.tensors["b"].shape[3]), generator)
        added["initial_state"] = state
    if draw(st.booleans()):
        cuts = torch.tensor([draw(st.integers(0, T)) for _ in range(2)])
        added["segment_ids"] = (torch.arange(T)[:, None] >= cuts).sum(1).expand(B, T).contiguous()
    if draw(st.booleans()):
        index = torch.arange(T)
        bounds = [sorted((draw(st.integers(0, T)), draw(st.integers(0, T)))) for _ in range(B)]
        inside = torch.stack([(index >= low) & (index < high) for low, high in bounds])
        added["attention_mask"] = inside if draw(st.booleans()) else ~inside
    return case.given(**added)


def _make(draw: st.DrawFn, T: int, widths: Widths = NARROW) -> Case:
    """Decays A are negative; without softplus the time steps are positive, so that no state grows without end."""
    B, N, P = draw(st.integers(1, 2)), draw(st.sampled_from(widths.states)), draw(st.sampled_from(widths.heads))
    H, G = draw(st.sampled_from([(1, 1), (3, 1), (4, 2), (2, 2)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def drawn(*shape: int) -> torch.Tensor:
        return values(draw(st.sampled_from(VALUE_KINDS)), shape, generator)

    softplus = draw(st.booleans())
    tensors = {
        "x": drawn(B, T, H, P),
        "dt": drawn(B, T, H) if softplus else drawn(B, T, H).abs(),
        "a": -torch.rand(H, generator=generator, dtype=torch.float64) * draw(st.sampled_from([0.1, 1.0, 16.0])),
        "b": drawn(B, T, G, N),
        "c": drawn(B, T, G, N),
    }
    if draw(st.booleans()):
        tensors["d"] = drawn(H) if draw(st.booleans()) else drawn(H, P)
    if draw(st.booleans()):
        tensors["z"] = drawn(B, T, H, P)
    if draw(st.booleans()):
        tensors["dt_bias"] = drawn(H) if softplus else drawn(H).abs()
    options = Mamba2Options(
        dt_softplus=softplus,
        dt_limit=draw(st.sampled_from([(0.0, math.inf), (0.0, math.inf), (0.05, 0.7)])),
        chunk_size=draw(st.sampled_from([1, 4, 7, 16, 64])),
    )
    return Case(OPERATOR, tensors, options, causal=True)


# --- policies -----------------------------------------------------------------------------------------------------


@st.composite
def policies(draw: st.DrawFn, wanted: Wanted) -> Options:
    """Every option, in all combinations. Heads of 4 or 8 divide any hidden size that is a multiple of 8."""
    width = draw(st.sampled_from([8, 4]))
    options: Options = {"kind": "mamba2", "head_dim": width, "state_size": draw(st.sampled_from([8, 1, 4]))}
    options |= draw(perhaps(expand=st.integers(1, 2)))
    count = options.get("expand", 2) * wanted.hidden_size // width
    options |= draw(among("num_heads", [count]))
    options |= draw(among("n_groups", [n for n in (1, 2, 4) if count % n == 0]))
    options |= draw(perhaps(conv_kernel=st.integers(1, 5), chunk_size=st.sampled_from([1, 4, 7, 64])))
    options |= draw(wanted.group(STEPS, perhaps(**STEPS)))
    gates = st.sampled_from([{}, {"rms_norm": True}, {"rms_norm": False}, {"norm_before_gate": True}])
    options |= draw(wanted.group(("rms_norm", "norm_before_gate"), gates))
    for name, choices in (
        ("use_conv_bias", [True, False]),
        ("use_bias", [True, False]),
        ("hidden_act", ["silu"]),
        ("time_step_limit", [[0.0, math.inf], [0.05, 0.7]]),
        ("rescale_prenorm_residual", [True, False]),
    ):
        options |= draw(wanted.group([name], among(name, choices)))
    return options


STEPS = {
    "time_step_min": st.sampled_from([0.01, 0.1]),
    "time_step_max": st.sampled_from([0.1, 1.0]),
    "time_step_floor": st.sampled_from([1e-3, 0.05]),
}
"""the range of first time steps; the least is never above the largest"""


CASES = Cases(
    draw=plain,
    extras=extras,
    wide=partial(extras, WIDE),
    policies=policies,
    bench=({"B": 1, "T": 4096, "H": 16, "P": 64, "N": 64}, {"B": 4, "T": 512, "H": 16, "P": 32, "N": 64}),
)
