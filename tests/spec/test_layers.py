"""From entries to layers: repeats, merged MLPs, ties; accepted aliases; overrides."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from attncompiler.mechanisms.attention.mechanism import AttentionPolicy
from attncompiler.spec import ModelSpec, dump, parse
from attncompiler.spec.expand import count

from .samples import BASE, changed, errors


def with_layers(layers: str, mlp: str = "{kind: gated, intermediate_size: 96}") -> ModelSpec:
    return parse(
        changed(
            ("{kind: gated, intermediate_size: 96}", mlp),
            ("layers:\n  - {policy: full}", f"layers: {layers}"),
            ("policies:\n", "policies:\n  b: {kind: attention, num_attention_heads: 2}\n"),
        )
    )


entries = st.recursive(
    st.tuples(st.sampled_from(["full", "b"]), st.integers(1, 3)),
    lambda inner: st.tuples(st.lists(inner, min_size=1, max_size=3), st.integers(1, 3)),
    max_leaves=5,
)


def written(entry: tuple) -> str:
    what, repeat = entry
    body = f"policy: {what}" if isinstance(what, str) else f"layers: [{', '.join(map(written, what))}]"
    return f"{{repeat: {repeat}, {body}}}"


def meant(entry: tuple) -> list[str]:
    what, repeat = entry
    return ([what] if isinstance(what, str) else [name for inner in what for name in meant(inner)]) * repeat


@given(st.lists(entries, min_size=1, max_size=3))
def test_groups_expand_in_order(layers: list[tuple]) -> None:
    spec = with_layers(f"[{', '.join(map(written, layers))}]")
    expected = [name for entry in layers for name in meant(entry)]
    assert [layer.policy_name for layer in spec.resolved_layers] == expected
    assert [layer.index for layer in spec.resolved_layers] == list(range(len(expected)))
    assert count(spec.layers) == len(expected)
    assert all(layer.policy is spec.policies[layer.policy_name] for layer in spec.resolved_layers)


def test_a_layer_changes_what_it_names_of_the_mlp() -> None:
    spec = with_layers(
        "[{policy: full, mlp: {bias: true}}, {policy: full, mlp: {kind: none}}, {policy: full, mlp: {}}]"
    )
    first, second, third = (layer.mlp for layer in spec.resolved_layers)
    assert first.model_dump() == {**spec.model.mlp.model_dump(), "bias": True}
    assert second.kind == "none"
    assert third == spec.model.mlp


def test_a_layer_may_have_an_mlp_where_the_model_has_none() -> None:
    spec = with_layers("[{policy: full}, {policy: b, mlp: {kind: plain, intermediate_size: 8}}]", mlp="{kind: none}")
    assert [layer.mlp.kind for layer in spec.resolved_layers] == ["none", "plain"]


def test_a_layer_cannot_take_a_size_from_nowhere() -> None:
    text = changed(
        ("kind: gated, intermediate_size: 96", "kind: none"), ("{policy: full}", "{policy: full, mlp: {kind: plain}}")
    )
    assert errors(text) == [
        "f:12:25: E105 the mlp needs an intermediate_size, and model.mlp has none to take it from",
    ]


def test_repeats_of_a_shared_layer_are_tied() -> None:
    spec = with_layers("[{repeat: 2, layers: [{policy: full, share: x}, {policy: b}]}]")
    assert [layer.share for layer in spec.resolved_layers] == ["x", None, "x", None]


def rotary(options: str) -> object:
    policy = parse(changed(("pattern: {kind: causal}", options))).policies["full"]
    assert isinstance(policy, AttentionPolicy)
    return policy.rope_parameters


def test_rope_aliases_mean_rope_parameters() -> None:
    plain = rotary("rope_parameters: {rope_type: linear, factor: 2, rope_theta: 5}")
    assert rotary("rope_theta: 5\n    rope_scaling: {type: linear, factor: 2}") == plain
    assert rotary("rope_theta: 5\n    rope_parameters: {rope_type: linear, factor: 2}") == plain
    assert rotary("rope_theta: 5\n    rope_scaling: null") == rotary("rope_parameters: {rope_theta: 5}")
    assert rotary("rope_theta: 5\n    rope_scaling: {type: linear, rope_type: linear, factor: 2}") == plain
    assert rotary("rope_scaling:") is None


def test_a_fault_under_an_alias_has_the_place_it_was_written_at() -> None:
    assert errors(changed(("pattern: {kind: causal}", "rope_scaling: {type: linear, factr: 2}"))) == [
        "f:10:34: E012 unknown key 'factr'; did you mean 'factor'?",
    ]


def test_yaml_aliases_are_copies() -> None:
    text = changed(("full:\n", "other: &p {kind: attention, num_attention_heads: 2}\n  again: *p\n  full:\n"))
    spec = parse(text, overrides=["policies.again.num_attention_heads=8"])
    assert spec.policies["other"].num_attention_heads == 2  # type: ignore[attr-defined]
    assert spec.policies["again"].num_attention_heads == 8  # type: ignore[attr-defined]


def test_a_target_may_be_given_as_facts() -> None:
    facts = (
        "{name: mine, title: Mine, device_type: cuda, vendor: nvidia, memory_bytes: 8589934592, bandwidth: 1e12, "
        "matrix_flops: {bfloat16: 1e14}, vector_flops: 1e13, compute_capability: [8, 6], multiprocessors: 64, "
        "shared_memory_bytes: 101376}"
    )
    spec = parse(changed(("targets: [cpu]", f"targets: [cpu, {facts}]")))
    assert spec.targets[1].compute_capability == (8, 6)  # type: ignore[union-attr]
    assert parse(dump(spec)) == spec


def test_overrides_set_values_in_order_and_make_sections() -> None:
    overrides = ["model.norm.eps=1e-6", "layers[0].repeat=3", "targets.0=h200", "policies.full.kernel=[sdpa, eager]"]
    spec = parse(
        BASE, overrides=[*overrides, "seed=1", "seed=2", "policies.full.pattern={kind: sliding_window, window: 8}"]
    )
    assert (spec.model.norm.eps, len(spec.resolved_layers), spec.targets, spec.seed) == (1e-6, 3, ("h200",), 2)
    assert spec.policies["full"].kernel == ("sdpa", "eager")
    assert spec.policies["full"].pattern.window == 8  # type: ignore[attr-defined]


def test_faults_of_overrides_cite_the_option() -> None:
    assert errors(BASE, "model.hidden_size='64'") == [
        "--set model.hidden_size='64': E011 model.hidden_size must be a whole number, not the text '64'; "
        "remove the quotes",
    ]
    assert errors(BASE, "policies.full.patern.window=3") == [
        "--set policies.full.patern.window=3: E012 unknown key 'patern'; did you mean 'pattern'?",
    ]
    assert errors(BASE, "policies.full.pattern.window=3") == [
        "--set policies.full.pattern.window=3: E012 unknown key 'window'",
    ]
    reads = "E015 an override reads PATH=VALUE, as in model.norm.eps=1e-6 or layers[0].policy=local"
    assert errors(BASE, "seed", "=3", "a..b=3") == [f"--set {text}: {reads}" for text in ("seed", "=3", "a..b=3")]
    assert errors(BASE, "layers[4].policy=x") == ["--set layers[4].policy=x: E015 4 is not an index of a list of 1"]
    assert errors(BASE, "name.x=3") == [
        "--set name.x=3: E015 there is nothing to set under 'x': what holds it is not a mapping or a list",
    ]
    assert errors(BASE, "seed=[1")[0].startswith("--set seed=[1: E002 not YAML")
