"""Our kernels of attention, each through the function that users call."""

from __future__ import annotations

from typing import Any

from attncompiler.bench.attention.inputs import Inputs
from attncompiler.bench.attention.rows import Row
from attncompiler.bench.grid import ours
from attncompiler.bench.grid.contestants import Call, Contestant
from attncompiler.mechanisms.base import Direction, Mechanism
from attncompiler.ops import attention

NAME = "attention"


def mechanism() -> Mechanism:
    """Attention, as data."""
    return ours.mechanism(NAME)


def policy(row: Row) -> Any:
    """A policy of the row's pattern, which is what the mechanism counts pairs and finds buckets by."""
    asked = {"kind": NAME, "num_attention_heads": row.H, "pattern": dict(row.pattern)}
    return mechanism().policy.model_validate(asked)


def members(device_type: str, row: Row) -> tuple[Contestant, ...]:
    """A contestant for each kernel of the chain that is built, in the mechanism's order."""
    return ours.members(NAME, device_type, {"pattern": row.pattern["kind"]}, member)


def member(name: str) -> Contestant:
    """Our kernel of that name, or with `AUTO` the one our operator chooses, through the function that users call."""

    def prepare(inputs: Inputs) -> Call:
        q, k, v = inputs.qkv
        pattern, masks = dict(inputs.row.pattern), inputs.masks

        def forward() -> Any:
            return attention(q, k, v, pattern=pattern, kernel=name, **masks)

        return Call(forward, (q, k, v))

    return Contestant(name, "member", prepare)


def planned(inputs: Inputs, direction: Direction = "forward") -> tuple[str, ...]:
    """The kernels that `kernel="auto"` would try for this row, the first of which it runs."""
    tensors = dict(zip("qkv", inputs.qkv, strict=True)) | inputs.masks
    return ours.planned(NAME, tensors, {"pattern": dict(inputs.row.pattern)}, direction)
