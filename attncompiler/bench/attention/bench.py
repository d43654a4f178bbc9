"""Attention's bench: what its rows count, in what they are told, and all its parts in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attncompiler.bench.attention.contestants import mechanism, member, members, planned, policy
from attncompiler.bench.attention.inputs import Inputs
from attncompiler.bench.attention.peers import peers
from attncompiler.bench.attention.rows import CPU, CUDA, Row
from attncompiler.bench.grid.bench import Bench
from attncompiler.bench.grid.cells import Count, Measured
from attncompiler.bench.grid.contestants import AUTO
from attncompiler.bench.grid.units import Unit, byte_rate, flop_rate

BOTH = 3.5
"""FLOPs of forward and backward over those of the forward"""


def rows(device_type: str) -> tuple[Row, ...]:
    """What is measured on a kind of device."""
    return CUDA if device_type == "cuda" else CPU


def visible_pairs(row: Row) -> int:
    """Pairs of query and key that see each other, in all sequences, for one head, by the mechanism's own account."""
    sees = mechanism().sees
    assert sees is not None
    if row.step:
        return row.B * row.S
    lengths = row.lengths or (row.T,) * row.B
    return sum(round(sees(policy(row), length)[1] * length**2) for length in lengths)


def count(row: Row, itemsize: int) -> Count:
    """FLOPs: two products for each pair. Forward and backward together are counted as 3.5 times that."""
    flops = 4 * row.H * row.D * visible_pairs(row)
    return Count({"forward": flops, "both": BOTH * flops})


def key_bytes(row: Row, itemsize: int) -> int:
    """Of k and v, which is what a decoding step reads."""
    return 2 * row.B * row.S * row.K * row.D * itemsize


def unit(results: Sequence[Measured], copy_rate: float | None) -> Unit:
    """Decoding steps by what they read, everything else by FLOPs."""
    if copy_rate and results[0].row.step:
        return byte_rate(lambda result, way: key_bytes(result.row, result.itemsize), "k and v read", copy_rate)
    return flop_rate(results)


def facts(result: Measured) -> dict[str, Any]:
    """The row, as data."""
    row = result.row
    return {
        **{name: getattr(row, name) for name in ("B", "T", "S", "H", "K", "D", "layout")},
        "lengths": list(row.lengths),
        "pattern": dict(row.pattern),
        "pairs": visible_pairs(row),
        "forward_flops": result.count.flops["forward"],
        "key_bytes": key_bytes(row, result.itemsize),
    }


BENCH = Bench(
    rows=rows,
    inputs=Inputs,
    members=members,
    peers=peers,
    auto=member(AUTO),
    planned=planned,
    count=count,
    unit=unit,
    facts=facts,
    packages={"triton": "triton", "flash_attn": "flash-attn-4"},
    rival="FA2",
)
