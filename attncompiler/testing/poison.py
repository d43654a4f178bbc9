"""Uninitialised memory that shows: while it is poisoned, torch.empty and its kin give NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

EMPTY = frozenset(
    {
        torch.empty,
        torch.empty_like,
        torch.empty_strided,
        torch.empty_permuted,
        Tensor.new_empty,
        Tensor.new_empty_strided,
    }
)


class poisoned(TorchFunctionMode):
    """A context in which every floating tensor made uninitialised from Python is full of NaN.

    A kernel that reads what it never wrote, or leaves a part of its result unwritten, then gives NaN every time and
    not once in a while. It holds for the thread that enters it.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in EMPTY and result.is_floating_point():
            result.detach().fill_(torch.nan)
        return result
