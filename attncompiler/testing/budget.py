"""The error budget: how far a kernel's results may be from the truth. One for all, derived, not tuned.

A kernel is measured by what the reference itself loses in the same dtype. With `low` the reference run in the
kernel's dtype (its accumulators fp32), `eps` the dtype's, and `s` the largest rms over the call's outputs and
gradients times max(1, input scale), a tensor is within the budget when

    max|err| ≤ 3·max|low err| + 16·eps·s   and   rms(err) ≤ 2·rms(low err) + 4·eps·s

where `err` and `low err` are the distances to the reference run in fp64 on the same rounded inputs.

An output that is the logarithm of a sum over the sequence grows with it while the gradients shrink: at a few hundred
tokens 16 eps of the lse are in bf16 more than all of a gradient. So its rms counts in its own `s` alone; the other
results are exponentials of it, and to them it is an input.

A tensor can be judged on several calls at once. All its numbers then are one tensor's, each call's errors being brought
to the scale of the first by the ratio of the two `s`: so none counts for more because its results are larger, and the
errors of a call with small results do not vanish beside those of another.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Results = Mapping[str, Tensor]
"""The outputs of a call by name, and its gradients as "grad <input>"."""


@dataclass(frozen=True, slots=True)
class Oracle:
    """The truth about one call, and what the reference in the kernel's dtype loses of it."""

    exact: Results
    """fp64, on the CPU"""
    low_error: Results
    """fp64, not negative; not finite where the dtype cannot hold the value at all"""
    eps: float
    scale: float
    """s"""
    scales: Mapping[str, float] = field(default_factory=dict)
    """that of each tensor which has another"""

    def scale_of(self, name: str) -> float:
        return self.scales.get(name, self.scale)


@dataclass(frozen=True, slots=True)
class Verdict:
    """One tensor's errors and what they may be. A value that is not finite where it should be is an infinite error."""

    name: str
    max_error: float
    max_budget: float
    rms_error: float
    rms_budget: float

    @property
    def ok(self) -> bool:
        return self.max_error <= self.max_budget and self.rms_error <= self.rms_budget

    def __str__(self) -> str:
        return (
            f"{self.name}: max {self.max_error:.2e} of {self.max_budget:.2e}, "
            f"rms {self.rms_error:.2e} of {self.rms_budget:.2e}{'' if self.ok else ' ← over the budget'}"
        )


def oracle(
    exact: Results, low_error: Results, inputs: Results, dtype: torch.dtype, logarithms: Collection[str] = ()
) -> Oracle:
    """The oracle of a call of `dtype` with these exact results, low errors and inputs.

    The input scale is the largest finite magnitude in a floating input, and in a logarithm for what is an exponential
    of it: by so much can one product, or one exponential, amplify a rounding error. An infinite input (the logarithm of
    favor's empty state) amplifies none.
    Raises ValueError when an exact result is NaN: such a call cannot judge anything.
    """
    for name, tensor in exact.items():
        if tensor.isnan().any():
            raise ValueError(f"the reference gives NaN in {name}")
    sizes = {name: rms(tensor) for name, tensor in exact.items()}
    largest = max((size for name, size in sizes.items() if name not in logarithms), default=0.0)
    own = _amplified(tensor for tensor in inputs.values() if tensor.is_floating_point())
    scales = {name: max(largest, sizes[name]) * own for name in logarithms if name in sizes}
    by = max(own, _amplified(exact[name] for name in scales))
    return Oracle(exact, low_error, torch.finfo(dtype).eps, largest * by, scales)


def _amplified(tensors: Iterable[Tensor]) -> float:
    return max([1.0, *(_largest(tensor[tensor.isfinite()].abs()) for tensor in tensors)])


def judge(got: Results, oracle: Oracle, *others: tuple[Results, Oracle]) -> tuple[Verdict, ...]:
    """A verdict for every tensor of `got`, judged together with the results of `others`, each by its own oracle.

    Raises ValueError when a tensor is missing, unknown or of a wrong shape.
    """
    draws = ((got, oracle), *others)
    for results, truth in draws:
        if results.keys() != truth.exact.keys():
            raise ValueError(f"results {sorted(results)} where {sorted(truth.exact)} are expected")
    return tuple(_judge(name, draws) for name in got)


def _judge(name: str, draws: Sequence[tuple[Results, Oracle]]) -> Verdict:
    first = draws[0][1]
    weights = [_ratio(first.scale_of(name), oracle.scale_of(name)) for _, oracle in draws]
    pairs = [_errors(name, got[name].detach().double().cpu(), oracle) for got, oracle in draws]
    error, allowed = (
        torch.cat([tensor.flatten() * weight for tensor, weight in zip(tensors, weights, strict=True)])
        for tensors in zip(*pairs, strict=True)
    )
    floor = first.eps * first.scale_of(name)
    return Verdict(
        name,
        max_error=_largest(error),
        max_budget=3 * _largest(allowed) + 16 * floor,
        rms_error=rms(error) if error.isfinite().all() else math.inf,
        rms_budget=2 * rms(allowed) + 4 * floor,
    )


def _ratio(scale: float, other: float) -> float:
    """What brings errors to `scale` that are of a call of scale `other`; 1 where there is nothing to compare."""
    return scale / other if 0 < scale < math.inf and 0 < other < math.inf else 1.0


def _errors(name: str, got: Tensor, oracle: Oracle) -> tuple[Tensor, Tensor]:
    """A tensor's errors, and those that the reference makes; neither is counted where the dtype overflows."""
    exact, low_error = oracle.exact[name], oracle.low_error[name]
    if got.shape != exact.shape:
        raise ValueError(f"{name} has shape {tuple(got.shape)} where {tuple(exact.shape)} is expected")
    # what the dtype overflows on is nobody's fault, and an infinite truth (the lse of a row that sees nothing) is met
    # exactly or not at all
    counted = low_error.isfinite() & (got != exact)
    error = torch.where(counted, (got - exact).abs(), 0.0).nan_to_num(nan=torch.inf)
    return error, torch.where(low_error.isfinite(), low_error, 0.0)


def _largest(tensor: Tensor) -> float:
    return float(tensor.max()) if tensor.numel() else 0.0


def rms(tensor: Tensor) -> float:
    """The root mean square of a tensor's finite values, 0 when there are none."""
    finite = tensor.detach().double()
    finite = finite[finite.isfinite()]
    return float(finite.square().mean().sqrt()) if finite.numel() else 0.0
