"""Mamba's bench: what its rows count, how they compare, and all its parts in one."""

from __future__ import annotations

from attncompiler.bench.grid import linear_time, ours
from attncompiler.bench.grid.bench import Bench
from attncompiler.bench.grid.cells import Count
from attncompiler.bench.grid.contestants import AUTO
from attncompiler.bench.mamba.contestants import member, members, planned
from attncompiler.bench.mamba.inputs import Inputs
from attncompiler.bench.mamba.peers import peers
from attncompiler.bench.mamba.rows import CPU, CUDA, Mixer, Row
from attncompiler.mechanisms.base import MixerSize, load_entry


def rows(device_type: str) -> tuple[Row, ...]:
    """What is measured on a kind of device."""
    return CUDA if device_type == "cuda" else CPU


def count(row: Row, itemsize: int) -> Count:
    """FLOPs of the recurrence, of a mixer with those of its projections, the bytes that must move, and the tokens."""
    if not isinstance(row, Mixer):
        return linear_time.count(row.mechanism, row, {}, itemsize)
    mechanism = ours.mechanism(row.mechanism)
    size = MixerSize(row.M, row.T, row.B, row.T, itemsize, kernel="")
    cost = load_entry(mechanism.cost)(mechanism.policy.model_validate(row.fields), size)
    return linear_time.counted(row, (cost.forward_flops, cost.backward_flops), itemsize)


BENCH = Bench(
    rows=rows,
    inputs=Inputs,
    members=members,
    peers=peers,
    auto=member(AUTO),
    planned=planned,
    count=count,
    unit=linear_time.unit,
    facts=linear_time.facts,
    packages={
        "triton": "triton",
        "mamba_ssm": "mamba-ssm",
        "causal_conv1d": "causal-conv1d",
        "transformers": "transformers",
    },
    compared=linear_time.per_token,
)
