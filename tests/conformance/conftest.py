"""The suite's parameters, all discovered: mechanisms, their kernels and dtypes. No test here names a mechanism.

A test that takes `mechanism`, `kernel`, `dtype` or `widest` runs for each of them; `@pytest.mark.offers(names)` keeps
it to mechanisms whose operator has inputs, outputs or options of those names (shell patterns). `for_cases` runs a
check on drawn cases: a few in the fast lane, many behind `-m slow`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from attncompiler.mechanisms.base import Kernel, Mechanism, Request, discover, load_entry
from attncompiler.mechanisms.case import Case, Cases
from attncompiler.runtime.operator import Operator
from attncompiler.targets.detect import detect_environment, detect_target
from attncompiler.testing.conformance import dtypes_of

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "offers(*names): only for mechanisms whose operator has all of these")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    wanted = set(metafunc.fixturenames)
    if "device" in wanted:
        metafunc.parametrize("device", [metafunc.config.getoption("--device")])
    mechanisms = [mechanism for mechanism in discover().values() if _offers(metafunc, mechanism)]
    if "kernel" in wanted:
        names = [name for name in ("mechanism", "kernel", "dtype", "widest") if name in wanted]
        device = metafunc.config.getoption("--device") if "device" in wanted else "cpu"
        # the interpreter takes seconds for a call: kernels are held to the budget by it, and to the laws behind -m slow
        brief = metafunc.module.__name__.rpartition(".")[2] == "test_kernels"
        metafunc.parametrize(
            names, [_row(entry, names, brief, device) for entry in _kernels(mechanisms, wanted, device)]
        )
    elif "mechanism" in wanted:
        metafunc.parametrize("mechanism", [pytest.param(mechanism, id=mechanism.name) for mechanism in mechanisms])


def _offers(metafunc: pytest.Metafunc, mechanism: Mechanism) -> bool:
    marker = metafunc.definition.get_closest_marker("offers")
    if marker is None:
        return True
    operator: Operator = load_entry(mechanism.operator)
    names = [*operator.inputs, *operator.outputs, *operator.options.model_fields]
    return all(fnmatch.filter(names, pattern) for pattern in marker.args)


def _kernels(mechanisms: list[Mechanism], wanted: set[str], device: str) -> Iterator[dict[str, Any]]:
    for mechanism in mechanisms:
        for kernel in mechanism.kernels:
            names = dtypes_of(kernel, device)
            if not names:
                continue
            offered = [name for name in DTYPES if name in names]
            run = {"mechanism": mechanism, "kernel": kernel, "interpreted": _interpreted(kernel, device)}
            dtypes = {"widest": [offered[0], "float32"], "dtype": offered}
            column = next((column for column in dtypes if column in wanted), None)
            if column is None:
                yield run
            for name in dict.fromkeys(dtypes[column]) if column else ():
                yield {**run, column: name}


def _row(entry: dict[str, Any], names: list[str], brief: bool, device: str) -> Any:
    dtype = entry.get("dtype", entry.get("widest"))
    if entry["interpreted"]:
        slow = not brief
    else:
        slow = (dtype == "float16" and device == "cpu") or (
            entry.get("widest") == "float32" and "float64" in entry["kernel"].needs.dtypes
        )
    label = "-".join(filter(None, (entry["mechanism"].name, entry["kernel"].name, dtype)))
    values = [DTYPES[entry[name]] if name in ("dtype", "widest") else entry[name] for name in names]
    marks = [pytest.mark.slow] if slow else []
    needs, environment = entry["kernel"].needs, detect_environment()
    missing = [name for name in needs.packages if name not in environment.packages]
    if missing:
        marks.append(pytest.mark.skip(reason=f"needs {', '.join(missing)}"))
    anything, target = Request(entry["mechanism"].name, {}), detect_target(device.partition(":")[0])
    for wrong in needs.wrong:
        refusal = wrong.refuses(anything, target, environment, "backward")
        if refusal:  # no call is served with its gradients: `refused in words` is asked with versions that are not here
            marks.append(pytest.mark.skip(reason=refusal))
    return pytest.param(*values, id=label, marks=marks)


@pytest.fixture(params=[pytest.param(6, id="few"), pytest.param(60, id="many", marks=pytest.mark.slow)])
def for_cases(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`for_cases(check, *strategies)` calls the check with draws of the strategies; a smaller `share` of them."""

    # the interpreter takes seconds for a case
    device = request.config.getoption("--device")
    slow = "kernel" in request.fixturenames and _interpreted(request.getfixturevalue("kernel"), device)

    def run(check: Callable[..., None], *strategies: st.SearchStrategy[Any], share: float = 1.0) -> None:
        few = request.param < 10  # the fast lane draws the same cases each time
        drawn = min(share, 0.5 if few else 0.1) if slow else share
        count = max(2, round(request.param * drawn))
        phases = (Phase.generate, Phase.shrink)
        same = settings(max_examples=count, deadline=None, database=None, phases=phases, derandomize=few)
        same(given(*strategies)(check))()

    return run


@pytest.fixture
def interpreted(kernel: Kernel, device: str) -> bool:
    """Whether Triton's interpreter runs the kernel."""
    return _interpreted(kernel, device)


def _interpreted(kernel: Kernel, device: str) -> bool:
    return device.partition(":")[0] not in kernel.needs.device_types


@pytest.fixture
def cases(mechanism: Mechanism) -> Cases:
    return load_entry(mechanism.cases)


@pytest.fixture
def other_kernels(mechanism: Mechanism, kernel: Kernel) -> list[Kernel]:
    return [other for other in mechanism.kernels if other is not kernel]


@pytest.fixture
def batched(mechanism: Mechanism) -> frozenset[str]:
    return batched_inputs(mechanism.cases)


@cache
def batched_inputs(entry: str) -> frozenset[str]:
    """Inputs with a batch axis: those whose first axis is as long as the first input's in every one of many draws."""
    cases: Cases = load_entry(entry)
    found: dict[str, bool] = {}

    @settings(max_examples=150, deadline=None, database=None, derandomize=True, phases=(Phase.generate,))
    @given(cases.draw(), cases.extras())
    def look(plain: Case, other: Case) -> None:
        for case in (plain, other):
            B = case.tensors[case.operator.inputs[0]].shape[0]
            for name, tensor in case.tensors.items():
                found[name] = found.get(name, True) and tensor.dim() > 0 and tensor.shape[0] == B

    look()
    return frozenset(name for name, always in found.items() if always)
