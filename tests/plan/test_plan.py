"""Plans: which kernels are chosen, what is refused and how it is said."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_specs import NAMES, ROOT, example, small

from attncompiler import pipeline, targets
from attncompiler.errors import ArtifactError, Diagnostic, PlanError
from attncompiler.mechanisms.base import ANY, OneOf, discover
from attncompiler.planning import Plan, plan
from attncompiler.spec import dump, parse
from attncompiler.spec.model import ModelSpec
from attncompiler.targets.detect import Environment, detect_environment, detect_target

ATTENTION = "{{kind: attention, num_attention_heads: 4{}}}"
CAUSAL = ATTENTION.format("")


def attempt(spec: ModelSpec, target: str) -> tuple[Plan | None, Sequence[Diagnostic]]:
    try:
        return plan(spec, target), ()
    except PlanError as error:
        return None, error.diagnostics


def codes(error: pytest.ExceptionInfo[PlanError]) -> list[str]:
    return [diagnostic.code for diagnostic in error.value.diagnostics]


@pytest.mark.parametrize("target", targets.names())
@pytest.mark.parametrize("name", NAMES)
def test_every_target_times_every_spec_plans_or_refuses_with_reasons(name: str, target: str) -> None:
    spec = example(name)
    made, faults = attempt(spec, target)
    if made is None:
        assert faults
        assert all("refuses: " in diagnostic.message for diagnostic in faults)
        return
    assert len(made.layers) == len(spec.resolved_layers)
    for index, (layer, resolved) in enumerate(zip(made.layers, spec.resolved_layers, strict=True)):
        assert (layer.index, layer.policy, layer.mechanism) == (index, resolved.policy_name, resolved.policy.kind)
        assert layer.chain
        assert layer.choice.cost.parameters > 0
        considered = [*layer.chain, *(refused.kernel for refused in layer.refusals)]
        assert len(considered) == len(set(considered))
        assert set(considered) <= set(discover()[layer.mechanism].names)
        assert all(refused.reasons for refused in layer.refusals)
    assert Plan.from_json(made.to_json()) == made
    assert Plan.from_json(made.to_json()).to_json() == made.to_json()


@pytest.mark.parametrize("name", NAMES)
def test_golden_plans(name: str, request: pytest.FixtureRequest) -> None:
    spec = example(name)
    for target in (each if isinstance(each, str) else each.name for each in spec.targets):
        path = ROOT / "tests" / "golden" / "plans" / f"{name}.{target}.json"
        text = plan(spec, target).to_json()
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.read_text(encoding="utf-8") == text, f"pytest --update-golden rewrites {path.name}"


def test_auto_follows_the_mechanism_and_fallback_order_replaces_it() -> None:
    auto = plan(small(CAUSAL), "cpu")
    assert auto.layers[0].chain == ("sdpa", "chunkwise", "eager")
    ordered = small(CAUSAL, fallback="{order: {attention: [eager, sdpa]}}")
    assert plan(ordered, "cpu").layers[0].chain == ("eager", "sdpa")
    assert plan(small(CAUSAL, fallback="{order: {attention: auto}}"), "cpu") == auto


def test_a_window_is_served_in_bands_on_a_cpu() -> None:
    window = ATTENTION.format(", pattern: {kind: sliding_window, window: 8}")
    assert plan(small(window), "cpu").layers[0].chain[0] == "chunkwise"


@given(st.lists(st.sampled_from(["sdpa", "chunkwise", "eager", "ring", "host"]), min_size=1, unique=True))
def test_a_list_is_exhaustive_and_keeps_its_order(names: list[str]) -> None:
    spec = small(ATTENTION.format(f", kernel: [{', '.join(names)}]"))
    built = [name for name in names if discover()["attention"].kernel(name)]
    if not built:
        with pytest.raises(PlanError) as error:
            plan(spec, "cpu")
        assert codes(error) == ["E201"]
        assert all(f"{name} is not built in this version" in str(error.value) for name in names)
        return
    layer = plan(spec, "cpu").layers[0]
    assert list(layer.chain) == built
    assert [refused.kernel for refused in layer.refusals] == [name for name in names if name not in built]
    assert layer.choice.demanded is None


def test_a_single_name_is_a_demand() -> None:
    demanded = plan(small(ATTENTION.format(", kernel: eager")), "cpu").layers[0]
    assert (demanded.choice.demanded, demanded.chain) == ("eager", ("eager",))
    with pytest.raises(PlanError) as error:
        plan(small(ATTENTION.format(", kernel: cudnn")), "cpu")
    assert codes(error) == ["E202"]
    assert (
        "policy 'p0' (attention, layers.0) on cpu: the kernel it demands refuses: cudnn: cudnn runs on cuda only"
        in str(error.value)
    )


UNBUILT = [
    ("pattern: {kind: strided, stride: 4, window: 4}", "pattern.kind 'strided'", "pattern", "kind"),
    ("attn_logit_softcapping: 50.0", "attn_logit_softcapping", "attn_logit_softcapping"),
    ("sinks: true", "sinks", "sinks"),
    ("alibi: true", "alibi", "alibi"),
    ("attention_dropout: 0.1", "attention_dropout", "attention_dropout"),
]


@pytest.fixture
def older(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention as a version had it whose kernels offered three patterns and no option of a score."""
    attention = discover()["attention"]
    offered = {
        "pattern": OneOf("causal", "full", "sliding_window"),
        **dict.fromkeys(("deterministic", "head_dim", "mask_bytes", "band_mask_bytes"), ANY),
    }
    plain = [kernel for kernel in attention.kernels if "cpu" in kernel.needs.device_types]
    kernels = tuple(replace(kernel, needs=replace(kernel.needs, features=offered, on={})) for kernel in plain)
    monkeypatch.setitem(discover(), "attention", replace(attention, kernels=kernels))  # type: ignore[arg-type]


