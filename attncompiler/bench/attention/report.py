"""Results as tables for people, and as data for machines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attncompiler.bench.attention.contestants import AUTO
from attncompiler.bench.attention.grid import Cell, Measured, Problem, Way
from attncompiler.bench.measure import Samples
from attncompiler.bench.report import mib

BEST, NEAR = "FA2", 0.97
"""the peer whose ratio is given beside that to the best; the share of the best member's speed that a plan must have"""
WAYS: tuple[Way, ...] = ("forward", "both")
BOTH = 3.5
"""FLOPs of forward and backward over those of the forward"""
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


def median(cell: Cell | None, way: str) -> float | None:
    """Seconds, where there are some."""
    taken = getattr(cell, way, None)
    return taken.median if isinstance(taken, Samples) else None


def ratios(result: Measured) -> dict[str, dict[str, float | None]]:
    """How fast the planned kernel is, as a share: of the best peer, of FA2, and of the best member; by way."""
    found: dict[str, dict[str, float | None]] = {"best_peer": {}, "fa2": {}, "best_member": {}}
    for way in WAYS:
        ours = median(result.plan, way)
        times = {name: seconds for name, cell in result.cells.items() if (seconds := median(cell, way))}
        peers = {name: seconds for name, seconds in times.items() if result.cells[name].role == "peer"}
        against = {
            "best_peer": min(peers.values(), default=None),
            "fa2": peers.get(BEST),
            "best_member": min((seconds for name, seconds in times.items() if name not in peers), default=None),
        }
        for name, theirs in against.items():
            found[name][way] = theirs / ours if ours and theirs else None
        if against["best_member"] and not ours:
            found["best_member"][way] = 0.0  # a kernel runs, and what is planned does not
    return found


def short_of(result: Measured) -> tuple[str, ...]:
    """The ways in which the planned kernel is more than 3% slower than the best member."""
    return tuple(way for way, ratio in ratios(result)["best_member"].items() if ratio is not None and ratio < NEAR)


# --- for people ---------------------------------------------------------------------------------------------------


def tables(group: str, results: Sequence[Measured], copy_rate: float | None) -> Iterator[Table]:
    """Of one group: the speed of everyone, how the planned kernel compares, and why cells are empty."""
    unit, scale = ("GB/s", 1e9) if copy_rate else _unit(results)
    names = list(dict.fromkeys(name for result in results for name in result.cells))
    timed = [name for name in names if any(median(result.cells.get(name), "forward") for result in results)]
    backward = any(result.row.backward for result in results)
    speeds = []
    for result in results:
        cells = [_speeds(result, result.cells.get(name), scale, decode=bool(copy_rate)) for name in timed]
        speeds.append((result.row.name, *cells))
    what = "forward / forward + backward" if backward else "forward"
    beside = f", of k and v read; a copy moves {copy_rate / 1e9:,.0f}" if copy_rate else ""
    yield Table(f"{group}: {unit}, {what}{beside}", (group, *timed), tuple(speeds), tuple(timed))
    yield _verdicts(group, results)
    notes = tuple(_notes(results))
    if notes:
        yield Table("", ("without a time", "what", "in", "because"), notes)


def _unit(results: Sequence[Measured]) -> tuple[str, float]:
    rates = [result.flops / seconds for result in results if (seconds := median(result.plan, "forward"))]
    return ("TFLOP/s", 1e12) if max(rates, default=0) > 2e12 else ("GFLOP/s", 1e9)


def _speeds(result: Measured, cell: Cell | None, scale: float, *, decode: bool) -> str:
    if cell is None:
        return ""
    work: dict[str, float] = {"forward": result.flops, "both": BOTH * result.flops}
    if decode:
        work = {"forward": result.key_bytes}
    shown = [
        _speed(getattr(cell, way), amount / scale) for way, amount in work.items() if getattr(cell, way) is not None
    ]
    return shown[0] if len(set(shown)) == 1 and shown[0] in SHORT.values() else "/".join(shown)


def _speed(taken: Samples | Problem, work: float) -> str:
    if isinstance(taken, Problem):
        return SHORT[taken.kind]
    return _digits(work / taken.median)


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _verdicts(group: str, results: Sequence[Measured]) -> Table:
    """A line for each row; what nobody has (memory on a CPU, peers that were not asked) has no column."""
    lines = [_verdict(result) for result in results]
    heads = [head for head in lines[0] if any(line[head] != NOTHING for line in lines)]
    return Table(
        "", (group, *heads[1:]), tuple(tuple(line[head] for head in heads) for line in lines), tuple(heads[2:])
    )


def _verdict(result: Measured) -> dict[str, str]:
    found, plan = ratios(result), result.plan
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
        f"over {BEST}": _pair(found["fa2"]),
        "MiB": _mib(plan),
        "best peer's": _mib(best),
    }


def _planned(plan: Cell | None, shown: Callable[[Samples], str]) -> str:
    """Both ways of the planned kernel."""
    taken = [getattr(plan, way, None) for way in WAYS]
    known = [SHORT[each.kind] if isinstance(each, Problem) else shown(each) for each in taken if each is not None]
    return " / ".join(known) or NOTHING


def _pair(by_way: Mapping[str, float | None]) -> str:
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


# --- for machines -------------------------------------------------------------------------------------------------


def as_data(result: Measured) -> dict[str, Any]:
    """Everything of one row."""
    row = result.row
    return {
        "row": row.id,
        **{name: getattr(row, name) for name in ("B", "T", "S", "H", "K", "D", "layout")},
        "lengths": list(row.lengths),
        "pattern": dict(row.pattern),
        "pairs": result.pairs,
        "forward_flops": result.flops,
        "key_bytes": result.key_bytes,
        "planned": result.chain[0] if result.chain else None,
        "chain": list(result.chain),
        "planned_backward": result.backward[0] if result.backward else None,
        "cells": {name: _cell_data(cell, result.flops) for name, cell in result.cells.items()},
        "planned_over": ratios(result),
        "short_of_best_member": list(short_of(result)),
        "device_lost": result.lost,
    }


def _cell_data(cell: Cell, flops: int) -> dict[str, Any]:
    ways = {"forward": flops, "both": BOTH * flops}
    return {
        "role": cell.role,
        **{way: _taken_data(getattr(cell, way), work) for way, work in ways.items()},
        "peak_bytes": cell.peak_bytes,
        "host_seconds": dict(cell.host),
    }


def _taken_data(taken: Samples | Problem | None, work: float) -> dict[str, Any] | None:
    if isinstance(taken, Problem):
        return {"problem": taken.kind, "reason": taken.reason}
    if taken is None:
        return None
    return {
        "seconds": taken.median,
        "fastest": taken.fastest,
        "slowest": taken.slowest,
        "spread": taken.spread,
        "turns": len(taken.seconds),
        "flops_per_second": work / taken.median,
    }
