"""Every kernel against the fp64 reference: outputs and gradients within the error budget, and clean habits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from attncompiler.errors import KernelError
from attncompiler.mechanisms.base import Kernel, Mechanism, load_entry
from attncompiler.mechanisms.case import Case, Cases
from attncompiler.runtime.implementation import Implementation
from attncompiler.testing.conformance import (
    Trial,
    conforms,
    cotangents,
    dtypes_of,
    evaluate,
    kernel_call,
    prepared,
    refusals_of,
)
from attncompiler.testing.poison import poisoned

ForCases = Callable[..., None]


def working_dtype(kernel: Kernel, device: str) -> torch.dtype:
    """fp32, or what comes nearest to it of what the kernel takes."""
    offered = kernel.needs.at(device).dtypes
    return torch.float32 if "float32" in offered else getattr(torch, offered[0])


def share_of(kernel: Kernel, device: str) -> float:
    """More draws for a kernel that refuses many of them: refused ones cost little."""
    return 1.0 if "deterministic" in kernel.needs.at(device).features else 40.0


def check_or_refuse(mechanism: Mechanism, kernel: Kernel, case: Case, dtype: torch.dtype) -> bool:
    """Hold a prepared case to the budget, or to a refusal that says every reason. Whether the kernel served it."""
    reasons = refusals_of(kernel, case)
    if reasons:
        with pytest.raises(KernelError) as error:  # some refuse their backward alone
            evaluate(kernel_call(kernel.name), case, cotangents(case))
        reasons = refusals_of(kernel, case, "forward") or reasons  # which then says its own alone
        assert all(len(str(reason).split()) > 3 and str(reason) in str(error.value) for reason in reasons)
        return False
    verdicts = conforms(mechanism, kernel_call(kernel.name), case, dtype)
    assert all(verdict.ok for verdict in verdicts), "\n".join(map(str, verdicts))
    return True


def test_plain_calls_are_within_the_budget(
    mechanism: Mechanism, kernel: Kernel, dtype: torch.dtype, device: str, cases: Cases, for_cases: ForCases
) -> None:
    served = []

    def check(case: Case) -> None:
        served.append(check_or_refuse(mechanism, kernel, prepared(case, dtype, device), dtype))

    for_cases(check, cases.draw(), share=2 * share_of(kernel, device))
    assert any(served), f"{kernel.name} refused every plain call"


def test_every_option_is_within_the_budget_or_refused_in_words(
    mechanism: Mechanism, kernel: Kernel, dtype: torch.dtype, device: str, cases: Cases, for_cases: ForCases
) -> None:
    served = []

    def check(case: Case) -> None:
        served.append(check_or_refuse(mechanism, kernel, prepared(case, dtype, device), dtype))

    for_cases(check, cases.extras(), share=3 * share_of(kernel, device))
    assert any(served), f"{kernel.name} refused every call"


def test_the_widest_calls_are_within_the_budget_or_refused(
    mechanism: Mechanism,
    kernel: Kernel,
    dtype: torch.dtype,
    device: str,
    interpreted: bool,
    cases: Cases,
    for_cases: ForCases,
) -> None:
    """A GPU's kernels have other tiles there: one that no narrow call had once read what was not there."""
    if interpreted:
        pytest.skip("the interpreter takes minutes for a call of these")
    served = []

    def check(case: Case) -> None:
        served.append(check_or_refuse(mechanism, kernel, prepared(case, dtype, device), dtype))

    for_cases(check, cases.wide(), share=share_of(kernel, device))
    assert any(served), f"{kernel.name} refused every call"


def test_some_kernel_serves_every_case(mechanism: Mechanism, device: str, cases: Cases, for_cases: ForCases) -> None:
    """`eager` accepts every option that cases.py draws, so no drawn case is without a kernel."""

    def check(case: Case) -> None:
        case = prepared(case, torch.float32, device)
        assert not refusals_of(mechanism.kernel("eager"), case)

    for_cases(check, cases.extras(), share=8)


