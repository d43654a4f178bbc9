"""Running a kernel on a case, forward and backward, and judging it by the fp64 reference.

A `Call` is anything that computes an operator's outputs for a case: a kernel, the reference, a kernel with a planted
fault. A `Program` reaches the same results by another road (in parts, padded, row by row: see `laws`). Both are
differentiated through autograd, so that a law speaks of gradients as much as of outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from attncompiler.mechanisms.base import Direction, Kernel, Mechanism, Refusal, load_entry, refusals
from attncompiler.mechanisms.case import Case
from attncompiler.runtime import registry
from attncompiler.runtime.context import Chain
from attncompiler.runtime.operator import options_text
from attncompiler.targets.detect import detect_environment, detect_target
from attncompiler.testing.budget import Oracle, Results, Verdict, judge, oracle
from attncompiler.testing.poison import poisoned

Call = Callable[[Case], dict[str, Tensor]]
Program = Callable[[Call, Case], dict[str, Tensor]]


def whole(call: Call, case: Case) -> dict[str, Tensor]:
    """The program that is one call."""
    return call(case)


def kernel_call(*names: str) -> Call:
    """The operator, with only the kernels of these names allowed."""

    def call(case: Case) -> dict[str, Tensor]:
        options = case.options.model_copy(update={"kernel": names})
        return case.operator(case.tensors, options_text(options))

    return call


def pair_call(forward: str, backward: str) -> Call:
    """A call whose forward one kernel runs and whose backward another, as a plan may have it."""
    record = registry.Record(Chain(f"{forward} and {backward}", (forward, backward), "raise", backward))
    handle = torch.tensor(registry.register(record))

    def call(case: Case, held: registry.Record = record) -> dict[str, Tensor]:  # the registry holds it weakly
        return case.operator(case.tensors, options_text(case.options), handle)

    return call


def reference_call(mechanism: Mechanism) -> Call:
    """The oracle's function, in whatever dtype the case has."""
    function = load_entry(mechanism.reference)
    return lambda case: function(case.tensors, case.options)


def prepared(case: Case, dtype: torch.dtype, device: str = "cpu") -> Case:
    """The case as a kernel of `dtype` on `device` is given it."""
    return replace(case, tensors=case.cast(dtype, device))


def refusals_of(kernel: Kernel, case: Case, direction: Direction = "backward") -> tuple[Refusal, ...]:
    """Why `kernel` refuses this prepared case on this machine, or its backward; empty when it serves both."""
    request = case.operator.request(case.tensors, case.options)
    target = detect_target(_device(case).type)
    return refusals(kernel, request, target, detect_environment(), direction)


def dtypes_of(kernel: Kernel, device: str) -> tuple[str, ...]:
    """What the kernel takes on the device; by Triton's interpreter where that stands for one; nothing elsewhere."""
    device_type = device.partition(":")[0]
    if device_type in kernel.needs.device_types:
        return kernel.needs.at(device_type).dtypes
    return kernel.needs.interpreted if detect_environment().interpreting else ()


