"""Contestants of our own: a mechanism's kernels, and what is planned."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from attncompiler.bench.grid.contestants import Contestant
from attncompiler.mechanisms.base import Direction, Mechanism, Value, discover, load_entry
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
    name: str,
    device_type: str,
    features: Mapping[str, Value],
    member: Callable[[str], Contestant],
    peers: Collection[str] = (),
) -> tuple[Contestant, ...]:
    """A contestant, made by `member`, for each kernel of a mechanism's chain that is built, in its order.

    But for a library's whose own call is among the `peers`, under the same name.
    """
    known = mechanism(name)
    order = [kernel for kernel in known.order(device_type, features) if kernel not in peers]
    return tuple(member(kernel) for kernel in order if known.kernel(kernel) is not None)


def planned(
    name: str, tensors: Mapping[str, Tensor], options: Mapping[str, Any], direction: Direction = "forward"
) -> tuple[str, ...]:
    """The kernels that `kernel="auto"` would try on an operator's tensors, the first of which it runs."""
    asked = operator(name)
    return dispatch.chain(asked, dict(tensors), asked.options.model_validate(dict(options)), direction)
