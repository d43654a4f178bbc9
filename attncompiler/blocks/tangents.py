"""Forward-mode derivatives, which this package's operators do not have: torch would take them for zero."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attncompiler.errors import InputError, fail


def refuse_tangents(operator: str, tensors: Iterable[Tensor]) -> None:
    """Raises InputError (E403) when one of the tensors carries a tangent (`torch.func.jvp`, `forward_ad`)."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        message = f"{operator} has no forward-mode derivative"
        raise fail(InputError, "E403", message, remedy="take the gradient by backward, torch.autograd.grad or func.vjp")
