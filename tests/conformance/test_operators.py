"""What each operator promises torch: opcheck, FLOP formulas, and memory linear in the length."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import islice

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from attncompiler.bench.device import Clock
from attncompiler.mechanisms.base import Kernel, Mechanism, discover, load_entry
from attncompiler.mechanisms.case import Case, Cases
from attncompiler.runtime.operator import no_site, options_text
from attncompiler.testing import laws
from attncompiler.testing.conformance import cotangents, kernel_call, prepared, refusals_of
from attncompiler.testing.memory import PeakMemory

LONG = 32768
SAVED_PER_BYTE = 3
GROWTH = 1.25
"""How much more than the length memory may grow: tiles that were not yet full fill up."""


def drawn(strategy: st.SearchStrategy[Case], count: int) -> list[Case]:
    """Some cases, the same each time."""
    found: list[Case] = []

    @settings(max_examples=count, deadline=None, database=None, derandomize=True, phases=(Phase.generate,))
    @given(strategy)
    def collect(case: Case) -> None:
        found.append(case)

    collect()
    return found


def leaves(case: Case) -> dict[str, Tensor]:
    differentiable = case.operator.differentiable
    return {
        name: tensor.detach().requires_grad_(name in differentiable and tensor.is_floating_point())
        for name, tensor in case.tensors.items()
    }


def arguments(case: Case) -> tuple[list[Tensor], str, Tensor]:
    """The raw arguments of the torch operator behind a case."""
    tensors = leaves(case)
    names = [name for name in case.operator.inputs if name in tensors]
    return [tensors[name] for name in names], ",".join(names) + "|" + options_text(case.options), no_site()


def smallest(cases: Cases, count: int, *, extras: bool = False) -> list[Case]:
    """The cheapest few of many drawn cases of different inputs."""
    by_inputs: dict[frozenset[str], Case] = {}
    for case in drawn(cases.extras() if extras else cases.draw(), 40):
        size = sum(tensor.numel() for tensor in case.tensors.values())
        known = by_inputs.get(frozenset(case.tensors))
        if laws.length(case) > 1 and (known is None or size < sum(t.numel() for t in known.tensors.values())):
            by_inputs[frozenset(case.tensors)] = case
    return sorted(by_inputs.values(), key=lambda case: -len(case.tensors))[:count]


@pytest.mark.parametrize(
    ("count", "dtype"), [(1, torch.float32), pytest.param(6, torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
def test_opcheck(mechanism: Mechanism, device: str, cases: Cases, count: int, dtype: torch.dtype) -> None:
    """Schema, autograd registration, fake tensors, and tracing with dynamic shapes, forward and backward."""
    for case in smallest(cases, count) + smallest(cases, count, extras=True):
        operator = getattr(torch.ops.attncompiler, mechanism.name).default
        torch.library.opcheck(operator, arguments(prepared(case, dtype, device)))


def test_the_fake_promises_what_is_given(mechanism: Mechanism, device: str, cases: Cases) -> None:
    """Shapes, dtypes, strides and where they begin, for every optional input; an axis of one element may have any
    stride."""

    def layout(tensor: Tensor) -> tuple[torch.Size, torch.dtype, list[int], int]:
        pairs = zip(tensor.shape, tensor.stride(), strict=True)
        return tensor.shape, tensor.dtype, [stride for size, stride in pairs if size > 1], int(tensor.storage_offset())

    for case in drawn(cases.extras(), 20):
        for dtype in (torch.float32, torch.bfloat16):
            ready = prepared(case, dtype, device)
            promised = ready.operator.fake(ready.tensors, ready.options)
            for name, tensor in kernel_call()(ready).items():
                assert layout(tensor) == layout(promised[name]), name


def test_every_operator_takes_packed_documents_and_padding(mechanism: Mechanism) -> None:
    assert {"segment_ids", "attention_mask"} <= set(load_entry(mechanism.operator).inputs)


def test_flops_are_registered_and_grow_with_the_length(mechanism: Mechanism, device: str, cases: Cases) -> None:
    case = prepared(smallest(cases, 1)[0], torch.float32, device)

    def count(case: Case) -> tuple[int, int]:
        outputs = None
        with FlopCounterMode(display=False) as forward:
            outputs = case.operator(leaves(case), options_text(case.options))
        names = case.operator.differentiable_outputs
        with FlopCounterMode(display=False) as backward:
            torch.autograd.backward(
                [outputs[name] for name in names], [torch.ones_like(outputs[name]) for name in names]
            )
        return forward.get_total_flops(), backward.get_total_flops()

    short, long = count(stretched(case, 64)), count(stretched(case, 128))
    assert short[0] > 0
    assert short[1] >= short[0]
    assert long[0] >= 1.9 * short[0]
    assert long[1] >= 1.9 * short[1]


# --- memory -------------------------------------------------------------------------------------------------------


def stretched(case: Case, length: int) -> Case:
    """The case with its tokens repeated up to a length."""

    def repeat(tensor: Tensor, axis: int) -> Tensor:
        times = -(-length // tensor.shape[axis])
        return torch.cat([tensor] * times, axis).narrow(axis, 0, length).contiguous()

    return widened(case, length).map(repeat)


def widened(case: Case, length: int) -> Case:
    """The case with room for `length` tokens in inputs that are read by token, beside the sequence: projections."""
    room = {
        name: tensor.repeat(*[1] * (tensor.dim() - 1), -(-length // tensor.shape[-1]))[..., :length].contiguous()
        for name, tensor in case.tensors.items()
        if name.endswith("_projection")
    }
    return case.given(**room)


def accepted_when_long(kernel: Kernel, cases: Cases, device: str) -> Iterator[Case]:
    """Cases that the kernel serves at T 32k, cheapest first: those it must serve in linear memory."""

    def flops(case: Case) -> int:
        long = stretched(case, LONG)
        return sum(case.operator.flops({n: tuple(t.shape) for n, t in long.tensors.items()}, case.options))

    offered = kernel.needs.at(device).dtypes
    dtype = torch.float32 if "float32" in offered else getattr(torch, offered[0])
    tiny = [prepared(case, dtype, device) for case in drawn(cases.draw(), 30)]
    tiny = sorted(tiny, key=lambda case: sum(tensor.numel() for tensor in case.tensors.values()))[:12]
    return (case for case in sorted(tiny, key=flops) if not refusals_of(kernel, stretched(case, LONG)))


def skip_reference(kernel: Kernel) -> None:
    if kernel.name == "eager":
        pytest.skip("needs a kernel that is not the reference, whose memory is quadratic")


def test_saved_for_backward_is_at_most_three_times_inputs_and_outputs(
    kernel: Kernel, device: str, cases: Cases, interpreted: bool
) -> None:
    skip_reference(kernel)
    case = stretched(next(accepted_when_long(kernel, cases, device)), LONG // 32 if interpreted else LONG)
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    options = case.options.model_copy(update={"kernel": (kernel.name,)})
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = case.operator(leaves(case), options_text(options))
    given_ = [*case.tensors.values(), *outputs.values()]
    assert saved
    assert sum(saved.values()) <= SAVED_PER_BYTE * sum(tensor.untyped_storage().nbytes() for tensor in given_)


@pytest.mark.parametrize(("length", "count"), [(1024, 1), pytest.param(LONG // 4, 3, marks=pytest.mark.slow)])
def test_memory_is_linear_in_the_length(
    kernel: Kernel, device: str, cases: Cases, interpreted: bool, length: int, count: int
) -> None:
    """The peak of forward and of backward, at one length and at four times that."""
    skip_reference(kernel)
    if interpreted:  # by minutes a case; what is allocated grows alike
        if count > 1:
            pytest.skip("Triton's interpreter has one case, and fewer tokens")
        length = 256
    for case in islice(accepted_when_long(kernel, cases, device), count):
        for short, long in zip(*peaks(kernel, case, length, device), strict=True):
            assert long <= 4 * GROWTH * short, case


def test_the_memory_of_all_pairs_is_not_linear(device: str) -> None:
    """Attention's reference makes them, so the test above can fail."""
    mechanism = discover()["attention"]
    case = prepared(smallest(load_entry(mechanism.cases), 1)[0], torch.float32, device)
    short, long = peaks(mechanism.kernel("eager"), case, 256, device)
    assert long[0] > 4 * GROWTH * short[0]
    assert long[1] > 4 * GROWTH * short[1]


