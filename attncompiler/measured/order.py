"""The order of kernels that a mechanism gives, refined by what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import takewhile

from attncompiler.measured.table import Bucket, Entry, Times

LAST = ("eager", "host")
"""the tiers that answer when nothing else can: they keep their places, whatever they took"""


NEAR = 1.01
"""how much slower one kernel for both directions may be than a pair of kernels that each take one"""


@dataclass(frozen=True, slots=True)
class Order:
    """Kernels, best first, and the entry that says so; None where it is the mechanism's own order."""

    kernels: tuple[str, ...]
    by: Entry | None = None
    backward: str | None = None
    """the kernel whose backward is tried first, where that is not the first of `kernels`"""


def walked(kernels: tuple[str, ...], backward: str | None, direction: str) -> tuple[str, ...]:
    """A chain as a direction walks it: the backward begins with the kernel of its own, where there is one."""
    if direction == "forward" or backward is None:
        return kernels
    return (backward, *(name for name in kernels if name != backward))


def ordered(
    static: tuple[str, ...],
    mechanism: str,
    bucket: Bucket,
    entries: Iterable[Entry],
    serves: Callable[[str], bool] = lambda name: True,
) -> Order:
    """`static`, a mechanism's own order, with the kernels that were measured in the nearest bucket sorted.

    They are sorted by how far each is behind the best at worst: in the forward alone, or in forward and backward
    together. So the first of them is near the best in both, where one kernel is: a model is trained and asked by the
    same chain. Where none is within `NEAR` of the kernel of the fastest forward joined with that of the fastest
    backward, those two serve: the one comes first, the other is `Order.backward`. A decoding step is sorted by its
    forward. Kernels that are as good keep the static order.

    A kernel that was not measured, or does not serve, keeps its place, the measured ones take the others: (a, b, c, d)
    with times for a, c and d becomes (d, b, a, c) when d is best and c worst. `LAST` keep theirs too.
    """
    found = nearest(mechanism, bucket, entries)
    if found is None:
        return Order(static)
    times = {
        name: ways
        for name in static
        if name not in LAST and (time := found.kernels.get(name)) and (ways := _ways(time, bucket)) and serves(name)
    }
    if len(times) < 2:
        return Order(static)
    best = [min(way) for way in zip(*times.values(), strict=True)]
    behind = {name: max(way / least for way, least in zip(ways, best, strict=True)) for name, ways in times.items()}
    by_worst, backward = sorted(behind, key=behind.__getitem__), None
    before = takewhile(lambda name: name not in times, static)
    if not bucket.step and not any(serves(name) for name in before):  # or one that was not measured comes first
        fast = min(times, key=lambda name: times[name][0])
        back = min(times, key=lambda name: times[name][1] - times[name][0])
        pair = times[fast][0], times[fast][0] + times[back][1] - times[back][0]
        if any(one > NEAR * both for one, both in zip(times[by_worst[0]], pair, strict=True)):
            by_worst.remove(fast)
            by_worst.insert(0, fast)
            backward = back
    first = iter(by_worst)
    return Order(tuple(next(first) if name in times else name for name in static), found, backward)


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
