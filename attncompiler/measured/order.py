"""The order of kernels that a mechanism gives, refined by what was measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from attncompiler.measured.table import Bucket, Entry, Times

LAST = ("eager", "host")
"""the tiers that answer when nothing else can: they keep their places, whatever they took"""


@dataclass(frozen=True, slots=True)
class Order:
    """Kernels, best first, and the entry that says so; None where it is the mechanism's own order."""

    kernels: tuple[str, ...]
    by: Entry | None = None


def ordered(static: tuple[str, ...], mechanism: str, bucket: Bucket, entries: Iterable[Entry]) -> Order:
    """`static`, a mechanism's own order, with the kernels that were measured in the nearest bucket sorted.

    They are sorted by how far each is behind the best at worst: in the forward alone, or in forward and backward
    together. So the first of them is near the best in both, where one kernel is: a model is trained and asked by the
    same chain. A decoding step is sorted by its forward. Kernels that are as good keep the static order.

    A kernel that was not measured keeps its place, the measured ones take the others: (a, b, c, d) with times for a, c
    and d becomes (d, b, a, c) when d is best and c worst. `LAST` keep theirs too.
    """
    found = nearest(mechanism, bucket, entries)
    if found is None:
        return Order(static)
    times = {
        name: ways
        for name in static
        if name not in LAST and (time := found.kernels.get(name)) and (ways := _ways(time, bucket))
    }
    if len(times) < 2:
        return Order(static)
    best = [min(way) for way in zip(*times.values(), strict=True)]
    behind = {name: max(way / least for way, least in zip(ways, best, strict=True)) for name, ways in times.items()}
    first = iter(sorted(behind, key=behind.__getitem__))
    return Order(tuple(next(first) if name in times else name for name in static), found)


def nearest(mechanism: str, bucket: Bucket, entries: Iterable[Entry]) -> Entry | None:
    """The entry of the same dtype, kind and step whose levels are nearest, compared in the order in which they stand.

    Of two that are equally near, the one of the larger levels; None where there is none.
    """
    like = [
        entry
        for entry in entries
        if entry.mechanism == mechanism
        and (entry.bucket.dtype, entry.bucket.kind, entry.bucket.step) == (bucket.dtype, bucket.kind, bucket.step)
        and entry.bucket.levels.keys() == bucket.levels.keys()
    ]

    def distance(entry: Entry) -> list[tuple[int, int]]:
        there = entry.bucket.levels
        return [(abs(there[name] - level), -there[name]) for name, level in bucket.levels.items()]

    return min(like, key=distance, default=None)


def _ways(times: Times, bucket: Bucket) -> tuple[float, ...]:
    """The seconds that decide; none where the backward does and was not measured."""
    if bucket.step:
        return (times.forward,)
    return () if times.both is None else (times.forward, times.both)
