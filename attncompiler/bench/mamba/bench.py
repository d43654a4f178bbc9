"""Mamba's bench: what its rows count, how they compare, and all its parts in one."""

from __future__ import annotations

from attncompiler.bench.grid import linear_time
from attncompiler.bench.grid.bench import Bench
from attncompiler.bench.grid.cells import Count
from attncompiler.bench.grid.contestants import AUTO
from attncompiler.bench.mamba.contestants import member, members, planned
from attncompiler.bench.mamba.inputs import Inputs
from attncompiler.bench.mamba.peers import peers
from attncompiler.bench.mamba.rows import CPU, CUDA, Row


def rows(device_type: str) -> tuple[Row, ...]:
    """What is measured on a kind of device."""
    return CUDA if device_type == "cuda" else CPU


def count(row: Row, itemsize: int) -> Count:
    """FLOPs of the recurrence, the bytes that must move, and the tokens."""
    return linear_time.count(row.mechanism, row, {}, itemsize)


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
    packages={"triton": "triton", "mamba_ssm": "mamba-ssm", "causal_conv1d": "causal-conv1d"},
    compared=linear_time.per_token,
)
