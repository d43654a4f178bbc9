"""What the benches of mixers whose time is linear in T share: what is counted, in what it is told, how rows compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from itertools import groupby
from typing import Any

from attncompiler.bench.grid import ours
from attncompiler.bench.grid.bench import Comparison
from attncompiler.bench.grid.cells import WAYS, Count, Measured, Way, median
from attncompiler.bench.grid.contestants import Absent, Call, Contestant
from attncompiler.bench.grid.drawn import Drawn
from attncompiler.bench.grid.operands import TimedRow
from attncompiler.bench.grid.units import MILLISECONDS, PER_TOKEN, Unit, byte_rate


def count(mechanism: str, row: TimedRow, options: dict[str, Any], itemsize: int) -> Count:
    """FLOPs by the operator's own account, forward and with backward, the bytes that must move, and the tokens."""
    operator = ours.operator(mechanism)
    return counted(row, operator.flops(row.operands.given, operator.options.model_validate(options)), itemsize)


def counted(row: TimedRow, of_both: tuple[int, int], itemsize: int) -> Count:
    """The same with FLOPs of the forward and of the backward that are known."""
    (forward, backward), floor = of_both, row.operands.floor(itemsize)
    flops: dict[Way, float] = {"forward": forward, "both": forward + backward}
    return Count(flops, {way: floor[way] for way in WAYS if way in row.counted}, row.B * row.T)


def unit(results: Sequence[Measured], copy_rate: float | None) -> Unit:
    """Steps by the states they move, lengths by the token, everything else in milliseconds."""
    row = results[0].row
    if row.step and copy_rate:
        return byte_rate(lambda result, way: result.count.floor[way], "states read and written", copy_rate)
    return PER_TOKEN if row.by_length else MILLISECONDS


def facts(result: Measured) -> dict[str, Any]:
    """The row, as data, and what it comes to."""
    known = {field.name: getattr(result.row, field.name) for field in fields(result.row)}
    work = {"flops": dict(result.count.flops), "floor_bytes": dict(result.count.floor), "tokens": result.count.tokens}
    return {**{name: value for name, value in known.items() if name not in ("group", "name")}, **work}


def member(name: str, prepare: Callable[[Drawn, str], Call], eager_tokens: int) -> Contestant:
    """Our kernel of that name, with what it does; the reference is absent from rows of more than `eager_tokens`."""

    def prepared(inputs: Drawn) -> Call:
        if name == "eager" and eager_tokens < inputs.row.T:
            raise Absent(f"the reference is not timed on more than {eager_tokens:,} tokens")
        return prepare(inputs, name)

    return Contestant(name, "member", prepared)


def per_token(results: Sequence[Measured]) -> Iterator[Comparison]:
    """The largest over the smallest time per token of the planned kernels, in each group that differs in length."""
    lengths = [result for result in results if result.row.by_length]
    for group, rows in groupby(lengths, key=lambda result: result.row.group):
        held = list(rows)
        times: dict[Way, list[float]] = {
            way: [s / (result.count.tokens or 1) for result in held if (s := median(result.plan, way))] for way in WAYS
        }
        found = {way: max(taken) / min(taken) for way, taken in times.items() if len(taken) > 1}
        if found:
            yield Comparison(f"{group}: largest over smallest time per token", found)


def times(one: Measured, other: Measured) -> dict[Way, float]:
    """How many times as long the planned kernel of one row takes as that of the other."""
    taken = {way: (median(one.plan, way), median(other.plan, way)) for way in WAYS}
    return {way: mine / theirs for way, (mine, theirs) in taken.items() if mine and theirs}
