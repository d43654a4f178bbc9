"""What a call may leave out where no gradient is asked for: at one token torch's ways in cost more than the work."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from attncompiler.blocks.autocast import DEVICES


class _Nothing:
    """A context that keeps nothing."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        pass


def differentiable(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply(*arguments)`, or its forward alone where gradients are off."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function.apply(*arguments)
    return function.forward(_Nothing(), *arguments)


def plain(tensors: Iterable[Tensor]) -> bool:
    """Whether these are plain tensors that hold values, and no compiler, tracer or transform looks on: whatever runs on
    them, nobody but autograd has to be told of it."""
    return (
        not torch.compiler.is_compiling()
        and all(type(tensor) in (Tensor, nn.Parameter) and tensor.device.type in DEVICES for tensor in tensors)
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._get_tracing_state()
    )


def undisturbed(tensors: Iterable[Tensor]) -> bool:
    """Whether an operator called with these tensors has nobody but autograd to tell of it, and may run without torch's
    dispatcher.

    So it is where they are plain, and no mode for functions or profiler looks on either.
    """
    return plain(tensors) and not torch._C._len_torch_function_stack() and not torch._C._autograd._profiler_enabled()
