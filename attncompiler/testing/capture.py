"""A model's operator calls, recorded as it runs: what kernels are given in truth, and may be judged on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from attncompiler.emit.weights import seed_of
from attncompiler.mechanisms.base import Mechanism, discover, load_entry
from attncompiler.mechanisms.case import Case
from attncompiler.runtime import registry
from attncompiler.runtime.context import Chain
from attncompiler.runtime.operator import NAMESPACE, Operator


@dataclass(frozen=True)
class SiteCall:
    """A call that a site made: the chain it may run, and the operator's inputs and options."""

    chain: Chain
    mechanism: Mechanism
    case: Case


class recorded(TorchDispatchMode):
    """A context that keeps every forward call of a mechanism's operator in `calls`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[SiteCall] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        namespace, _, name = func.name().partition("::")  # type: ignore[attr-defined]
        mechanism = discover().get(name) if namespace == NAMESPACE else None
        if mechanism is not None:
            self.calls.append(_read(mechanism, *args))
        return func(*args, **(kwargs or {}))


def _read(mechanism: Mechanism, tensors: list[torch.Tensor], descriptor: str, handle: torch.Tensor) -> SiteCall:
    operator: Operator = load_entry(mechanism.operator)
    names, _, text = descriptor.partition("|")
    options = operator.options.model_validate_json(text)
    given = {name: tensor.detach() for name, tensor in zip(names.split(","), tensors, strict=True)}
    record = registry.find(int(handle))
    chain = Chain(mechanism.name, options.kernel) if record is None else record.chain
    return SiteCall(chain, mechanism, Case(operator, given, options, causal=False))


def enlivened(model: nn.Module, seed: int) -> None:
    """Give a model weights under which every part of it shows in its outputs, the same in every dtype.

    First weights hide faults: biases are 0, norms 1, and scores so small that a softmax is level. Matrices become
    Gaussian of variance 1 / inputs, and to vectors a Gaussian of standard deviation 1/4 is added. All are rounded to
    bf16, so that models of every dtype are one model.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(seed_of(seed, name))
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                drawn *= (parameter.shape[0] / max(1, parameter.numel())) ** 0.5
            else:
                drawn = drawn / 4 + parameter.float().cpu()
            parameter.copy_(drawn.bfloat16())
