"""The budget itself: it keeps torch's own attention, and catches faults, in every mechanism and by every law."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attncompiler.mechanisms.attention.op import AttentionOptions
from attncompiler.mechanisms.attention.pattern import Causal, Full, SlidingWindow
from attncompiler.mechanisms.base import Kernel, Mechanism, discover, load_entry
from attncompiler.mechanisms.case import VALUE_KINDS, Case, Cases, values
from attncompiler.testing import conformance
from attncompiler.testing.budget import Oracle, Verdict, judge
from attncompiler.testing.conformance import (
    DRAWS,
    NEAR,
    Trial,
    conforms,
    cotangents,
    dtypes_of,
    evaluate,
    kernel_call,
    near,
    prepared,
    reference_call,
    refusals_of,
    truth,
)
from attncompiler.testing.poison import poisoned

ATTENTION, LINEAR = discover()["attention"], discover()["linear_attention"]
Grads = Mapping[str, Tensor]


def over(verdicts: tuple[Verdict, ...]) -> set[str]:
    return {verdict.name for verdict in verdicts if not verdict.ok}


# --- the arithmetic -----------------------------------------------------------------------------------------------


def verdict_of(got: list[float], exact: list[float], low_error: list[float]) -> Verdict:
    oracle = Oracle({"x": torch.tensor(exact).double()}, {"x": torch.tensor(low_error).double()}, eps=1e-3, scale=1.0)
    return judge({"x": torch.tensor(got).double()}, oracle)[0]


def test_a_budget_has_a_largest_error_and_an_rms() -> None:
    verdict = verdict_of([1.0, 2.5], [1.0, 2.0], [0.2, 0.2])
    assert verdict.max_error == 0.5
    assert verdict.max_budget == pytest.approx(3 * 0.2 + 16e-3)
    assert verdict.rms_error == pytest.approx(math.sqrt(0.5**2 / 2))
    assert verdict.rms_budget == pytest.approx(2 * 0.2 + 4e-3)
    assert verdict.ok
    assert not verdict_of([1.0, 2.7], [1.0, 2.0], [0.2, 0.2]).ok


def test_many_small_errors_are_over_where_one_is_not() -> None:
    low_error = [0.2] + [0.0] * 99
    assert verdict_of([0.1] + [0.0] * 99, [0.0] * 100, low_error).ok
    assert not verdict_of([0.1] * 100, [0.0] * 100, low_error).ok


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_over(bad: float) -> None:
    assert not verdict_of([bad, 1.0], [1.0, 1.0], [1.0, 1.0]).ok


def test_an_infinite_truth_is_met_exactly_or_not_at_all() -> None:
    assert verdict_of([-math.inf, 1.0], [-math.inf, 1.0], [0.0, 0.0]).ok
    assert not verdict_of([-1e30, 1.0], [-math.inf, 1.0], [0.0, 0.0]).ok


def test_what_the_dtype_cannot_hold_is_not_judged() -> None:
    assert verdict_of([math.inf, 1.0], [1e6, 1.0], [math.inf, 0.0]).ok


def of_scale(scale: float, got: list[float], low_error: list[float]) -> tuple[dict[str, Tensor], Oracle]:
    """Results where 1, 1, ... are expected, and their oracle, all of them times `scale`."""
    found, lost = (scale * torch.tensor(each).double() for each in (got, low_error))
    return {"x": found}, Oracle({"x": torch.full_like(found, scale)}, {"x": lost}, eps=1e-3, scale=scale)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_calls_judged_together_are_one_tensor_whatever_their_scale(scale: float) -> None:
    first, second = of_scale(1.0, [1.0, 1.5], [0.0, 0.0]), of_scale(scale, [1.0, 1.2], [0.1, 0.3])
    verdict = judge(*first, second)[0]
    assert not judge(*first)[0].ok
    assert verdict.max_error == 0.5
    assert verdict.max_budget == pytest.approx(3 * 0.3 + 16e-3)
    assert verdict.rms_error == pytest.approx(math.sqrt((0.5**2 + 0.2**2) / 4))
    assert verdict.rms_budget == pytest.approx(2 * math.sqrt((0.1**2 + 0.3**2) / 4) + 4e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_over_in_any_call(bad: float) -> None:
    sound, spoilt = of_scale(1.0, [1.0, 1.0], [1.0, 1.0]), of_scale(1e9, [1.0, bad], [1.0, 1.0])
    assert judge(*sound, sound)[0].ok
    assert not judge(*sound, spoilt)[0].ok
    assert not judge(*spoilt, sound)[0].ok


def test_results_must_be_those_expected() -> None:
    oracle = Oracle({"x": torch.zeros(2).double()}, {"x": torch.zeros(2).double()}, 1e-3, 1.0)
    with pytest.raises(ValueError, match="expected"):
        judge({}, oracle)
    with pytest.raises(ValueError, match="shape"):
        judge({"x": torch.zeros(1, 2)}, oracle)


# --- it keeps torch's own attention -------------------------------------------------------------------------------


def torch_sdpa(case: Case) -> dict[str, Tensor]:
    """F.scaled_dot_product_attention, causal; its lse is of no concern here."""
    q, k, v = (case.tensors[name].transpose(1, 2) for name in "qkv")
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    return {"out": out, "lse": reference_call(ATTENTION)(case)["lse"]}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_budget_keeps_torch_sdpa(dtype: torch.dtype) -> None:
    @settings(max_examples=15, deadline=None, database=None)
    @given(*[st.sampled_from(VALUE_KINDS)] * 3, st.integers(1, 300), st.sampled_from([8, 32, 64]), st.integers(0, 999))
    def check(q_kind: str, k_kind: str, v_kind: str, T: int, D: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        kinds = {"q": q_kind, "k": k_kind, "v": v_kind}
        tensors = {name: values(kind, (1, T, 2, D), generator) for name, kind in kinds.items()}
        operator = load_entry(ATTENTION.operator)
        case = prepared(Case(operator, tensors, AttentionOptions(), causal=True), dtype)
        assert not over(verdicts := conforms(ATTENTION, torch_sdpa, case, dtype)), "\n".join(map(str, verdicts))

    check()


# --- it catches faults --------------------------------------------------------------------------------------------


def test_a_kernel_wrong_by_one_percent_is_over(
    mechanism: Mechanism, kernel: Kernel, device: str, cases: Cases, for_cases: Callable[..., None]
) -> None:
    """Every output and gradient by itself somewhere, and all of them together everywhere."""
    of_float32(kernel, device)
    caught: set[str] = set()
    seen: set[str] = set()

    def check(case: Case) -> None:
        case = prepared(case, torch.float32, device)
        if refusals_of(kernel, case):
            return
        grads = cotangents(case)
        results, expected = (
            evaluate(kernel_call(kernel.name), case, grads),
            truth(mechanism, case, torch.float32, grads),
        )
        wrong = over(judge({name: tensor * 1.01 for name, tensor in results.items()}, expected))
        assert wrong
        caught.update(wrong)
        seen.update(name for name, tensor in expected.exact.items() if tensor.isfinite().any() and tensor.any())

    for_cases(check, cases.draw(), share=4)
    assert seen
    assert seen <= caught


def test_one_wrong_element_is_over(
    mechanism: Mechanism, kernel: Kernel, device: str, cases: Cases, for_cases: Callable[..., None]
) -> None:
    of_float32(kernel, device)
    wrong: list[bool] = []

    def check(case: Case, place: int) -> None:
        case = prepared(case, torch.float32, device)
        if refusals_of(kernel, case):
            return
        grads = cotangents(case)
        results, expected = (
            evaluate(kernel_call(kernel.name), case, grads),
            truth(mechanism, case, torch.float32, grads),
        )
        name = case.operator.differentiable_outputs[0]
        # a sum of few numbers is one draw of roundings, which alone may be over: `conforms` draws it again
        already = over(judge(results, expected))
        flat = results[name].flatten()
        flat[place % len(flat)] += 0.01 * expected.scale
        found = over(judge(results | {name: flat.view_as(results[name])}, expected))
        assert found == {name} | already
        wrong.append(name not in already)

    for_cases(check, cases.draw(), st.integers(0, 10**6))
    assert sum(wrong) > len(wrong) / 2


def of_float32(kernel: Kernel, device: str) -> None:
    """Skip for a kernel that takes 16 bits alone, whose own roundings are as large as these faults."""
    if "float32" not in dtypes_of(kernel, device):
        pytest.skip(f"{kernel.name} takes no float32")


def off_by_one_window(case: Case) -> dict[str, Tensor]:
    """A copy of the reference whose window reaches one key too far."""
    pattern = case.options.pattern
    options = case.options.model_copy(update={"pattern": pattern.model_copy(update={"window": pattern.window + 1})})
    return reference_call(ATTENTION)(replace(case, options=options))


def top_left(case: Case) -> dict[str, Tensor]:
    """A copy of the reference that aligns the first query with the first key, as torch's is_causal does."""
    (B, T), S = case.tensors["q"].shape[:2], case.tensors["k"].shape[1]
    places = {"q_positions": torch.arange(T).expand(B, T), "kv_positions": torch.arange(S).expand(B, S)}
    return reference_call(ATTENTION)(case.given(**places))


