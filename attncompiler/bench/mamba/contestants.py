"""Our kernels of Mamba and Mamba-2, each through the function that users call."""

from __future__ import annotations

from functools import partial
from typing import Any

from attncompiler import ops
from attncompiler.bench.grid import linear_time, ours
from attncompiler.bench.grid.contestants import Call, Contestant
from attncompiler.bench.mamba.inputs import Inputs
from attncompiler.bench.mamba.rows import Row
from attncompiler.mechanisms.base import Direction

EAGER_TOKENS = 256
"""the longest sequence that the references are timed at: their backward of each step is as long as it"""


def members(device_type: str, row: Row) -> tuple[Contestant, ...]:
    """A contestant for each kernel of the row's chain that is built, in its mechanism's order."""
    return ours.members(row.mechanism, device_type, {}, member, peers=("mamba_ssm",))


def member(name: str) -> Contestant:
    """Our kernel of that name, or with `AUTO` the one our operator chooses. A step also gives the state after it."""
    return linear_time.member(name, _prepare, EAGER_TOKENS)


def _prepare(inputs: Any, kernel: str) -> Call:
    row, given = inputs.row, dict(inputs.tensors)
    first, function = ("u", ops.selective_scan) if row.mechanism == "mamba" else ("x", ops.ssd)
    arguments = [given.pop(name) for name in (first, "dt", "a", "b", "c", "d")]
    run = partial(function, *arguments, **given, kernel=kernel)
    if not row.step:
        return Call(run, inputs.leaves)
    return Call(lambda: run(return_state=True)[0], inputs.leaves)


def planned(inputs: Inputs, direction: Direction = "forward") -> tuple[str, ...]:
    """The kernels that `kernel="auto"` would try for this row, the first of which it runs."""
    return ours.planned(inputs.row.mechanism, inputs.tensors, {}, direction)
