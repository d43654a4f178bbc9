"""The strategies reach the whole grammar that is built, and every draw is what it says: valid, or not."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from grammar import Element, elements, used
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import attncompiler
from attncompiler import ops
from attncompiler.errors import CATALOGUE, AttnCompilerError, PlanError, SpecError
from attncompiler.mechanisms.base import discover
from attncompiler.planning import plan
from attncompiler.spec import ModelSpec, parse, read
from attncompiler.spec.dump import given as short
from attncompiler.spec.dump import written
from attncompiler.testing.strategies import Inputs, inputs_for, invalid_specs, patterns, policies, specs
from attncompiler.testing.strategies.invalid import FAULTS, Invalid
from attncompiler.testing.strategies.policies import everything
from attncompiler.testing.strategies.specs import mappings

SPECS = sorted((Path(__file__).parents[2] / "specs").glob("*.yaml"))


def over(strategy: st.SearchStrategy[Any], look: Callable[[Any], None], examples: int, *, chosen: int = 0) -> None:
    """Call `look` with draws of a strategy, the same ones each time; nothing is shrunk."""

    @seed(chosen)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(drawn: Any) -> None:
        look(drawn)

    run()


def codes(data: dict[str, Any]) -> set[str]:
    """The codes with which a spec as plain data is refused, in validation or in planning."""
    try:
        spec = parse(written(data))
        plan(spec, "cpu")
    except AttnCompilerError as error:
        return {fault.code for fault in error.diagnostics}
    return set()


def test_every_key_and_kind_of_the_grammar_is_drawn_or_refused_with_a_code() -> None:
    """What draws never use is refused (E203), in every draw of the ungated grammar that uses it, or has no valid value
    but its default (E105): shown by running, with no list here of what is built."""
    missing = elements()
    assert len(missing) > 400
    unbuilt = _unbuilt()
    for chosen in range(12):
        over(specs(), lambda spec: missing.difference_update(used(spec)), 100, chosen=chosen)
        left = missing - unbuilt
        if len(left) < 5 and all("E105" in _codes_of(element) for element in left):
            return
    raise AssertionError(f"neither drawn nor refused: {sorted(left)}")


def _unbuilt() -> set[Element]:
    """What is refused as not built in every spec of the whole grammar that uses it."""
    refused: set[Element] = set()
    built: set[Element] = set()

    def look(data: dict[str, Any]) -> None:
        spec = parse(written(data))
        # policies that no layer uses are not planned, and so not refused
        idle = {found for name, policy in spec.policies.items() if not _is_used(spec, name) for found in used(policy)}
        (refused if "E203" in codes(data) else built).update(set(used(spec)) - idle)

    for chosen in range(3):
        over(mappings(None, everything), look, 60, chosen=chosen)
    return refused - built


def _is_used(spec: ModelSpec, name: str) -> bool:
    return any(layer.policy_name == name for layer in spec.resolved_layers)


@cache
def _codes_of(element: Element) -> set[str]:
    """The codes with which a spec is refused that is valid but for this element: a bool of a policy that is set."""
    model, name, value = element
    mechanism = next((each for each in discover().values() if each.policy.__name__ == model), None)
    if mechanism is None:
        return set()
    found: set[str] = set()

    def look(data: dict[str, Any]) -> None:
        for policy in data["policies"].values():
            if policy["kind"] == mechanism.name and value in ("key", "True", "False"):
                default = mechanism.policy.model_fields[name].default
                policy[name] = not default if value == "key" else value == "True"
                found.update(codes(data))

    for chosen in range(8):
        over(mappings(None, everything), look, 15, chosen=chosen)
    return found


def test_a_spec_that_is_drawn_says_only_what_it_was_given_and_survives_its_text() -> None:
    sizes = []

    def look(spec: ModelSpec) -> None:
        assert parse(short(spec)) == spec
        assert len(spec.resolved_layers) <= 4
        assert spec.model.hidden_size <= 64
        assert (spec.model.vocab_size or 1) <= 64
        sizes.append(len(short(spec)))

    over(specs(), look, 60)
    assert min(sizes) < 200


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_specs_near_a_base_are_of_its_kinds_and_keep_some_of_it(path: Path) -> None:
    base = read(path)
    kinds = {layer.policy.kind for layer in base.resolved_layers}
    seen: set[str] = set()
    kept = []

    def look(spec: ModelSpec) -> None:
        seen.update(policy.kind for policy in spec.policies.values())
        kept.append(spec.model.norm == base.model.norm and spec.model.block == base.model.block)
        assert spec.model.input == base.model.input
        plan(spec, "cpu")

    over(specs(base), look, 25)
    assert seen == kinds
    assert any(kept)


def test_every_draw_builds_runs_and_trains() -> None:
    """At a tiny number here; the fuzzer's tests do so for hundreds."""

    def look(inputs: Inputs) -> None:
        model = attncompiler.build(inputs.spec, device="cpu")
        out = model(**inputs.forward())
        assert out.shape[0] == inputs.batch
        if inputs.spec.model.head.kind != "none":
            model.loss(**inputs.loss()).backward()

    over(specs().flatmap(inputs_for), look, 15)


