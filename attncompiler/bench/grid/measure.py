"""One row, measured: who takes part is warmed up one by one, then timed in turns, forward and with backward.

What fails in one cell is kept there and stops no other. This is a place where every exception is caught: a peer may
raise anything, and each is shown.
"""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from attncompiler.bench.device import Clock
from attncompiler.bench.grid.bench import Bench
from attncompiler.bench.grid.cells import Cell, Count, Measured, Problem, Way
from attncompiler.bench.grid.contestants import Absent, Call, Contestant, Inputs
from attncompiler.bench.grid.rows import Row
from attncompiler.bench.measure import Samples, Work
from attncompiler.errors import AttnCompilerError

FEWEST, BUDGET, SLOW = 3, 1.0, 2.0
"""turns that a cell has at least; seconds after which it needs no more; seconds of one that is not asked for more"""
LONG = 0.25
"""seconds beside which those of the host are of no interest"""
APART = 0.05
"""how far an output may be from ours, in the root mean square, to be of the same function: many times any rounding"""
COMPARED = 2**26
"""elements that are compared at once: in fp32 they hold as many bytes as the longest rows leave room for"""

Result = TypeVar("Result")


def measure(
    bench: Bench,
    row: Row,
    contestants: Sequence[Contestant],
    clock: Clock,
    dtype: torch.dtype,
    repeats: int,
    only: Collection[str] | None = None,
) -> Measured:
    """The row's cells. At most `repeats` turns each, fewer where a turn takes long.

    With `only`, those of these names take part, and the planned kernel.
    """
    taking = _Row(row, clock)
    inputs = taking.attempt(lambda: bench.inputs(row, str(clock.device), dtype))
    chain: tuple[str, ...] = ()
    back: tuple[str, ...] = ()
    if isinstance(inputs, Problem):
        for contestant in contestants:
            taking.cells[contestant.name] = taking.without(contestant, inputs)
    else:
        chain = bench.planned(inputs, "forward")
        back = bench.planned(inputs, "backward") if row.backward else ()
        for contestant in contestants:
            if only is None or contestant.name in (*only, *chain[:1], *back[:1]):
                taking.warm(contestant, inputs)
        if chain and (back[:1] not in ((), chain[:1]) or not taking.ran(chain[0])):
            taking.warm(bench.auto, inputs)  # what is run is a pair of kernels
        taking.time(repeats)
    count = bench.count(row, dtype.itemsize)
    return Measured(row, dtype.itemsize, count, chain, taking.cells, taking.lost, back, taking.copies(count))