def test_deterministic_calls_are_bitwise_repeatable(
    kernel: Kernel, device: str, cases: Cases, for_cases: ForCases
) -> None:
    if kernel.needs.at(device).refuse("deterministic", True):
        return
    served = []

    def check(case: Case) -> None:
        options = case.options.model_copy(update={"deterministic": True})
        case = prepared(Case(case.operator, case.tensors, options, case.causal), working_dtype(kernel, device), device)
        if refusals_of(kernel, case):
            return
        served.append(case)
        grads = cotangents(case)
        first, second = (evaluate(kernel_call(kernel.name), case, grads) for _ in range(2))
        for name in first:
            assert torch.equal(first[name], second[name]), name

    for_cases(check, st.one_of(cases.draw(), cases.extras()), share=0.5)
    assert served, f"{kernel.name} refused every call"


def test_a_backward_serves_what_any_kernel_ran_forward(
    mechanism: Mechanism, kernel: Kernel, device: str, cases: Cases, other_kernels: list[Kernel], for_cases: ForCases
) -> None:
    """What a backward is given is inputs and outputs alone, so the chain may change kernel between the two."""
    served = []
    dtype = working_dtype(kernel, device)

    def check(case: Case) -> None:
        case = prepared(case, dtype, device)
        trial = Trial(mechanism, case, dtype)
        for forward in other_kernels:
            if refusals_of(kernel, case) or refusals_of(forward, case):
                continue
            served.append(case)

            def mixed(case: Case, grads: dict[str, Tensor], forward: Kernel = forward) -> dict[str, Tensor]:
                with torch.no_grad(), poisoned():
                    outputs = _implementation(forward).forward(case.tensors, case.options)
                    found = _implementation(kernel).backward(
                        {name: grad.to(device) for name, grad in grads.items()}, case.tensors, outputs, case.options
                    )
                return outputs | {f"grad {name}": grad for name, grad in found.items()}

            verdicts = trial.verdicts(mixed)
            assert all(verdict.ok for verdict in verdicts), "\n".join([forward.name, *map(str, verdicts)])

    for_cases(check, st.one_of(cases.draw(), cases.extras()), share=share_of(kernel, device))
    assert served or not other_kernels, f"no call was served by {kernel.name} and another kernel"


def test_a_kernel_is_pure(kernel: Kernel, device: str, cases: Cases, for_cases: ForCases) -> None:
    """It changes no argument, shares no memory with one, and gives what the operator's fake promises."""
    served = []
    narrow = torch.bfloat16 if "bfloat16" in dtypes_of(kernel, device) else torch.float16

    def check(case: Case) -> None:
        case = prepared(case, narrow, device)
        if refusals_of(kernel, case):
            return
        served.append(case)
        run = _implementation(kernel)
        grads = {name: grad.to(device) for name, grad in cotangents(case).items()}
        given = {**case.tensors, **{f"cotangent {name}": grad for name, grad in grads.items()}}
        before = {name: tensor.clone() for name, tensor in given.items()}
        with torch.no_grad():
            outputs = run.forward(case.tensors, case.options)
            kept = {name: tensor.clone() for name, tensor in outputs.items()}
            found = run.backward(grads, case.tensors, outputs, case.options)
        assert all(torch.equal(before[name], given[name]) for name in given)
        assert all(torch.equal(kept[name], outputs[name]) for name in outputs)
        storages = _storages({**given})
        assert not storages & _storages(outputs)
        assert not (storages | _storages(outputs)) & _storages(found)
        promised = case.operator.fake(case.tensors, case.options)
        assert {name: (t.shape, t.dtype) for name, t in outputs.items()} == {
            name: (t.shape, t.dtype) for name, t in promised.items()
        }
        differentiable = [name for name in case.operator.differentiable if name in case.tensors]
        assert {name: (t.shape, t.dtype) for name, t in found.items()} == {
            name: (case.tensors[name].shape, case.tensors[name].dtype) for name in differentiable
        }

    for_cases(check, cases.extras(), share=share_of(kernel, device))
    assert served, f"{kernel.name} refused every call"


def _implementation(kernel: Kernel) -> Implementation:
    return load_entry(kernel.entry)


def _storages(tensors: dict[str, Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors.values() if tensor.numel()}
