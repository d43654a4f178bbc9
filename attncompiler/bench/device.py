"""Time on the device that does the work, with cold caches, and what its memory holds beside the inputs."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

from attncompiler.bench.measure import Samples, Work

FLUSH_BYTES = 2**28
"""more than any last-level cache holds: what is written between two turns, so that no turn finds the last one's data"""
FLUSHES = 16
"""How often: about 1 ms on a large GPU, in which the host can prepare what is timed, as it does in a training step."""

COPIED = {"cuda": 2**31, "cpu": 2**28}
"""bytes, read and written, of the longest copy that is timed"""


class Clock:
    """Times work on one device: CUDA devices by their own events, the CPU by the process's clock."""

    def __init__(self, device: str):
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self.device) if self.cuda else None

    def turn(self, work: Work) -> Callable[[], float]:
        """Do the work once; what is returned gives its seconds, once `wait` has been called."""
        if self._flush is None:
            begun = time.perf_counter()
            work()
            taken = time.perf_counter() - begun
            return lambda: taken
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(FLUSHES):
            self._flush.zero_()
        start.record()
        work()
        end.record()
        return lambda: start.elapsed_time(end) / 1e3

    def once(self, work: Work) -> float:
        """Seconds of one turn."""
        read = self.turn(work)
        self.wait()
        return read()

    def host(self, work: Work) -> float | None:
        """Seconds until the host has handed the work over, the median of some; None on a CPU, which does it itself."""
        if not self.cuda:
            return None
        taken = []
        for _ in range(9):
            self.wait()
            begun = time.perf_counter()
            work()
            taken.append(time.perf_counter() - begun)
        return Samples(tuple(taken)).median

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def peak(self, work: Work) -> int | None:
        """Bytes that the work holds at most beside what was held before it; None on a CPU, which keeps no account."""
        return self.once_held(work)[1]

    def once_held(self, work: Work) -> tuple[float, int | None]:
        """Seconds of one turn, and its peak: what takes long need not be done twice to know both."""
        if not self.cuda:
            return self.once(work), None
        self.wait()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        return self.once(work), torch.cuda.max_memory_allocated(self.device) - before

    def free(self) -> None:
        """Give back what nothing refers to any more."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def lost(self) -> str | None:
        """Why the device can do no more work in this process, in words; None while it can."""
        try:
            self.wait()
        except RuntimeError as error:
            return str(error).partition("\n")[0]
        return None

    def copy(self, moved: int) -> float:
        """Seconds of a copy that reads and writes so many bytes together, the median of some turns; beyond `COPIED`,
        from where on it takes as long a byte, it is that of as many in proportion."""
        most = COPIED["cuda" if self.cuda else "cpu"]
        size = max(1, min(moved, most) // 2)
        there, here = (torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2))
        here.fill_(1)

        def copy() -> Any:
            return there.copy_(here)

        self.once(copy)
        return Samples(tuple(self.once(copy) for _ in range(9))).median * moved / (2 * size)

    def copy_rate(self) -> float:
        """Bytes a second that a long copy on the device reads and writes."""
        moved = COPIED["cuda" if self.cuda else "cpu"]
        return moved / self.copy(moved)
