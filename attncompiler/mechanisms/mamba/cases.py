"""Hypothesis strategies for Mamba's calls, and its benchmark shapes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st

from attncompiler.mechanisms.case import VALUE_KINDS, Case, Cases, Options, Wanted, among, perhaps, values
from attncompiler.mechanisms.mamba.op import OPERATOR, MambaOptions

NARROW, WIDE = (1, 4, 5), (16, 100, 256)
"""numbers of a channel's state"""


@st.composite
def plain(draw: st.DrawFn, min_length: int = 1) -> Case:
    """No segments, no padding, no initial state."""
    return _make(draw, draw(st.integers(min_length, 70)))


@st.composite
def extras(draw: st.DrawFn, states: Sequence[int] = NARROW) -> Case:
    """An initial state, packed segments, padding on either side or amid."""
    case = _make(draw, draw(st.integers(1, 40)), states)
    B, T, E = case.tensors["u"].shape
    added: dict[str, Any] = {}
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        state = values(draw(st.sampled_from(VALUE_KINDS)), (B, E, case.tensors["a"].shape[1]), generator)
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


def _make(draw: st.DrawFn, T: int, states: Sequence[int] = NARROW) -> Case:
    """Decays A are negative; without softplus the time steps are positive, so that no state grows without end."""
    B, N = draw(st.integers(1, 2)), draw(st.sampled_from(states))
    groups, width = draw(st.sampled_from([(1, 3), (1, 8), (2, 4), (3, 1)]))
    E = groups * width
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def drawn(*shape: int) -> torch.Tensor:
        return values(draw(st.sampled_from(VALUE_KINDS)), shape, generator)

    softplus = draw(st.booleans())
    tensors = {
        "u": drawn(B, T, E),
        "dt": drawn(B, T, E) if softplus else drawn(B, T, E).abs(),
        "a": -torch.rand(E, N, generator=generator, dtype=torch.float64) * draw(st.sampled_from([0.1, 1.0, 16.0])),
        "b": drawn(B, T, groups, N),
        "c": drawn(B, T, groups, N),
    }
    if draw(st.booleans()):
        tensors["d"] = drawn(E)
    if draw(st.booleans()):
        tensors["z"] = drawn(B, T, E)
    if draw(st.booleans()):
        tensors["dt_bias"] = drawn(E) if softplus else drawn(E).abs()
    return Case(OPERATOR, tensors, MambaOptions(dt_softplus=softplus), causal=True)


# --- policies -----------------------------------------------------------------------------------------------------


@st.composite
def policies(draw: st.DrawFn, wanted: Wanted) -> Options:
    """Every option, in all combinations."""
    options: Options = {"kind": "mamba", "state_size": draw(st.sampled_from([1, 4, 16]))}
    sizes = {"conv_kernel": st.integers(1, 5), "expand": st.integers(1, 3)}
    options |= draw(perhaps(**sizes, time_step_rank=st.one_of(st.just("auto"), st.integers(1, 4))))
    options |= draw(wanted.group(STEPS, perhaps(**STEPS)))
    for name, choices in (
        ("use_conv_bias", [True, False]),
        ("use_bias", [True, False]),
        ("hidden_act", ["silu"]),
        ("dt_bc_norm", [True, False]),
        ("time_step_scale", [2.0]),
        ("time_step_init_scheme", ["random", "constant"]),
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
    bench=({"B": 1, "T": 4096, "E": 512, "N": 16}, {"B": 4, "T": 512, "E": 512, "N": 16}),
)
