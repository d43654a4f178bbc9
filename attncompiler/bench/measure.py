"""Timing in turns, and the memory of a process that does one thing."""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

Work = Callable[[], object]


@dataclass(frozen=True)
class Samples:
    """Times of one side, in seconds, in the order they were taken."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def fastest(self) -> float:
        return min(self.seconds)

    @property
    def slowest(self) -> float:
        return max(self.seconds)

    @property
    def spread(self) -> float:
        """How far the middle half of the samples lies apart, as a share of the median; 0 for fewer than two."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median

    def scaled(self, factor: float) -> Samples:
        """The same samples in another unit: per token, or in milliseconds."""
        return Samples(tuple(second * factor for second in self.seconds))


@dataclass(frozen=True)
class Comparison:
    """Two sides whose samples were taken in turns: sample i of one stands beside sample i of the other."""

    ours: Samples
    peer: Samples

    @property
    def ratio(self) -> float:
        """How many times faster ours is: the peer's median over ours. Above 1 ours is faster."""
        return self.peer.median / self.ours.median

    @property
    def spread(self) -> tuple[float, float]:
        """The smallest and largest ratio of a single turn."""
        ratios = [peer / ours for ours, peer in zip(self.ours.seconds, self.peer.seconds, strict=True)]
        return min(ratios), max(ratios)


def interleave(sides: Mapping[str, Work], repeats: int, warmup: int = 1) -> dict[str, Samples]:
    """Time every side `repeats` times, in turns, after `warmup` untimed turns.

    Every other turn runs backwards, so that what drifts (heat, other processes) favours no side. Work on a CUDA device
    is waited for. Raises ValueError when nothing is to be timed.
    """
    if repeats < 1 or not sides:
        raise ValueError("there must be a side to time, at least once")
    for _ in range(warmup):
        for work in sides.values():
            work()
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats):
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            taken[name].append(_time(sides[name]))
    return {name: Samples(tuple(seconds)) for name, seconds in taken.items()}


def compare(ours: Work, peer: Work, repeats: int, warmup: int = 1) -> Comparison:
    """Time two sides in turns."""
    samples = interleave({"ours": ours, "peer": peer}, repeats, warmup)
    return Comparison(samples["ours"], samples["peer"])


def peak_bytes(prepare: Callable[..., Work], arguments: Sequence[object], small: Sequence[object]) -> int:
    """How far the memory of a fresh process rises while it runs what `prepare(*arguments)` returned.

    `prepare(*small)` is run before it, so that what libraries load at their first use is not counted; nor is what
    `prepare` allocates. Where the system cannot forget a peak (Linux can), work that needs less than its preparation
    shows less than it needs. `prepare` must be a function of a module; the new process has as many threads as this one.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_rise, torch.get_num_threads(), prepare, arguments, small).result()


def resident_peak() -> int:
    """The most bytes that this process has had in main memory since it began, or since `forget_peak`.

    Linux' `ru_maxrss` begins at what the parent had when it started this process, so its own account is read there.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """Let `resident_peak` begin again at what is held now, where the system offers that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _time(work: Work) -> float:
    _wait()
    start = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _rise(threads: int, prepare: Callable[..., Work], arguments: Sequence[object], small: Sequence[object]) -> int:
    torch.set_num_threads(threads)
    prepare(*small)()
    work = prepare(*arguments)
    forget_peak()
    before = resident_peak()
    work()
    return resident_peak() - before
