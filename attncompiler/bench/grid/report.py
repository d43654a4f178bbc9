"""Results as tables for people, and as data for machines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attncompiler.bench.grid.bench import Bench, Comparison
from attncompiler.bench.grid.cells import WAYS, Cell, Measured, Problem, Way, median
from attncompiler.bench.grid.contestants import AUTO
from attncompiler.bench.grid.units import Unit
from attncompiler.bench.measure import Samples
from attncompiler.bench.report import mib

NEAR = 0.97
"""the share of the best member's speed that a plan must have"""
NOTHING = "–"
SHORT = {
    "refused": NOTHING,
    "absent": NOTHING,
    "no memory": "memory",
    "too slow": "slow",
    "another function": "differs",
    "failed": "failed",
}


@dataclass(frozen=True)
class Table:
    """A title, heads of columns, and rows of text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: tuple[str, ...] = ()
    """the columns of numbers"""


def ratios(result: Measured, rival: str | None = None) -> dict[str, dict[str, float | None]]:
    """How fast the planned kernel is, as a share: of the best peer, of the rival, and of the best member; by way."""
    named = {} if rival is None else {rival: rival.lower()}
    found: dict[str, dict[str, float | None]] = {"best_peer": {}, **{key: {} for key in named.values()}}
    found["best_member"] = {}
    for way in WAYS:
        ours = median(result.plan, way)
        times = {name: seconds for name, cell in result.cells.items() if (seconds := median(cell, way))}
        peers = {name: seconds for name, seconds in times.items() if result.cells[name].role == "peer"}
        against = {
            "best_peer": min(peers.values(), default=None),
            **{key: peers.get(name) for name, key in named.items()},
            "best_member": min((seconds for name, seconds in times.items() if name not in peers), default=None),
        }
        for name, theirs in against.items():
            found[name][way] = theirs / ours if ours and theirs else None
        if against["best_member"] and not ours:
            found["best_member"][way] = 0.0  # a kernel runs, and what is planned does not
    return found


def floor_shares(result: Measured) -> dict[Way, float]:
    """How long a copy of what the row must move takes, as a share of the planned kernel's time; by way."""
    times = {way: (copied, median(result.plan, way)) for way, copied in result.copies.items()}
    return {way: copied / taken for way, (copied, taken) in times.items() if taken}


def short_of(result: Measured) -> tuple[str, ...]:
    """The ways in which the planned kernel is more than 3% slower than the best member."""
    return tuple(way for way, ratio in ratios(result)["best_member"].items() if ratio is not None and ratio < NEAR)


# --- for people ---------------------------------------------------------------------------------------------------


def tables(bench: Bench, group: str, results: Sequence[Measured], copy_rate: float | None) -> Iterator[Table]:
    """Of one group: the speed of everyone, how the planned kernel compares, and why cells are empty.

    `copy_rate` is the bytes a second of a copy, where it was measured.
    """
    unit = bench.unit(results, copy_rate)
    names = list(dict.fromkeys(name for result in results for name in result.cells))
    timed = [name for name in names if any(median(result.cells.get(name), "forward") for result in results)]
    backward = any(result.row.backward for result in results)
    speeds = []
    for result in results:
        speeds.append((result.row.name, *(_speeds(result, result.cells.get(name), unit) for name in timed)))
    what = "forward / forward + backward" if backward else "forward"
    beside = f", {unit.note}" if unit.note else ""
    yield Table(f"{group}: {unit.name}, {what}{beside}", (group, *timed), tuple(speeds), tuple(timed))
    yield _verdicts(bench, group, results)
    notes = tuple(_notes(results))
    if notes:
        yield Table("", ("without a time", "what", "in", "because"), notes)


def _speeds(result: Measured, cell: Cell | None, unit: Unit) -> str:
    if cell is None:
        return ""
    taken = {way: getattr(cell, way) for way in WAYS}
    shown = [
        SHORT[each.kind] if isinstance(each, Problem) else _digits(unit.shown(result, way, each.median))
        for way, each in taken.items()
        if each is not None
    ]
    return shown[0] if len(set(shown)) == 1 and shown[0] in SHORT.values() else "/".join(shown)


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _verdicts(bench: Bench, group: str, results: Sequence[Measured]) -> Table:
    """A line for each row; what nobody has (memory on a CPU, peers that were not asked) has no column."""
    lines = [_verdict(result, bench.rival) for result in results]
    heads = [head for head in lines[0] if any(line[head] != NOTHING for line in lines)]
    return Table(
        "", (group, *heads[1:]), tuple(tuple(line[head] for head in heads) for line in lines), tuple(heads[2:])
    )