@pytest.mark.usefixtures("older")
@pytest.mark.parametrize(("option", "said", "path"), [(o, said, path) for o, said, *path in UNBUILT])
def test_an_option_that_no_kernel_offers_is_said_to_be_unbuilt_where_it_stands(
    option: str, said: str, path: list[str]
) -> None:
    spec = small(ATTENTION.format(f", {option}"))
    with pytest.raises(PlanError) as error:
        plan(spec, "cpu")
    [fault] = error.value.diagnostics
    assert fault.code == "E203"
    assert fault.message == f"policy 'p0': {said} is not built in this version of attncompiler"
    assert fault.location is not None
    assert fault.location == spec.place("policies", "p0", *path) != spec.place("policies", "p0")


@pytest.mark.usefixtures("older")
def test_an_unbuilt_pattern_names_those_that_are_built() -> None:
    with pytest.raises(PlanError, match=r"E203.*; built are causal, full, sliding_window$"):
        plan(small(ATTENTION.format(", pattern: {kind: strided, stride: 4, window: 4}")), "cpu")


def test_a_refused_policy_is_placed_where_its_kernels_are_named() -> None:
    """At its kernel, else at the order for its mechanism, else at itself."""
    for kernel, code in ((", kernel: cudnn", "E202"), (", kernel: [cudnn]", "E201")):
        spec = small(ATTENTION.format(kernel))
        with pytest.raises(PlanError) as error:
            plan(spec, "cpu")
        assert codes(error) == [code]
        assert error.value.diagnostics[0].location == spec.place("policies", "p0", "kernel")
    order = "{order: {attention: [cudnn]}}"
    ordered = small(CAUSAL, fallback=order)
    with pytest.raises(PlanError) as error:
        plan(ordered, "cpu")
    there = error.value.diagnostics[0].location
    assert there == ordered.place("fallback", "order", "attention") != ordered.place("fallback")
    both = small(ATTENTION.format(", kernel: [cudnn]"), fallback=order)
    with pytest.raises(PlanError) as error:
        plan(both, "cpu")
    assert error.value.diagnostics[0].location == both.place("policies", "p0", "kernel") != both.place("policies", "p0")


@pytest.mark.usefixtures("older")
def test_a_spec_is_equal_to_one_from_elsewhere_and_one_made_in_python_has_no_places() -> None:
    spec = small(ATTENTION.format(", sinks: true"))
    bare = ModelSpec.model_validate(spec.model_dump())
    assert bare == spec
    assert bare.place("policies", "p0") is None
    with pytest.raises(PlanError) as error:
        plan(bare, "cpu")
    assert error.value.diagnostics[0].location is None


@pytest.mark.usefixtures("older")
def test_all_faults_of_all_policies_at_once() -> None:
    spec = small(
        ATTENTION.format(", kernel: triton"),
        CAUSAL,
        ATTENTION.format(", pattern: {kind: chunked, chunk: 4}"),
        layers="[{policy: p0, repeat: 3}, {policy: p1}, {policy: p2}]",
    )
    with pytest.raises(PlanError) as error:
        plan(spec, "cpu")
    assert codes(error) == ["E203", "E202"]
    assert "policy 'p0' (attention, 3 layers, the first layers.0)" in str(error.value)
    assert "policy 'p2': pattern.kind 'chunked'" in str(error.value)


def test_routes_are_said_to_be_unbuilt_before_kernels_are_asked() -> None:
    spec = small(ATTENTION.format(', kernel: triton, routes: [{when: "seq_len > 64", pattern: {kind: full}}]'))
    with pytest.raises(PlanError) as error:
        plan(spec, "cpu")
    assert codes(error) == ["E203"]
    assert "policy 'p0': routes are not built in this version of attncompiler" in str(error.value)


def test_a_policy_that_no_layer_uses_is_not_planned() -> None:
    spec = small(CAUSAL, ATTENTION.format(", kernel: triton"), layers="[{policy: p0}]")
    assert len(plan(spec, "cpu").layers) == 1


