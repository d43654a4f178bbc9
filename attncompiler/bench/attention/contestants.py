"""Who takes part in a row: our kernels by name, and the peers; each makes the calls that are timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from attncompiler.bench.attention.inputs import Inputs
from attncompiler.bench.attention.rows import Row
from attncompiler.bench.measure import Work
from attncompiler.mechanisms.base import Mechanism, discover, load_entry
from attncompiler.ops import attention
from attncompiler.runtime import dispatch

AUTO = "auto"


class Absent(Exception):
    """Why a contestant takes no part in a row: it has no such mask, or is not installed."""


@dataclass(frozen=True)
class Call:
    """What a contestant does in a row: its forward, on leaves of its own layout."""

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    ours: Callable[[Tensor], Tensor] = lambda out: out
    """its output as (B, T, H, D)"""

    def both(self) -> Work:
        """Forward and backward. The gradients are not accumulated, which would cost some layouts a copy."""
        grad = torch.randn_like(self.forward())
        return lambda: torch.autograd.grad(self.forward(), self.leaves, grad)


@dataclass(frozen=True)
class Contestant:
    """One column: one of our kernels (a member of the chain), or a peer. `prepare` raises `Absent`."""

    name: str
    role: Literal["member", "peer"]
    prepare: Callable[[Inputs], Call]


def mechanism() -> Mechanism:
    """Attention, as data."""
    return discover()["attention"]


def policy(row: Row) -> Any:
    """A policy of the row's pattern, which is what the mechanism counts pairs and finds buckets by."""
    asked = {"kind": mechanism().name, "num_attention_heads": row.H, "pattern": dict(row.pattern)}
    return mechanism().policy.model_validate(asked)


def members(device_type: str, pattern: str) -> tuple[Contestant, ...]:
    """A contestant for each kernel of the chain that is built, in the mechanism's order."""
    order = mechanism().order(device_type, {"pattern": pattern})
    return tuple(member(name) for name in order if mechanism().kernel(name) is not None)


def member(name: str) -> Contestant:
    """Our kernel of that name, or with `AUTO` the one our operator chooses, through the function that users call."""

    def prepare(inputs: Inputs) -> Call:
        q, k, v = inputs.qkv
        pattern, masks = dict(inputs.row.pattern), inputs.masks

        def forward() -> Any:
            return attention(q, k, v, pattern=pattern, kernel=name, **masks)

        return Call(forward, (q, k, v))

    return Contestant(name, "member", prepare)


def planned(inputs: Inputs, direction: str = "forward") -> tuple[str, ...]:
    """The kernels that `kernel="auto"` would try for this row, the first of which it runs."""
    operator = load_entry(mechanism().operator)
    options = operator.options.model_validate({"pattern": dict(inputs.row.pattern)})
    tensors = dict(zip("qkv", inputs.qkv, strict=True)) | inputs.masks
    return dispatch.chain(operator, tensors, options, direction)
