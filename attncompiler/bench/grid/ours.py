"""Contestants of our own: a mechanism's kernels, and what is planned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from attncompiler.bench.grid.contestants import Contestant
from attncompiler.mechanisms.base import Mechanism, Value, discover, load_entry
from attncompiler.runtime import dispatch
from attncompiler.runtime.operator import Operator


def mechanism(name: str) -> Mechanism:
    """It, as data."""
    return discover()[name]


def operator(name: str) -> Operator:
    """That of a mechanism."""
    found: Operator = load_entry(mechanism(name).operator)
    return found


def members(
    name: str, device_type: str, features: Mapping[str, Value], member: Callable[[str], Contestant]
) -> tuple[Contestant, ...]:
    """A contestant, made by `member`, for each kernel of a mechanism's chain that is built, in its order."""
    known = mechanism(name)
    return tuple(member(kernel) for kernel in known.order(device_type, features) if known.kernel(kernel) is not None)


def planned(
    name: str, tensors: Mapping[str, Tensor], options: Mapping[str, Any], direction: str = "forward"
) -> tuple[str, ...]:
    """The kernels that `kernel="auto"` would try on an operator's tensors, the first of which it runs."""
    asked = operator(name)
    return dispatch.chain(asked, dict(tensors), asked.options.model_validate(dict(options)), direction)
