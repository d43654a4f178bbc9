"""Who takes part in a row: our kernels by name, and the peers; each makes the calls that are timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from attncompiler.bench.measure import Work

AUTO = "auto"


class Absent(Exception):
    """Why a contestant takes no part in a row: it has no such function, or is not installed."""


class Inputs(Protocol):
    """A row's tensors, made once for all who take part."""

    def compared(self, out: Tensor) -> Tensor:
        """What of an output in our layout must be the same for all."""


@dataclass(frozen=True)
class Call:
    """What a contestant does in a row: its forward, on leaves of its own layout."""

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    ours: Callable[[Tensor], Tensor] = lambda out: out
    """its output in the layout of ours"""
    no_backward: str | None = None
    """why it is measured without its backward, in words; None where it is measured with it"""

    def both(self) -> Work:
        """Forward and backward. The gradients are not accumulated, which would cost some layouts a copy.

        Raises Absent where it has no backward.
        """
        if self.no_backward is not None:
            raise Absent(self.no_backward)
        grad = torch.randn_like(self.forward())
        return lambda: torch.autograd.grad(self.forward(), self.leaves, grad)


@dataclass(frozen=True)
class Contestant:
    """One column: one of our kernels (a member of the chain), or a peer. `prepare` raises `Absent`."""

    name: str
    role: Literal["member", "peer"]
    prepare: Callable[[Any], Call]
    """(the row's inputs, of the bench's own kind) → what is timed"""
