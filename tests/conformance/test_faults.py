"""Every law of test_laws.py can fail: a fault is planted in the reference, and the law's programs show it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import Phase, given, settings
from torch import Tensor

from attncompiler.mechanisms.base import Mechanism, discover, load_entry
from attncompiler.mechanisms.case import Case, Cases
from attncompiler.testing import laws
from attncompiler.testing.conformance import Call, conforms, prepared, reference_call

SLIGHTLY = 1e-4
ENOUGH = 5
Fault = Callable[[Call], Call]


def leaking(leak: Callable[[Case, Tensor], Tensor]) -> Fault:
    """A call whose first output is moved slightly by what `leak` makes of it."""

    def fault(call: Call) -> Call:
        def faulty(case: Case) -> dict[str, Tensor]:
            results, name = call(case), case.operator.outputs[0]
            return results | {name: results[name] + SLIGHTLY * leak(case, results[name])}

        return faulty

    return fault


def deaf_to(*prefixes: str) -> Fault:
    """A call that ignores inputs whose names begin so."""

    def fault(call: Call) -> Call:
        return lambda case: call(case.given(**{name: None for name in case.tensors if name.startswith(prefixes)}))

    return fault


def contiguous_only(call: Call) -> Call:
    """A call that reads memory as if it were contiguous."""

    def faulty(case: Case) -> dict[str, Tensor]:
        read = {
            name: t.as_strided(t.shape, torch.empty(t.shape).stride()) for name, t in case.tensors.items() if t.dim()
        }
        return call(case.given(**read))

    return faulty


from_later_tokens = leaking(lambda case, out: out.sum(1, keepdim=True) - out.cumsum(1))
from_other_rows = leaking(lambda case, out: out.flip(0) - out)
from_chunk_size = leaking(lambda case, out: out / case.options.chunk_size)
from_group = leaking(lambda case, out: out * (case.tensors["q"].shape[2] - case.tensors["k"].shape[2]))


def finds(mechanism: Mechanism, cases: Cases, fault: Fault, law: Callable[[Case], laws.Statement | None]) -> bool:
    """Whether a law's programs show the fault in one of some drawn cases; without the fault they must show none."""
    sound, caught = reference_call(mechanism), []

    @settings(max_examples=30, deadline=None, database=None, derandomize=True, phases=(Phase.generate,))
    @given(cases.draw())
    def look(case: Case) -> None:
        statement = (
            law(prepared(case, torch.float64))
            if len(caught) < ENOUGH and not any(caught) and laws.length(case) > 2
            else None
        )
        if statement is None:
            return
        case, programs = statement
        over = {}
        for call in (sound, fault(sound)):
            verdicts = [v for program in programs for v in conforms(mechanism, call, case, torch.float64, program)]
            over[call] = [str(verdict) for verdict in verdicts if not verdict.ok]
        assert not over[sound], "\n".join(over[sound])
        caught.append(len(over) == 2 and bool(over[call]))

    look()
    if not caught:
        pytest.skip(f"needs a case that the law speaks of, and {mechanism.name} draws none")
    return any(caught)


def test_causality_can_fail(mechanism: Mechanism, cases: Cases) -> None:
    assert finds(mechanism, cases, from_later_tokens, lambda case: laws.causality(case, laws.length(case) // 2))


@pytest.mark.offers("segment_ids")
def test_segments_can_fail(mechanism: Mechanism, cases: Cases) -> None:
    assert finds(mechanism, cases, deaf_to("segment_ids"), lambda case: laws.segments(case, 1))


@pytest.mark.offers("attention_mask")
def test_padding_can_fail(mechanism: Mechanism, cases: Cases) -> None:
    assert finds(mechanism, cases, deaf_to("attention_mask"), lambda case: laws.padding(case, 3))


def test_rows_can_fail(mechanism: Mechanism, cases: Cases, batched: frozenset[str]) -> None:
    assert finds(mechanism, cases, from_other_rows, lambda case: laws.rows(case, batched))


@pytest.mark.offers("initial_*", "final_*")
def test_splitting_can_fail(mechanism: Mechanism, cases: Cases) -> None:
    assert finds(mechanism, cases, deaf_to("initial_"), lambda case: laws.splitting(case, 1))


@pytest.mark.offers("chunk_size")
def test_chunk_size_can_fail(mechanism: Mechanism, cases: Cases) -> None:
    assert finds(mechanism, cases, from_chunk_size, laws.chunk_size)


@pytest.mark.offers("q", "k", "v")
def test_grouped_heads_can_fail(mechanism: Mechanism, cases: Cases) -> None:
    assert finds(mechanism, cases, from_group, laws.grouped_heads)


def test_layout_can_fail(mechanism: Mechanism, cases: Cases) -> None:
    assert finds(mechanism, cases, contiguous_only, laws.layout)


def test_the_laws_apply() -> None:
    """Names that markers ask for are names that operators have, so that no law is silently held by none."""
    operators = [load_entry(mechanism.operator) for mechanism in discover().values()]
    inputs = {name for operator in operators for name in operator.inputs}
    assert {"segment_ids", "attention_mask", "q", "k", "v"} <= inputs
    assert any(name.startswith("initial_") for name in inputs)
