"""Cases: inputs and options drawn for a mechanism, for the conformance suite, the fuzzer and the benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attncompiler.runtime.implementation import Tensors
from attncompiler.runtime.operator import Operator

VALUE_KINDS = ("normal", "large", "outliers", "constant", "one_hot")


def values(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """An fp64 tensor of one of `VALUE_KINDS`: Gaussian and not, since Gaussians hide faults."""
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "large":
        return base * 8
    if kind == "outliers":
        return torch.where(torch.rand(shape, generator=generator) < 0.02, base * 50, base)
    if kind == "constant":
        return torch.full(shape, 0.5, dtype=torch.float64)
    if kind == "one_hot":
        hot = torch.randint(shape[-1], shape[:-1], generator=generator)
        return torch.nn.functional.one_hot(hot, shape[-1]).double()
    return base


@dataclass(frozen=True, repr=False)
class Case:
    """One call of an operator: fp64 inputs on the CPU by name, options, and whether the call is causal."""

    operator: Operator
    tensors: Mapping[str, Tensor]
    options: Any
    causal: bool

    def __repr__(self) -> str:
        """Shapes instead of values: a failing example is read, and drawn again from its seed."""
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in self.tensors.items())
        return f"Case({self.operator.name}: {shapes}; {self.options!r})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """For hypothesis, which would print a dataclass field by field."""
        printer.text(repr(self))

    def cast(self, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
        """The inputs for a kernel of `dtype`: low-precision inputs rounded to it, other floats to fp32 or better."""
        wide = torch.promote_types(dtype, torch.float32)

        def convert(name: str, tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor.to(device)
            return tensor.to(device, dtype if name in self.operator.low_precision else wide)

        return {name: convert(name, tensor) for name, tensor in self.tensors.items()}

    def slice(self, start: int, stop: int) -> Case:
        """The case of tokens start to stop alone."""
        return self.map(lambda tensor, axis: tensor.narrow(axis, start, stop - start))

    def map(self, change: Callable[[Tensor, int], Tensor]) -> Case:
        """The case with `change(tensor, axis)` applied to every input that runs along the sequence."""
        changed = {
            name: change(tensor, self.operator.sequence[name]) if name in self.operator.sequence else tensor
            for name, tensor in self.tensors.items()
        }
        return replace(self, tensors=changed)

    def given(self, **tensors: Tensor | None) -> Case:
        """The case with inputs added, replaced, or (None) taken away."""
        merged = {**self.tensors, **tensors}
        return replace(self, tensors={name: tensor for name, tensor in merged.items() if tensor is not None})


@dataclass(frozen=True)
class Cases:
    """What a mechanism's cases.py offers: a hypothesis strategy of plain calls, and shapes for benchmarks.

    `draw()` gives calls without segments, padding or initial state, of up to some 70 tokens; the laws add those.
    `extras()` gives calls with every optional input and option the mechanism has, in all combinations.
    """

    draw: Callable[[], Any]
    extras: Callable[[], Any]
    bench: tuple[Mapping[str, Any], ...] = ()


def run(case_inputs: Tensors, case: Case) -> dict[str, Tensor]:
    """Run the operator (no site) on inputs made by `case.cast`, with the case's options."""
    from attncompiler.runtime.inputs import no_site
    from attncompiler.runtime.operator import options_text

    return case.operator(dict(case_inputs), options_text(case.options), no_site())
