"""Running a kernel on a case, forward and backward, and judging it by the fp64 reference.

A `Call` is anything that computes an operator's outputs for a case: a kernel, the reference, a kernel with a planted
fault. A `Program` reaches the same results by another road (in parts, padded, row by row: see `laws`). Both are
differentiated through autograd, so that a law speaks of gradients as much as of outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from attncompiler.mechanisms.base import Kernel, Mechanism, Refusal, load_entry, refusals
from attncompiler.mechanisms.case import Case
from attncompiler.runtime.inputs import no_site
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
        return case.operator(case.tensors, options_text(options), no_site())

    return call


def reference_call(mechanism: Mechanism) -> Call:
    """The oracle's function, in whatever dtype the case has."""
    function = load_entry(mechanism.reference)
    return lambda case: function(case.tensors, case.options)


def prepared(case: Case, dtype: torch.dtype, device: str = "cpu") -> Case:
    """The case as a kernel of `dtype` on `device` is given it."""
    return replace(case, tensors=case.cast(dtype, device))


def refusals_of(kernel: Kernel, case: Case) -> tuple[Refusal, ...]:
    """Why `kernel` refuses this prepared case on this machine; empty when it serves it."""
    request = case.operator.request(case.tensors, case.options)
    target = detect_target(_device(case).type)
    return refusals(kernel, request, target, detect_environment())


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


def truth(mechanism: Mechanism, case: Case, dtype: torch.dtype, *draws: Mapping[str, Tensor]) -> Oracle:
    """The oracle of a prepared case: the fp64 reference on its inputs, and what the reference in `dtype` loses.

    Each of `draws` is a set of cotangents; of several, the results are stacked along a new first axis.

    In fp64 the reference cannot be measured against itself: it is taken to lose what it loses in fp32, less by the
    ratio of the two eps.
    """
    exact = [_exact(mechanism, case, grads) for grads in draws]
    if dtype != torch.float64:
        low = [evaluate(reference_call(mechanism), _on_cpu(case, dtype), grads) for grads in draws]
        lost = [_distance(got, of) for got, of in zip(low, exact, strict=True)]
    else:
        single = _on_cpu(case, torch.float32)
        ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        lost = []
        for grads in draws:
            grads = {name: grad.float() for name, grad in grads.items()}
            low_error = _distance(evaluate(reference_call(mechanism), single, grads), _exact(mechanism, single, grads))
            lost.append({name: error * ratio for name, error in low_error.items()})
    return oracle(_stacked(exact), _stacked(lost), case.tensors, dtype)


DRAWS = 16
"""sets of cotangents under which a gradient is judged that one set puts over the budget"""


class Trial:
    """A prepared case of `dtype` that calls are held to, under cotangents of all outputs or of those named in `only`.

    The budget bounds an rms, which speaks of many roundings; a gradient in which many terms cancel into few numbers (a
    parameter's) is one draw of them, for the call as for the reference, and may be lucky in the one by any factor. So
    a gradient that is over the budget is measured again under `DRAWS` sets of cotangents, the first among them, and
    judged by all of them as one tensor. The bound is the same, and an error that is not of rounding grows with the
    cotangents as the gradient does. Outputs know nothing of cotangents: they are judged once.
    """

    def __init__(
        self, mechanism: Mechanism, case: Case, dtype: torch.dtype, only: Collection[str] | None = None
    ) -> None:
        self.mechanism, self.case, self.dtype, self.only = mechanism, case, dtype, only
        self._once = cache(lambda: self._truth(1))
        self._often = cache(lambda: self._truth(DRAWS))

    def verdicts(self, results: Callable[[Mapping[str, Tensor]], Results]) -> tuple[Verdict, ...]:
        """What the budget says of `results(cotangents)`: outputs by name and gradients as "grad <input>"."""
        verdicts = judge(results(self._cotangents(0)), self._once())
        again = {verdict.name for verdict in verdicts if not verdict.ok and verdict.name.startswith("grad ")}
        if not again:
            return verdicts
        often = judge(_stacked([results(self._cotangents(draw)) for draw in range(DRAWS)]), self._often())
        return tuple(second if second.name in again else first for first, second in zip(verdicts, often, strict=True))

    def _cotangents(self, draw: int) -> dict[str, Tensor]:
        drawn = cotangents(self.case, draw)
        return drawn if self.only is None else {name: grad for name, grad in drawn.items() if name in self.only}

    def _truth(self, draws: int) -> Oracle:
        return truth(self.mechanism, self.case, self.dtype, *map(self._cotangents, range(draws)))


def conforms(
    mechanism: Mechanism, call: Call, case: Case, dtype: torch.dtype, program: Program = whole
) -> tuple[Verdict, ...]:
    """What the budget says of `call`, reached by `program`, on a prepared case of `dtype`."""
    return Trial(mechanism, case, dtype).verdicts(lambda grads: evaluate(call, case, grads, program))


def _stacked(draws: Sequence[Results]) -> dict[str, Tensor]:
    """Results under several sets of cotangents as one; those under one set as they are."""
    if len(draws) == 1:
        return dict(draws[0])
    return {name: torch.stack([results[name] for results in draws]) for name in draws[0]}


def _exact(mechanism: Mechanism, case: Case, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return evaluate(reference_call(mechanism), _on_cpu(case, torch.float64), grads)


def _on_cpu(case: Case, dtype: torch.dtype) -> Case:
    return prepared(replace(case, tensors={name: tensor.cpu() for name, tensor in case.tensors.items()}), dtype)


def _distance(got: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """|got − exact|, 0 where both are the same infinity."""
    return {name: torch.where(got[name] == exact[name], 0.0, (got[name] - exact[name]).abs()) for name in exact}


def _device(case: Case) -> torch.device:
    return case.tensors[case.operator.inputs[0]].device
