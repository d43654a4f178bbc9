"""What a kernel's entry points at: a forward and a backward over named tensors."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
Forward = Callable[[Tensors, Any], dict[str, Tensor]]
Backward = Callable[[Tensors, Tensors, Tensors, Any], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Implementation:
    """A kernel's two directions. Either may be None: the chain then goes on to a kernel that has it.

    `forward(inputs, options)` gives every output of the operator by name. `backward(grads, inputs, outputs, options)`
    gives the gradient of every differentiable input that is present, in that input's dtype. `grads` holds only the
    outputs that have a gradient. Neither changes its arguments, and no result shares memory with an argument.
    """

    forward: Forward | None
    backward: Backward | None


@contextmanager
def recording() -> Iterator[None]:
    """Autograd inside an operator. torch runs a custom operator with the autograd keys excluded, where enable_grad
    alone records nothing and says nothing."""
    guard, key = torch._C._SetExcludeDispatchKeyGuard, torch._C.DispatchKey
    with guard(key.AutogradFunctionality, False), guard(key.ADInplaceOrView, False), torch.enable_grad():
        yield


def differentiate(forward: Forward, differentiable: tuple[str, ...]) -> Backward:
    """A backward made by running `forward` again under autograd: the oracle's gradient, and `eager`'s."""

    def backward(grads: Tensors, inputs: Tensors, outputs: Tensors, options: Any) -> dict[str, Tensor]:
        leaves = {
            name: tensor.detach().requires_grad_() if name in differentiable else tensor
            for name, tensor in inputs.items()
        }
        wanted = [name for name in differentiable if name in inputs]
        with recording():
            again = forward(leaves, options)
            pairs = [(again[name], grad) for name, grad in grads.items() if again[name].requires_grad]
            if not pairs:
                return {name: torch.zeros_like(inputs[name]) for name in wanted}
            found = torch.autograd.grad(
                [output for output, _ in pairs],
                [leaves[name] for name in wanted],
                [grad for _, grad in pairs],
                allow_unused=True,
            )
        return {
            name: torch.zeros_like(inputs[name]) if grad is None else grad
            for name, grad in zip(wanted, found, strict=True)
        }

    return backward


def from_reference(forward: Forward, differentiable: tuple[str, ...]) -> Implementation:
    """A reference put to work as the kernel `eager`."""
    return Implementation(forward, differentiate(forward, differentiable))


def compiled(module: str) -> Implementation:
    """`forward` and `backward` of a module of kernels that Triton compiles.

    It is imported where one of them first runs, since Triton may not be installed, and runs on its inputs' device.
    """

    def forward(inputs: Tensors, options: Any) -> dict[str, Tensor]:
        with torch.cuda.device_of(next(iter(inputs.values()))):
            return importlib.import_module(module).forward(inputs, options)

    def backward(grads: Tensors, inputs: Tensors, outputs: Tensors, options: Any) -> dict[str, Tensor]:
        with torch.cuda.device_of(next(iter(inputs.values()))):
            return importlib.import_module(module).backward(grads, inputs, outputs, options)

    return Implementation(forward, backward)