def _verdict(result: Measured, rival: str | None) -> dict[str, str]:
    found, plan = ratios(result, rival), result.plan
    name = result.chain[0] if result.chain else "none"
    if AUTO in result.cells:
        apart = result.backward[:1] != result.chain[:1]
        name = f"{name}, backward {result.backward[0]}" if apart and result.backward else f"{name}, mixed"
    peers = [cell for cell in result.cells.values() if cell.role == "peer" and median(cell, "forward")]
    best = min(peers, key=lambda cell: median(cell, "both") or median(cell, "forward") or 0, default=None)
    return {
        "row": result.row.name,
        "planned": name,
        "ms": _planned(plan, lambda taken: f"{1e3 * taken.median:.3g}"),
        "spread": _planned(plan, lambda taken: f"{taken.spread:.0%}"),
        "host ms": _pair({way: 1e3 * plan.host[way] for way in WAYS if way in plan.host} if plan else {}),
        "of best member": _pair(found["best_member"]) + (" !" if short_of(result) else ""),
        "over best peer": _pair(found["best_peer"]),
        **({} if rival is None else {f"over {rival}": _pair(found[rival.lower()])}),
        "of floor": _pair(floor_shares(result)),
        "MiB": _mib(plan),
        "best peer's": _mib(best),
    }


def _planned(plan: Cell | None, shown: Callable[[Samples], str]) -> str:
    """Both ways of the planned kernel."""
    taken = [getattr(plan, way, None) for way in WAYS]
    known = [SHORT[each.kind] if isinstance(each, Problem) else shown(each) for each in taken if each is not None]
    return " / ".join(known) or NOTHING


def _pair(by_way: Mapping[Any, float | None]) -> str:
    known = [f"{ratio:.2f}" for ratio in by_way.values() if ratio is not None]
    return " / ".join(known) or NOTHING


def _mib(cell: Cell | None) -> str:
    return NOTHING if cell is None or cell.peak_bytes is None else f"{mib(cell.peak_bytes):,.0f}"


def _notes(results: Sequence[Measured]) -> Iterator[tuple[str, ...]]:
    """Each reason once, with the rows it holds in."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for result in results:
        for name, cell in result.cells.items():
            problems = dict.fromkeys(taken for taken in (cell.forward, cell.both) if isinstance(taken, Problem))
            for problem in problems:
                where = "" if cell.forward == problem else " (with backward)"
                found.setdefault((name, problem.kind + where, problem.reason), []).append(result.row.name)
    for (name, kind, reason), rows in found.items():
        yield name, kind, "all" if len(rows) == len(results) else ", ".join(rows), reason


def lines(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """Each in words."""
    for comparison in comparisons:
        yield f"{comparison.what}: {_pair(comparison.ratio)}"


# --- for machines -------------------------------------------------------------------------------------------------


def as_data(bench: Bench, result: Measured) -> dict[str, Any]:
    """Everything of one row. Of a bench whose rows have a floor, the seconds of a copy and `share_of_floor`."""
    return {
        "row": result.row.id,
        **bench.facts(result),
        "planned": result.chain[0] if result.chain else None,
        "chain": list(result.chain),
        "planned_backward": result.backward[0] if result.backward else None,
        "cells": {name: _cell_data(cell, result) for name, cell in result.cells.items()},
        "planned_over": ratios(result, bench.rival),
        **({"copy_seconds": dict(result.copies), "share_of_floor": floor_shares(result)} if result.count.floor else {}),
        "short_of_best_member": list(short_of(result)),
        "device_lost": result.lost,
    }


def comparison_data(comparison: Comparison) -> dict[str, Any]:
    """One comparison of rows."""
    return {"what": comparison.what, **{str(way): ratio for way, ratio in comparison.ratio.items()}}


def _cell_data(cell: Cell, result: Measured) -> dict[str, Any]:
    return {
        "role": cell.role,
        **{way: _taken_data(getattr(cell, way), way, result) for way in WAYS},
        "peak_bytes": cell.peak_bytes,
        "host_seconds": dict(cell.host),
    }


def _taken_data(taken: Samples | Problem | None, way: Way, result: Measured) -> dict[str, Any] | None:
    if isinstance(taken, Problem):
        return {"problem": taken.kind, "reason": taken.reason}
    if taken is None:
        return None
    count = result.count
    return {
        "seconds": taken.median,
        "fastest": taken.fastest,
        "slowest": taken.slowest,
        "spread": taken.spread,
        "turns": len(taken.seconds),
        "flops_per_second": count.flops[way] / taken.median,
        **({"bytes_per_second": count.floor[way] / taken.median} if way in count.floor else {}),
        **({"seconds_per_token": taken.median / count.tokens} if count.tokens else {}),
    }