def test_a_listed_target_does_not_depend_on_the_machine() -> None:
    spec = small(CAUSAL)
    assert not plan(spec, "h200").here
    assert plan(spec, "h200") == plan(spec, targets.get("h200"))


def test_here_a_layer_without_a_kernel_is_recorded_and_required_later() -> None:
    spec = small(ATTENTION.format(", kernel: cudnn"))
    made = plan(spec, detect_target("cpu"), detect_environment())
    assert made.here
    assert made.layers[0].chain == ()
    with pytest.raises(PlanError) as error:
        made.require(spec)
    assert codes(error) == ["E202"]
    served = plan(small(CAUSAL), detect_target("cpu"), detect_environment())
    assert served.require(spec) is served


def test_a_value_width_that_is_the_head_width_asks_for_nothing() -> None:
    """Whether it is written out or follows from hidden_size makes no difference."""
    for widths in ("v_head_dim: 8", "head_dim: 8, v_head_dim: 8", "head_dim: 8"):
        assert plan(small(ATTENTION.format(f", {widths}")), "cpu").layers[0].chain[0] == "sdpa", widths
    assert plan(small(ATTENTION.format(", v_head_dim: 4")), "cpu").layers[0].chain[0] == "chunkwise"


def test_what_is_not_installed_counts_only_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that needs a package: listed targets plan it, a machine without the package refuses it in words."""
    from dataclasses import replace

    from attncompiler.planning import planner

    attention = discover()["attention"]
    first, *rest = [kernel for kernel in attention.kernels if "cpu" in kernel.needs.device_types]
    needy = replace(first, needs=replace(first.needs, packages={"flash_attn": "pip install flash-attn-4"}))
    changed = {"attention": replace(attention, kernels=(needy, *rest))}
    monkeypatch.setattr(planner, "discover", lambda: changed)
    spec, bare = small(CAUSAL), Environment({}, "3.11", "Linux")
    assert plan(spec, "cpu").layers[0].chain[0] == first.name
    layer = plan(spec, "cpu", bare).layers[0]
    assert first.name not in layer.chain
    assert [(reason.source, str(reason)) for reason in layer.refusals[0].reasons] == [
        ("environment", "flash_attn is not installed: pip install flash-attn-4")
    ]
    assert plan(spec, "cpu", Environment({"flash_attn": "4.0"}, "3.11", "Linux")).layers[0].chain[0] == first.name


def test_deterministic_and_dtype_are_asked_of_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from attncompiler.planning import planner

    attention = discover()["attention"]
    first, second, *rest = [kernel for kernel in attention.kernels if "cpu" in kernel.needs.device_types]
    loose = replace(
        first,
        needs=replace(first.needs, features={k: v for k, v in first.needs.features.items() if k != "deterministic"}),
    )
    narrow = replace(second, needs=replace(second.needs, dtypes=("bfloat16",)))
    changed = {"attention": replace(attention, kernels=(loose, narrow, *rest))}
    monkeypatch.setattr(planner, "discover", lambda: changed)
    layer = plan(small(CAUSAL, deterministic=True), "cpu").layers[0]
    reasons = {refused.kernel: str(refused) for refused in layer.refusals}
    assert reasons[first.name] == f"{first.name}: {first.name} does not offer deterministic"
    assert reasons[second.name] == f"{second.name}: {second.name} does not take float32"


def test_a_damaged_plan_is_a_named_error() -> None:
    text = plan(small(CAUSAL), "cpu").to_json()
    data = json.loads(text)
    for broken, code in [
        (text[: len(text) // 2], "E302"),
        ("[]", "E303"),
        (json.dumps({**data, "format": 99}), "E303"),
        (json.dumps({**data, "policies": [{}]}), "E302"),
        (json.dumps({**data, "surprise": 1}), "E302"),
        (json.dumps({**data, "order": ["p0", "p1"]}), "E302"),
    ]:
        with pytest.raises(ArtifactError) as error:
            Plan.from_json(broken)
        assert error.value.diagnostics[0].code == code


@pytest.mark.usefixtures("older")
def test_the_refusals_of_every_listed_target_are_said_at_once() -> None:
    spec = parse(dump(small(ATTENTION.format(", kernel: cudnn"))), overrides=["targets=[cpu, h200, mi300x]"])
    with pytest.raises(PlanError) as error:
        pipeline.plan(spec)
    assert codes(error) == ["E202"] * 3
    assert all(f"on {target}: " in str(error.value) for target in ("cpu", "h200", "mi300x"))
    unbuilt = parse(dump(spec), overrides=["policies.p0={kind: attention, num_attention_heads: 4, sinks: true}"])
    with pytest.raises(PlanError) as error:
        pipeline.plan(unbuilt)
    assert codes(error) == ["E203"], "what holds on all targets is said once"