def cotangents(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """A Gaussian gradient for every differentiable output of a prepared case, in the output's dtype and on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    outputs = case.operator.fake(case.tensors, case.options)
    return {
        name: torch.randn(outputs[name].shape, generator=generator, dtype=torch.float64).to(outputs[name].dtype)
        for name in case.operator.differentiable_outputs
    }


def evaluate(call: Call, case: Case, grads: Mapping[str, Tensor], program: Program = whole) -> dict[str, Tensor]:
    """Outputs by name and gradients as "grad <input>" of a prepared case; uninitialised memory is NaN meanwhile."""
    names = [name for name in case.operator.differentiable if name in case.tensors]
    leaves = {name: case.tensors[name].detach().requires_grad_() for name in names}
    with poisoned(), torch.autograd.set_multithreading_enabled(False):
        outputs = program(call, case.given(**leaves))
        pairs = [(outputs[name], grad) for name, grad in grads.items() if outputs[name].requires_grad]
        found: tuple[Tensor | None, ...] = (None,) * len(names)
        if pairs:
            found = torch.autograd.grad(
                [output for output, _ in pairs],
                [leaves[name] for name in names],
                [grad.to(output) for output, grad in pairs],
                allow_unused=True,
            )
    gradients = {
        f"grad {name}": torch.zeros_like(leaves[name]) if grad is None else grad
        for name, grad in zip(names, found, strict=True)
    }
    return {name: output.detach() for name, output in outputs.items()} | gradients


NEAR = 2.0**-6
"""how far, relative to itself, an input of a near case may be from the case's own"""


def near(case: Case, draw: int) -> Case:
    """A prepared case with other roundings and the same sense: its floats moved toward zero, each by up to `NEAR`.

    Draw 0 is the case itself. What is zero, infinite, negative or at most 1 stays so: a decay is a decay. Integers and
    booleans stay as they are. The same draw gives the same case.
    """
    if draw == 0:
        return case
    generator = torch.Generator().manual_seed(draw)

    def move(tensor: Tensor) -> Tensor:
        factor = 1 - NEAR * torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
        return (tensor.double() * factor.to(tensor.device)).to(tensor.dtype)

    moved = {name: move(tensor) for name, tensor in case.tensors.items() if tensor.is_floating_point()}
    return case.given(**moved)


def truth(mechanism: Mechanism, case: Case, dtype: torch.dtype, grads: Mapping[str, Tensor]) -> Oracle:
    """The oracle of a prepared case: the fp64 reference on its inputs, and what the reference in `dtype` loses.

    In fp64 the reference cannot be measured against itself: it is taken to lose what it loses in fp32, less by the
    ratio of the two eps.
    """
    exact = _exact(mechanism, case, grads)
    if dtype != torch.float64:
        lost = _distance(evaluate(reference_call(mechanism), _on_cpu(case, dtype), grads), exact)
    else:
        single = _on_cpu(case, torch.float32)
        grads = {name: grad.float() for name, grad in grads.items()}
        ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        low_error = _distance(evaluate(reference_call(mechanism), single, grads), _exact(mechanism, single, grads))
        lost = {name: error * ratio for name, error in low_error.items()}
    return oracle(exact, lost, case.tensors, dtype, case.operator.logarithms)


DRAWS = 16
"""draws by which a tensor is judged that the first puts over the budget"""


class Trial:
    """A prepared case of `dtype` that calls are held to, under cotangents of all outputs or of those named in `only`.

    The budget speaks of many roundings. Where one rounding decides (many terms cancel into few numbers, one exponent
    is far larger than the rest, a tensor has one element), call and reference are one draw of it each, and either may
    be lucky by any factor. So a tensor that is over the budget is measured again: draw k is a case near to the case
    and its own set of cotangents, draw 0 the case itself, and `DRAWS` draws are judged as one tensor. The bound is the
    same, for more roundings of both sides. An error that is not of rounding is found in every draw, as large as what it
    is an error of; one of draw 0 alone counts in full at the maximum, and for a quarter in the rms.
    """

    def __init__(
        self, mechanism: Mechanism, case: Case, dtype: torch.dtype, only: Collection[str] | None = None
    ) -> None:
        self.mechanism, self.case, self.dtype, self.only = mechanism, case, dtype, only
        self._oracle = cache(self._truth)

    def verdicts(self, results: Callable[[Case, Mapping[str, Tensor]], Results]) -> tuple[Verdict, ...]:
        """What the budget says of `results(case, cotangents)`: outputs by name and gradients as "grad <input>"."""
        first = results(*self._draw(0)), self._oracle(0)
        verdicts = judge(*first)
        if all(verdict.ok for verdict in verdicts):
            return verdicts
        others = [(results(*self._draw(draw)), self._oracle(draw)) for draw in range(1, DRAWS)]
        return tuple(once if once.ok else often for once, often in zip(verdicts, judge(*first, *others), strict=True))

    def _draw(self, draw: int) -> tuple[Case, dict[str, Tensor]]:
        drawn = cotangents(self.case, draw)
        if self.only is not None:
            drawn = {name: grad for name, grad in drawn.items() if name in self.only}
        return near(self.case, draw), drawn

    def _truth(self, draw: int) -> Oracle:
        case, drawn = self._draw(draw)
        return truth(self.mechanism, case, self.dtype, drawn)


def conforms(
    mechanism: Mechanism, call: Call, case: Case, dtype: torch.dtype, program: Program = whole
) -> tuple[Verdict, ...]:
    """What the budget says of `call`, reached by `program`, on a prepared case of `dtype`."""
    return Trial(mechanism, case, dtype).verdicts(partial(evaluate, call, program=program))


def _exact(mechanism: Mechanism, case: Case, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return evaluate(reference_call(mechanism), _on_cpu(case, torch.float64), grads)


def _on_cpu(case: Case, dtype: torch.dtype) -> Case:
    return prepared(replace(case, tensors={name: tensor.cpu() for name, tensor in case.tensors.items()}), dtype)


def _distance(got: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """|got − exact|, 0 where both are the same infinity."""
    return {name: torch.where(got[name] == exact[name], 0.0, (got[name] - exact[name]).abs()) for name in exact}


def _device(case: Case) -> torch.device:
    return case.tensors[case.operator.inputs[0]].device
