"""Our kernels of linear attention, each through the function that users call."""

from __future__ import annotations

from functools import partial
from typing import Any

from attncompiler.bench.grid import linear_time, ours
from attncompiler.bench.grid.contestants import Call, Contestant
from attncompiler.bench.linear.inputs import Inputs
from attncompiler.bench.linear.rows import Row
from attncompiler.mechanisms.base import Direction
from attncompiler.ops import linear_attention

NAME = "linear_attention"
EAGER_TOKENS = 2048
"""the longest sequence that the reference, which holds all pairs of tokens, is timed at"""


def members(device_type: str, row: Row) -> tuple[Contestant, ...]:
    """A contestant for each kernel of the chain that is built, in the mechanism's order."""
    asked = {"decay": row.decay, "feature_map": row.feature_map}
    return ours.members(NAME, device_type, asked, member, peers=("fla",))


def member(name: str) -> Contestant:
    """Our kernel of that name, or with `AUTO` the one our operator chooses. A step also gives the state after it."""
    return linear_time.member(name, _prepare, EAGER_TOKENS)


def _prepare(inputs: Any, kernel: str) -> Call:
    given = dict(inputs.tensors)
    q, k, v = (given.pop(name) for name in "qkv")
    state = tuple(given.pop(f"initial_{name}") for name in "szm") if inputs.row.step else None
    run = partial(linear_attention, q, k, v, **inputs.row.options, **given, kernel=kernel)
    if state is None:
        return Call(run, inputs.leaves)
    return Call(lambda: run(initial_state=state, return_state=True)[0], inputs.leaves)


def planned(inputs: Inputs, direction: Direction = "forward") -> tuple[str, ...]:
    """The kernels that `kernel="auto"` would try for this row, the first of which it runs."""
    return ours.planned(NAME, inputs.tensors, inputs.row.options, direction)
