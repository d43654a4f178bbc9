"""The laws of sequence operators, held by every kernel, for outputs and gradients: see attncompiler/testing/laws.py."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from hypothesis import strategies as st

from attncompiler.mechanisms.base import Kernel, Mechanism
from attncompiler.mechanisms.case import Case, Cases
from attncompiler.testing import laws
from attncompiler.testing.budget import Verdict
from attncompiler.testing.conformance import (
    Trial,
    cotangents,
    evaluate,
    kernel_call,
    prepared,
    refusals_of,
    whole,
)

PLACE = st.integers(0, 10**6)
"""Where to cut a sequence, once its length is known."""


class Law:
    """Holds one kernel to a law on the drawn cases that it speaks of; when it served none, the test is skipped."""

    def __init__(self, mechanism: Mechanism, kernel: Kernel, dtype: torch.dtype, device: str):
        self.mechanism, self.kernel, self.dtype, self.device = mechanism, kernel, dtype, device
        self.call = kernel_call(kernel.name)
        self.served = 0
        self.reasons: set[str] = set()

    def prepare(self, case: Case) -> Case | None:
        """The case as the kernel is given it, or None when the kernel refuses it."""
        case = prepared(case, self.dtype, self.device)
        reasons = refusals_of(self.kernel, case)
        self.reasons |= set(map(str, reasons))
        self.served += not reasons
        return None if reasons else case

    def holds(self, statement: laws.Statement | None) -> None:
        """Every program gives the results of the one call, within the budget."""
        case = self.prepare(statement[0]) if statement else None
        if case is None:
            return
        trial = Trial(self.mechanism, case, self.dtype)
        for program in statement[1]:
            check_verdicts(trial.verdicts(partial(evaluate, self.call, program=program)))

    def conclude(self) -> None:
        if not self.served:
            why = "; ".join(sorted(self.reasons)) or f"no case of {self.mechanism.name} is one that the law speaks of"
            pytest.skip(f"needs a case that {self.kernel.name} serves: {why}")


def check_verdicts(verdicts: Sequence[Verdict]) -> None:
    assert verdicts
    assert all(verdict.ok for verdict in verdicts), "\n".join(map(str, verdicts))


@pytest.fixture
def law(mechanism: Mechanism, kernel: Kernel, widest: torch.dtype, device: str) -> Law:
    return Law(mechanism, kernel, widest, device)


@pytest.fixture
def hold(law: Law, for_cases: Callable[..., None]) -> Callable[..., None]:
    """Run a check on drawn cases; there must have been some."""

    def run(check: Callable[..., None], *strategies: st.SearchStrategy, share: float = 1.0) -> None:
        for_cases(check, *strategies, share=share)
        law.conclude()

    return run


def test_nothing_depends_on_what_comes_later(law: Law, cases: Cases, hold: Callable[..., None]) -> None:
    hold(lambda case, place: law.holds(laws.causality(case, place)), cases.draw(), PLACE, share=2)


@pytest.mark.offers("segment_ids")
def test_segments_equal_separate_calls(law: Law, cases: Cases, hold: Callable[..., None]) -> None:
    hold(lambda case, place: law.holds(laws.segments(case, place)), cases.draw(), PLACE)


@pytest.mark.offers("attention_mask")
def test_padding_on_either_side_is_as_none(law: Law, cases: Cases, hold: Callable[..., None]) -> None:
    def check(case: Case, place: int) -> None:
        if not refusals_of(law.kernel, prepared(laws.padded(case, 1, 1), law.dtype, law.device)):
            law.holds(laws.padding(case, place))

    hold(check, cases.draw(), PLACE)


@pytest.mark.offers("attention_mask")
def test_padding_gives_zero_and_gets_zero(law: Law, cases: Cases, hold: Callable[..., None]) -> None:
    """Padded positions give 0, and their inputs have gradients of 0, whatever comes in from above."""

    def check(case: Case, before: int, after: int) -> None:
        T, axes = laws.length(case), case.operator.sequence
        case = law.prepare(laws.padded(case, before, after))
        if case is None:
            return
        results = evaluate(law.call, case, cotangents(case))
        names = [name for name in case.operator.differentiable_outputs if name in axes]
        names += [f"grad {name}" for name in case.operator.differentiable if name in axes and name in case.tensors]
        for name in names:
            axis = axes[name.removeprefix("grad ")]
            assert not results[name].narrow(axis, 0, before).any(), name
            assert not results[name].narrow(axis, before + T, after).any(), name

    hold(check, cases.draw(), st.integers(0, 20), st.integers(0, 20))


def test_rows_of_a_batch_are_independent(
    law: Law, cases: Cases, batched: frozenset[str], hold: Callable[..., None]
) -> None:
    any_case = st.one_of(cases.draw(), cases.extras())
    hold(lambda case: law.holds(laws.rows(case, batched)), any_case, share=2)


@pytest.mark.offers("initial_*", "final_*")
def test_a_call_may_be_split_where_a_state_is_passed_on(law: Law, cases: Cases, hold: Callable[..., None]) -> None:
    hold(lambda case, place: law.holds(laws.splitting(case, place)), cases.draw(), PLACE, share=2)


@pytest.mark.offers("chunk_size")
def test_chunk_size_does_not_matter(law: Law, cases: Cases, hold: Callable[..., None]) -> None:
    hold(lambda case: law.holds(laws.chunk_size(case)), st.one_of(cases.draw(), cases.extras()), share=0.5)


def test_tile_sizes_do_not_matter(
    law: Law, cases: Cases, hold: Callable[..., None], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """Whole numbers of 64 or more, in capitals, in a kernel's module are the sizes of its tiles: small ones give many
    tiles here."""
    if (law.kernel.name, device) == ("flex_attention", "cuda"):
        pytest.skip("on a GPU its tiles hold whole blocks of a kernel of torch's: long calls have many of them")
    module = importlib.import_module(law.kernel.entry.partition(":")[0])
    sizes = [name for name, value in vars(module).items() if name.isupper() and type(value) is int and value >= 64]
    if not sizes or ".kernels." not in module.__name__:
        pytest.skip(f"needs a kernel with tiles, and {law.kernel.name} has none")

    def check(case: Case, size: int) -> None:
        with monkeypatch.context() as patch:
            for name in sizes:
                patch.setattr(module, name, size)
            law.holds((case, (whole,)))

    hold(check, st.one_of(cases.draw(), cases.extras()), st.sampled_from((4, 16)), share=3)


@pytest.mark.offers("q", "k", "v")
def test_grouped_heads_equal_repeated_heads(law: Law, cases: Cases, hold: Callable[..., None]) -> None:
    hold(lambda case: law.holds(laws.grouped_heads(case)), cases.draw(), share=2)


def test_layout_in_memory_does_not_matter(law: Law, cases: Cases, hold: Callable[..., None]) -> None:
    hold(lambda case: law.holds(laws.layout(case)), cases.extras(), share=0.5)


def test_cotangents_of_some_outputs_alone(law: Law, cases: Cases, hold: Callable[..., None]) -> None:
    """A loss that reads one output alone: the other gradients are absent, not zero, and nothing trips over it."""

    def check(case: Case) -> None:
        if (case := law.prepare(case)) is None:
            return
        for name in cotangents(case):
            trial = Trial(law.mechanism, case, law.dtype, only=[name])
            check_verdicts(trial.verdicts(partial(evaluate, law.call)))

    hold(check, st.one_of(cases.draw(), cases.extras()), share=0.5)