class _Row:
    """A row under way: what is warm, with an estimate of its seconds, and the cells as far as they are known."""

    def __init__(self, row: Row, clock: Clock):
        self.clock = clock
        self.ways: tuple[Way, ...] = ("forward", "both") if row.backward else ("forward",)
        self.cells: dict[str, Cell] = {}
        self.works: dict[Way, dict[str, tuple[Work, float]]] = {way: {} for way in self.ways}
        self.first: Tensor | None = None
        self.lost: str | None = None

    def ran(self, name: str) -> bool:
        return all(name in works for works in self.works.values())

    def without(self, contestant: Contestant, problem: Problem) -> Cell:
        """The cell of a contestant that has no time either way."""
        cell = Cell(contestant.role)
        for way in self.ways:
            cell = cell.given(way, problem)
        return cell

    def warm(self, contestant: Contestant, inputs: Inputs) -> None:
        """Run a contestant some times each way, the last for an estimate; its output must be near the first one's."""
        if self.lost:
            return
        name, cell = contestant.name, Cell(contestant.role)
        call = self.attempt(partial(contestant.prepare, inputs))
        if isinstance(call, Problem):
            self.cells[name] = self.without(contestant, call)
            return
        taken = self.attempt(partial(self._forward, call, inputs))
        if isinstance(taken, Problem):
            self.cells[name] = self.without(contestant, taken)
            return
        seconds, peak = taken
        self.works["forward"][name] = (call.forward, seconds)
        cell = replace(cell, peak_bytes=peak, host=self._host(cell, "forward", call.forward, seconds))
        if "both" in self.ways:
            both = self.attempt(partial(self._both, call, seconds))
            if isinstance(both, Problem):
                cell = replace(cell, both=both)
            else:
                work, seconds, peak = both
                self.works["both"][name] = (work, seconds)
                cell = replace(cell, peak_bytes=peak, host=self._host(cell, "both", work, seconds))
        self.cells[name] = cell

    def _host(self, cell: Cell, way: Way, work: Work, seconds: float) -> Mapping[Way, float]:
        """With the host's time, unless the device takes so long that it is of no interest."""
        taken = self.attempt(partial(self.clock.host, work)) if seconds < LONG else None
        return cell.host if taken is None or isinstance(taken, Problem) else {**cell.host, way: taken}

    def _forward(self, call: Call, inputs: Inputs) -> tuple[float, int | None] | Problem:
        out = inputs.compared(call.ours(call.forward()).detach())
        if self.first is None:
            self.first = out
        apart = _apart(out, self.first)
        if not apart < APART:
            return Problem("another function", f"its output is {apart:.2g} of ours away from it")
        return self.clock.once_held(call.forward)

    def _both(self, call: Call, forward: float) -> tuple[Work, float, int | None] | Problem:
        if forward > SLOW:
            return Problem("too slow", f"its forward took {forward:.1f} s")
        work = call.both()
        work()
        return work, *self.clock.once_held(work)

    def time(self, repeats: int) -> None:
        """Time what is warm, in turns, forward first.

        Each turn is in an order of its own: what a call takes depends on the one before it, by the power that it drew
        and what it left in the cache, by 6% for the same kernel as two contestants with other neighbours.
        """
        order = random.Random(0)
        for way, works in self.works.items():
            wanted = {name: _turns(estimate, repeats) for name, (_, estimate) in works.items()}
            taken: dict[str, list[float]] = {name: [] for name in works}
            most = max(wanted.values(), default=0)
            for turn in range(most):
                due = [name for name in taken if _due(turn, wanted[name], most)]
                order.shuffle(due)
                self._turn(way, due, taken)
            for name, seconds in taken.items():
                samples = Samples(tuple(seconds) or (works[name][1],))
                self.cells[name] = self.cells[name].given(way, samples)

    def copies(self, count: Count) -> dict[Way, float]:
        """Seconds of copies of what must be moved, once all else is done."""
        taken: dict[Way, float] = {}
        for way, size in count.floor.items():
            seconds = None if self.lost else self.attempt(partial(self.clock.copy, size))
            if isinstance(seconds, float):
                taken[way] = seconds
        return taken

    def _turn(self, way: Way, names: Sequence[str], taken: dict[str, list[float]]) -> None:
        """One turn; who fails in it is not timed any more."""
        reads: dict[str, Callable[[], float]] = {}
        for name in names:
            if self.lost:
                return
            read = self.attempt(partial(self.clock.turn, self.works[way][name][0]))
            if isinstance(read, Problem):
                del taken[name]
                self.cells[name] = self.cells[name].given(way, read)
            else:
                reads[name] = read
        if not isinstance(self.attempt(self.clock.wait), Problem):
            for name, read in reads.items():
                taken[name].append(read())

    def attempt(self, what: Callable[[], Result | Problem]) -> Result | Problem:
        """What it gives, or why it does not."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch says of every fused kernel that is refused why, several times
                return what()
        except Exception as error:  # noqa: BLE001 what a peer may raise is not known; it is shown
            problem = _problem(error)
        # outside the handler, whose traceback holds what the failed call had made
        if problem.kind != "absent":
            self.lost = self.lost or self.clock.lost()
        if not self.lost:
            self.clock.free()
        return problem


def _apart(out: Tensor, first: Tensor) -> float:
    """How far an output (B, T, …) is from the first one, as a share of it, in the root mean square.

    Raises ValueError where their shapes differ.
    """
    if out.shape != first.shape:
        raise ValueError(f"its output is {tuple(out.shape)}, where ours is {tuple(first.shape)}")
    step = max(1, COMPARED * out.shape[1] // out.numel())
    squares = torch.zeros(2, dtype=torch.float64, device=out.device)
    for found, ours in zip(out.split(step, 1), first.split(step, 1), strict=True):
        wide = ours.float()
        squares += torch.stack([(found.float() - wide).norm(), wide.norm()]).double().square()
    return float((squares[0] / squares[1]).sqrt())


def _problem(error: Exception) -> Problem:
    """In a word and a line."""
    said = str(error).strip().partition("\n")[0]
    if isinstance(error, Absent):
        return Problem("absent", said)
    if isinstance(error, torch.OutOfMemoryError):
        return Problem("no memory", said.partition(". GPU")[0])
    if isinstance(error, AttnCompilerError):
        message = error.diagnostics[0].message
        return Problem("refused", re.sub(r"^no kernel could run .*? on \w+: \w+: ", "", message))
    if "No available kernel" in said:
        return Problem("refused", "torch offers no such kernel for this call")
    return Problem("failed", f"{type(error).__name__}: {said[:200]}")


def _turns(estimate: float, repeats: int) -> int:
    """How many turns a cell has: none more where one takes very long."""
    return 0 if estimate > SLOW else min(repeats, max(FEWEST, int(BUDGET / estimate)))


def _due(turn: int, count: int, most: int) -> bool:
    """Whether one who has `count` of `most` turns takes part in this one, spread evenly."""
    return (turn + 1) * count // most != turn * count // most