def peaks(kernel: Kernel, case: Case, length: int, device: str) -> list[tuple[int, int]]:
    """Bytes at once in forward and in backward, beside what they are given, at one length and at four times that."""
    peak(kernel, stretched(case, length // 2), device)  # what libraries keep from their first call on is not counted
    return [peak(kernel, stretched(case, T), device) for T in (length, 4 * length)]


def peak(kernel: Kernel, case: Case, device: str) -> tuple[int, int]:
    implementation = load_entry(kernel.entry)
    grads = {name: grad.to(case.tensors[case.operator.inputs[0]].device) for name, grad in cotangents(case).items()}
    outputs: dict[str, Tensor] = {}

    def forward() -> None:
        outputs.update(implementation.forward(case.tensors, case.options))

    def backward() -> None:
        implementation.backward(grads, case.tensors, outputs, case.options)

    with torch.no_grad():
        return bytes_of(forward, device), bytes_of(backward, device)


def bytes_of(work: Callable[[], None], device: str) -> int:
    # a GPU's allocator sees all of it, and torch compiles nothing while a mode counts what operations return
    with PeakMemory() if device == "cpu" else contextlib.nullcontext() as counted:
        allocated = Clock(device).peak(work)
    return counted.peak if allocated is None else allocated


@pytest.mark.parametrize(
    ("compute", "expected"),
    [
        (lambda x: [x + 1, x + 2], 8000),
        (lambda x: (x + 1).sum(), 4004),
        (lambda x: (x + 1).mul_(2).view(10, 100).T, 4000),
        (lambda x: ((x + 1) * 2) + 3, 8000),
    ],
    ids=["two at once", "one after the other", "in place and views", "a chain"],
)
def test_peak_memory_counts(compute: Callable[[Tensor], object], expected: int) -> None:
    x = torch.zeros(1000)
    with PeakMemory() as memory:
        result = compute(x)
    assert memory.peak == expected
    del result
    assert memory.live == 0
