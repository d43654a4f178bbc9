"""Linear attention's bench: what its rows count, how they compare, and all its parts in one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from attncompiler.bench.grid import linear_time
from attncompiler.bench.grid.bench import Bench, Comparison
from attncompiler.bench.grid.cells import Count, Measured
from attncompiler.bench.grid.contestants import AUTO
from attncompiler.bench.linear.contestants import NAME, member, members, planned
from attncompiler.bench.linear.inputs import Inputs
from attncompiler.bench.linear.peers import peers
from attncompiler.bench.linear.rows import CPU, CUDA, Row


def rows(device_type: str) -> tuple[Row, ...]:
    """What is measured on a kind of device."""
    return CUDA if device_type == "cuda" else CPU


def count(row: Row, itemsize: int) -> Count:
    """FLOPs of the recurrence, the bytes that must move, and the tokens."""
    return linear_time.count(NAME, row, row.options, itemsize)


def compared(results: Sequence[Measured]) -> Iterator[Comparison]:
    """The Performer beside the Linear Transformer with a state of as many numbers; time per token by length."""
    held = [result for result in results if result.row.group == "favor"]
    for one, other in product(held, held):
        if (one.row.feature_map, other.row.feature_map) == ("favor", "elu"):
            words = f"{one.row.id} takes, times what {other.row.name} of an equal state takes"
            if ratio := linear_time.times(one, other):
                yield Comparison(words, ratio)
    yield from linear_time.per_token(results)


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
    packages={"triton": "triton", "fla": "flash-linear-attention"},
    compared=compared,
)