def detached_scale(case: Case) -> dict[str, Tensor]:
    """A copy of the reference whose output is right and whose gradient of k is not."""
    return reference_call(ATTENTION)(case.given(k=case.tensors["k"] * 0.5 + case.tensors["k"].detach() * 0.5))


@pytest.mark.parametrize(("fault", "S"), [(off_by_one_window, 20), (top_left, 30), (detached_scale, 20)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_planted_fault_of_attention_is_over(
    fault: Callable[[Case], dict[str, Tensor]], S: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (2, 20, 2, 16), "k": (2, S, 1, 16), "v": (2, S, 1, 16)}
    tensors = {name: values("normal", shape, generator) for name, shape in shapes.items()}
    options: Any = AttentionOptions(pattern=SlidingWindow(window=7))
    case = prepared(Case(load_entry(ATTENTION.operator), tensors, options, causal=True), dtype)
    assert not over(conforms(ATTENTION, reference_call(ATTENTION), case, dtype))
    assert over(conforms(ATTENTION, fault, case, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_gradient_that_is_wrong_in_some_columns_is_over_at_a_few_hundred_tokens(
    dtype: torch.dtype, name: str
) -> None:
    """As FlashAttention-4's was: the last columns of one tile of tokens hold other numbers, of the size of theirs."""
    generator = torch.Generator().manual_seed(0)
    tensors = {each: values("normal", (1, 300, 2, 40), generator) for each in "qkv"}
    case = prepared(Case(load_entry(ATTENTION.operator), tensors, AttentionOptions(), causal=True), dtype)
    assert not over(conforms(ATTENTION, reference_call(ATTENTION), case, dtype))

    def spoiled(case: Case, grads: Grads) -> dict[str, Tensor]:
        found = evaluate(reference_call(ATTENTION), case, grads)
        wrong = found[f"grad {name}"].clone()
        wrong[:, 64:128, :, 32:] = wrong[:, 128:192, :, 32:]
        return found | {f"grad {name}": wrong}

    assert over(Trial(ATTENTION, case, dtype).verdicts(spoiled)) == {f"grad {name}"}


@pytest.mark.parametrize("causal", [False, True])
def test_a_logarithm_is_held_to_its_own_scale(causal: bool) -> None:
    """It is an input to the other results, not to itself: its error is measured by its size, not by its square."""
    generator = torch.Generator().manual_seed(0)
    tensors = {each: values("normal", (1, 1024, 1, 40), generator) for each in "qkv"}
    options = AttentionOptions(pattern=Causal() if causal else Full())
    case = prepared(Case(load_entry(ATTENTION.operator), tensors, options, causal=causal), torch.bfloat16)
    results = evaluate(reference_call(ATTENTION), case, cotangents(case))
    expected = truth(ATTENTION, case, torch.bfloat16, cotangents(case))
    assert not over(judge(results, expected))
    assert over(judge(results | {"lse": results["lse"] + 1.2}, expected)) == {"lse"}


# --- many draws ---------------------------------------------------------------------------------------------------


def test_a_near_case_has_other_floats_and_the_same_sense(mechanism: Mechanism, cases: Cases) -> None:
    @settings(max_examples=10, deadline=None, database=None)
    @given(st.one_of(cases.draw(), cases.extras()), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    def check(case: Case, dtype: torch.dtype) -> None:
        case = prepared(case, dtype)
        found, again = near(case, 3), near(case, 3)
        assert near(case, 0) is case
        for name, tensor in case.tensors.items():
            moved = found.tensors[name]
            assert moved.dtype == tensor.dtype
            assert torch.equal(moved, again.tensors[name])
            if not tensor.is_floating_point():
                assert torch.equal(moved, tensor)
                continue
            assert ((moved == 0) == (tensor == 0)).all()
            assert (moved.abs() <= tensor.abs()).all()
            least = (1 - NEAR) * tensor.double().abs() * (1 - torch.finfo(tensor.dtype).eps)
            assert (moved.double() * tensor.double().sign() >= least).all()
            assert tensor.numel() < 100 or not tensor.any() or not torch.equal(moved, tensor)

    check()


def test_a_near_case_keeps_what_is_infinite() -> None:
    tensors = {name: torch.tensor([-math.inf, 0.0, math.inf, -1e4]) for name in "qkv"}
    moved = near(Case(load_entry(ATTENTION.operator), tensors, AttentionOptions(), causal=True), 1).tensors["q"]
    assert moved[:3].tolist() == [-math.inf, 0.0, math.inf]
    assert -1e4 < moved[3] < -1e4 * (1 - NEAR)


def spoiled(case: Case, name: str, error: float, often: bool) -> Callable[[Case, Grads], dict[str, Tensor]]:
    """The reference's results, with one tensor off by `error` in the case itself alone, or in any near to it."""

    def results(near: Case, grads: Grads) -> dict[str, Tensor]:
        found = evaluate(reference_call(ATTENTION), near, grads)
        return found | {name: found[name] + error} if often or near is case else found

    return results


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_tensor_over_the_budget_by_luck_is_not_and_one_always_over_is(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: values("normal", (1, 20, 2, 16), generator) for name in "qkv"}
    case = prepared(Case(load_entry(ATTENTION.operator), tensors, AttentionOptions(), causal=True), dtype)
    trial = Trial(ATTENTION, case, dtype)
    sound = {verdict.name: verdict for verdict in trial.verdicts(spoiled(case, "out", 0.0, often=False))}
    for name in ("grad q", "out"):
        lucky = 1.2 * sound[name].rms_budget
        assert over(trial.verdicts(spoiled(case, name, lucky, often=True))) == {name}
        assert over(trial.verdicts(spoiled(case, name, lucky, often=False))) == set()
        # sixteen draws dilute an rms by four, and a largest error by nothing
        assert over(trial.verdicts(spoiled(case, name, 5 * lucky, often=False))) == {name}


def favor(seed: int, T: int, R: int, **options: Any) -> Case:
    """A call of linear attention on random features, in fp64: exponentials, of few numbers where T and R are small."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: values("normal", (1, T, 1, 8), generator) for name in "qkv"}
    tensors["projection"] = torch.randn(R, 8, generator=generator).double()
    operator = load_entry(LINEAR.operator)
    case = Case(operator, tensors, operator.options(feature_map="favor", **options), causal=True)
    return prepared(case, torch.float64)


FOUND = [
    (84, 1, 1, True),
    (199, 1, 1, True),
    (280, 1, 1, True),
    (47, 2, 1, True),
    (213, 2, 1, True),
    (175, 8, 7, False),
]
"""seed, T, R and normalize of calls that one draw put over the budget: the reference lost too little of them in fp32"""


@pytest.mark.parametrize(("seed", "T", "R", "normalize"), FOUND)
def test_one_rounding_does_not_decide(seed: int, T: int, R: int, normalize: bool) -> None:
    case = favor(seed, T, R, normalize=normalize)
    verdicts = conforms(LINEAR, kernel_call("chunkwise"), case, torch.float64)
    assert not over(verdicts), "\n".join(map(str, verdicts))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_an_estimate_that_is_lucky_once_excuses_no_fault(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference loses 32 eps of every result, but of the case itself nothing: a kernel may lose as much."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: values("normal", (1, 20, 2, 16), generator) for name in "qkv"}
    case = prepared(Case(load_entry(ATTENTION.operator), tensors, AttentionOptions(), causal=True), dtype)

    def lucky(mechanism: Mechanism, each: Case, dtype: torch.dtype, grads: Grads) -> Oracle:
        found = truth(mechanism, each, dtype, grads)
        loss = 0.0 if each is case else 32 * found.eps * found.scale
        return replace(found, low_error={name: torch.full_like(error, loss) for name, error in found.low_error.items()})

    monkeypatch.setattr(conformance, "truth", lucky)
    trial = Trial(ATTENTION, case, dtype)
    drawn: list[Case] = []

    def losing(units: float, times: float = 1.0, single: float = 0.0) -> Callable[[Case, Grads], dict[str, Tensor]]:
        """Results off by so many eps, all of them `times` what they are, one element off by `single` eps in draw 0."""

        def results(near: Case, grads: Grads) -> dict[str, Tensor]:
            drawn.append(near)
            oracle = truth(ATTENTION, near, dtype, grads)
            unit = oracle.eps * oracle.scale
            found = {name: exact * times + units * unit for name, exact in oracle.exact.items()}
            if near is case:
                found["out"][0, -1, 0, 0] += single * unit
            return found

        return results

    assert over(judge(losing(32)(case, cotangents(case)), lucky(ATTENTION, case, dtype, cotangents(case))))
    drawn.clear()
    assert not over(trial.verdicts(losing(2)))
    assert len(drawn) == 1
    drawn.clear()
    assert not over(trial.verdicts(losing(32)))
    assert drawn[0] is case
    assert len(set(map(id, drawn))) == len(drawn) == DRAWS
    assert over(trial.verdicts(losing(5 * 32))) == {"out", "lse", "grad q", "grad k", "grad v"}
    assert over(trial.verdicts(losing(2, times=1.01))) >= {"out", "lse"}
    assert over(trial.verdicts(losing(2, single=100 * 16))) == {"out"}


def test_faults_are_over_in_many_draws(
    mechanism: Mechanism,
    kernel: Kernel,
    device: str,
    cases: Cases,
    for_cases: Callable[..., None],
    interpreted: bool,
) -> None:
    """All results wrong by one percent, in every draw; and one element of the case itself, right near to it."""

    def check(case: Case, place: int) -> None:
        case = prepared(case, torch.float32, device)
        if refusals_of(kernel, case):
            return
        name, call = case.operator.differentiable_outputs[0], kernel_call(kernel.name)
        trial, error = Trial(mechanism, case, torch.float32), 0.0

        def off_by_a_percent(near: Case, grads: Grads) -> dict[str, Tensor]:
            return {each: tensor * 1.01 for each, tensor in evaluate(call, near, grads).items()}

        def off_at_one_place(near: Case, grads: Grads) -> dict[str, Tensor]:
            results = evaluate(call, near, grads)
            if near is case:
                flat = results[name].flatten()
                flat[place % len(flat)] += error
                results[name] = flat.view_as(results[name])
            return results

        sound = {verdict.name: verdict for verdict in trial.verdicts(off_at_one_place)}
        assert over(trial.verdicts(off_by_a_percent))
        error = 100 * sound[name].max_budget
        assert over(trial.verdicts(off_at_one_place)) == {name}

    # fifty calls a case, each of which Triton's interpreter may take ten seconds for
    for_cases(check, cases.draw(), st.integers(0, 10**6), share=0.05 if interpreted else 0.5)


# --- uninitialised memory -----------------------------------------------------------------------------------------


def test_uninitialised_memory_is_nan_while_poisoned() -> None:
    x = torch.ones(3)
    with poisoned():
        made = (torch.empty(3), torch.empty_like(x), x.new_empty(3), torch.empty_strided((3,), (1,)))
        assert not torch.empty(3, dtype=torch.int64).dtype.is_floating_point
    assert all(tensor.isnan().all() for tensor in made)
    assert not torch.zeros(3).isnan().any()


def test_a_kernel_that_leaves_a_row_unwritten_is_over(mechanism: Mechanism, cases: Cases) -> None:
    def unwritten(case: Case) -> dict[str, Tensor]:
        results = reference_call(mechanism)(case)
        name = case.operator.differentiable_outputs[0]
        out = torch.empty_like(results[name])
        out[:, 1:] = results[name][:, 1:]
        return results | {name: out}

    @settings(max_examples=3, deadline=None, database=None)
    @given(cases.draw())
    def check(case: Case) -> None:
        name = case.operator.differentiable_outputs[0]
        assert name in over(conforms(mechanism, unwritten, prepared(case, torch.float32), torch.float32))

    check()