def test_inputs_are_of_every_form_and_are_made_again_from_their_numbers() -> None:
    forms: set[str] = set()

    def look(inputs: Inputs) -> None:
        again = Inputs.of(inputs.spec, inputs.plain())
        assert again == inputs
        given = inputs.forward()
        assert all(torch.equal(tensor, again.forward()[name]) for name, tensor in given.items())
        forms.update(given)
        if inputs.padding:
            forms.add(inputs.side)
            assert inputs.real().any(1).all()
        if inputs.spec.model.head.kind != "none":
            forms.add("labels")
            labels = inputs.loss()["labels"]
            assert labels.dim() == 1 or (labels[~inputs.real()] == -100).all()

    for chosen in range(3):
        over(specs().flatmap(inputs_for), look, 60, chosen=chosen)
    tensors = {"input_ids", "inputs_embeds", "attention_mask", "segment_ids", "token_type_ids", "labels"}
    assert forms == tensors | {"left", "right"}


def test_policies_and_patterns_are_valid_and_of_every_kind() -> None:
    kinds: set[str] = set()
    seen: set[str] = set()
    x = torch.randn(1, 9, 1, 4)
    over(policies(), lambda policy: kinds.add(policy.kind), 60)

    def run(pattern: Any) -> None:
        seen.add(pattern.kind)
        assert ops.attention(x, x, x, pattern=pattern).isfinite().all()

    over(patterns(), run, 80)
    assert kinds == set(discover())
    assert {"causal", "full", "sliding_window"} <= seen


# --- specs that are none ------------------------------------------------------------------------------------------


def refused(invalid: Invalid, path: Path) -> set[str]:
    """The codes that `check` gives; each fault has a line."""
    path.write_bytes(invalid.text.encode("utf-8", "surrogatepass"))
    with pytest.raises((SpecError, PlanError)) as caught:
        attncompiler.check(path)
    for fault in caught.value.diagnostics:
        assert fault.code in CATALOGUE
        assert fault.location is not None, fault
        assert fault.location.line is not None, fault
        assert str(fault)
    return {fault.code for fault in caught.value.diagnostics}


@pytest.mark.parametrize(
    "examples", [pytest.param(120, id="few"), pytest.param(1000, id="many", marks=pytest.mark.slow)]
)
def test_what_is_no_spec_is_refused_with_a_code_and_a_line(examples: int, tmp_path: Path) -> None:
    faults: set[str] = set()
    given: set[str] = set()

    def look(invalid: Invalid) -> None:
        faults.add(invalid.fault)
        given.update(refused(invalid, tmp_path / "bad.yaml"))

    for chosen in range(4):
        over(invalid_specs(), look, examples // 4, chosen=chosen)
    assert faults >= set(FAULTS) if examples == 1000 else len(faults) > len(FAULTS) // 2
    assert given >= {"E002", "E005", "E010", "E011", "E012", "E014"} if examples == 1000 else len(given) > 3
