"""A strategy of whole specs, tiny and valid by construction: every draw parses, plans and builds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

from attncompiler import targets
from attncompiler.mechanisms.base import Mechanism, discover
from attncompiler.mechanisms.case import Options, Wanted, among, perhaps
from attncompiler.planning import Plan, plan
from attncompiler.spec import ModelSpec, parse
from attncompiler.spec.dump import written
from attncompiler.targets.detect import detect_environment, detect_target
from attncompiler.testing.strategies.policies import HIDDEN_SIZES, Built, built, cases, policy_options

MAX_LAYERS = 4
NAMES = ("a", "b", "c")


@st.composite
def specs(draw: st.DrawFn, base: ModelSpec | None = None, *, device: str = "cpu") -> ModelSpec:
    """Specs of at most 4 layers, 64 wide, over at most 64 tokens of vocabulary, that build on `device`.

    With `base` they stay near to it: policies are of the kinds of its own and keep most of their options, and so do the
    sections of its model; sizes, layers, targets and kernels are drawn. What is not named in a draw has its default, so
    a shrunk spec (`attncompiler.spec.dump.given`) says only what matters.
    """
    data = draw(mappings(base, built))
    data = draw(_with_kernels(data, _plans(parse(written(data)), device)))
    return parse(written(data))


@st.composite
def mappings(draw: st.DrawFn, base: ModelSpec | None, gate: Built) -> Options:
    """A spec as a file holds it, with `kernel` and `fallback.order` left to `auto`."""
    width = draw(st.sampled_from(HIDDEN_SIZES))
    like = _policies_of(base)
    named: Options = {}
    # half of them decode, which one policy that is not causal forbids; those near to a base do what it does
    fits = _is_causal if not like and draw(st.booleans()) else lambda _: True
    for name in NAMES[: draw(st.integers(1, len(NAMES)))]:
        near = draw(st.sampled_from(like)) if like else {}
        kinds = st.just(near["kind"]) if near else st.sampled_from(_kinds())
        wanted = Wanted(width, gate, near)
        named[name] = draw(kinds.flatmap(lambda kind: policy_options(discover()[kind], wanted)).filter(fits))  # noqa: B023
    data: Options = {"name": draw(st.sampled_from(["drawn", "drawn-2", "Drawn.3"])), "model": draw(_model(width, base))}
    data["policies"] = named
    data["layers"] = draw(_layers(list(named), data["model"]["mlp"]))
    data |= draw(
        perhaps(
            seed=st.integers(0, 2**63 - 1),
            deterministic=st.booleans(),
            spec_version=st.just(1),
            targets=_targets(),
            fallback=perhaps(on_failure=st.sampled_from(["next", "raise"])),
        )
    )
    return data


def _is_causal(options: Options) -> bool:
    mechanism = discover()[options["kind"]]
    return mechanism.causal(mechanism.policy.model_validate(options))


def _kinds() -> list[str]:
    """The mechanisms, those with many options or with patterns more than once."""
    return [kind for kind, each in sorted(discover().items()) for _ in range(_weight(each))]


def _weight(mechanism: Mechanism) -> int:
    return 1 + len(mechanism.policy.model_fields) // 12 + 2 * (cases(mechanism).patterns is not None)


def _policies_of(base: ModelSpec | None) -> list[Options]:
    """The policies that layers of `base` refer to, with the options they were given."""
    if base is None:
        return []
    used = {layer.policy_name: layer.policy for layer in base.resolved_layers}
    return [{"kind": policy.kind, **policy.model_dump(exclude_unset=True)} for policy in used.values()]


# --- the model section --------------------------------------------------------------------------------------------

ACTIVATIONS = st.sampled_from(["silu", "gelu", "gelu_pytorch_tanh", "relu"])
WIDTHS = st.sampled_from([8, 24, 64])


@st.composite
def _model(draw: st.DrawFn, width: int, base: ModelSpec | None) -> Options:
    model: Options = {"hidden_size": width, "mlp": draw(_near(base, "mlp", ("intermediate_size",), _mlp()))}
    takes = {"input": base.model.input} if base is not None else draw(among("input", ["tokens", "embeds"]))
    model |= takes if takes.get("input") != "tokens" or draw(st.booleans()) else {}
    tokens = takes.get("input") != "embeds"
    if tokens:
        model["vocab_size"] = draw(st.integers(2, 64))
    model |= draw(perhaps(max_position_embeddings=st.sampled_from([64, 256])))
    embedding = perhaps(
        positions=st.sampled_from(["none", "learned"]),
        token_types=st.integers(1, 3) if tokens else st.just(0),
        norm=st.booleans(),
        multiplier=st.sampled_from([2.0, 0.5]),
    )
    norm = perhaps(
        kind=st.sampled_from(["rmsnorm", "layernorm"]),
        eps=st.sampled_from([1e-6, 1e-2]),
        position=st.sampled_from(["pre", "post", "sandwich"]),
    )
    for name, drawn, sizes in (("embedding", embedding, ("token_types",)), ("norm", norm, ())):
        section = draw(_near(base, name, sizes, drawn))
        model |= {name: section} if section else {}
    model |= draw(_option(base, "block", ["sequential", "parallel"]))
    model |= draw(_option(base, "dtype", ["float32", "float32", "bfloat16", "float16", "float64"]))
    head = draw(_near(base, "head", ("num_labels",), _head(tokens)))
    return model | ({"head": head} if head else {})


def _near(
    base: ModelSpec | None, name: str, sizes: Collection[str], drawn: st.SearchStrategy[Options]
) -> st.SearchStrategy[Options]:
    """A section of the model: as drawn, or as `base` has it where it has none of the sizes that must be small."""
    section = None if base is None else getattr(base.model, name)
    if section is None:
        return drawn
    own = section.model_dump(exclude_unset=True) | ({"kind": section.kind} if hasattr(section, "kind") else {})
    small = {"intermediate_size": 24, "num_labels": 3, "token_types": 2}
    own |= {size: min(own[size], small[size]) for size in sizes if size in own}
    return st.one_of(st.just(own), drawn)


def _option(base: ModelSpec | None, name: str, values: Sequence[Any]) -> st.SearchStrategy[Options]:
    drawn = among(name, values)
    if base is None:
        return drawn
    return st.one_of(st.just({name: getattr(base.model, name)}), drawn)


def _mlp() -> st.SearchStrategy[Options]:
    full = st.fixed_dictionaries(
        {"kind": st.sampled_from(["gated", "plain"]), "intermediate_size": WIDTHS},
        optional={"hidden_act": ACTIVATIONS, "bias": st.booleans()},
    )
    return st.one_of(st.just({"kind": "none"}), full)


def _head(tokens: bool) -> st.SearchStrategy[Options]:
    """{} for the default, logits over the vocabulary, which a model fed with embeds does not have."""
    classifier = st.fixed_dictionaries(
        {"kind": st.just("classifier"), "num_labels": st.integers(1, 5)},
        optional={"pooling": st.sampled_from(["first", "last", "mean"])},
    )
    others: list[st.SearchStrategy[Options]] = [st.just({"kind": "none"}), classifier]
    if not tokens:
        return st.one_of(others)
    options = {
        "bias": st.booleans(),
        "tie_word_embeddings": st.booleans(),
        "final_logit_softcapping": st.sampled_from([2.0, 30.0]),
    }
    lm = st.fixed_dictionaries({"kind": st.just("lm")}, optional=options)
    return st.one_of(st.just({}), lm, *others)


# --- layers -------------------------------------------------------------------------------------------------------


@st.composite
def _layers(draw: st.DrawFn, names: list[str], mlp: Options) -> tuple[Options, ...]:
    """At most `MAX_LAYERS` layers, in groups or not, of every policy but where some share a policy and changes."""
    entries: list[Options] = []
    room = MAX_LAYERS
    shared: dict[str, Options] = {}
    for number in range(draw(st.integers(len(names), MAX_LAYERS))):
        if not room:
            break
        name = names[number] if number < len(names) else draw(st.sampled_from(names))
        entry: Options = {"policy": name} | draw(_changes(mlp))
        if draw(st.integers(0, 3)) == 3:
            name = draw(st.sampled_from(["x", "y"]))
            entry = shared.setdefault(name, {**entry, "share": name})
        repeat = draw(st.integers(1, min(2, room)))
        room -= repeat
        times: Options = {"repeat": repeat} if repeat > 1 else {}
        groups = max(0, draw(st.integers(0, 6)) - 4)
        for _ in range(groups):
            entry = {"layers": (entry,)}
        entries.append({**entry, **times})
    return tuple(entries)


def _changes(mlp: Options) -> st.SearchStrategy[Options]:
    """Changes over the model's MLP, which has an intermediate_size or none."""
    least = {} if mlp["kind"] != "none" else {"kind": st.sampled_from(["gated", "plain"]), "intermediate_size": WIDTHS}
    free = {
        "kind": st.sampled_from(["gated", "plain"]),
        "intermediate_size": WIDTHS,
        "hidden_act": ACTIVATIONS,
        "bias": st.booleans(),
    }
    changed = st.fixed_dictionaries(least, optional={name: drawn for name, drawn in free.items() if name not in least})
    return perhaps(mlp=st.one_of(st.just({"kind": "none"}), changed))


# --- targets and kernels ------------------------------------------------------------------------------------------


def _targets() -> st.SearchStrategy[tuple[Any, ...]]:
    """Built-in names, and perhaps one target given by its facts."""
    named = st.lists(st.sampled_from(targets.names()), max_size=2, unique=True)
    both = st.tuples(named, st.lists(_facts(), max_size=1)).map(lambda pair: (*pair[0], *pair[1]))
    return both.map(lambda listed: listed or ("cpu",))


@st.composite
def _facts(draw: st.DrawFn) -> Options:
    """A device of one's own: a built-in target with some of its facts changed."""
    own: Options = targets.get(draw(st.sampled_from(targets.names()))).model_dump(exclude_unset=True)
    own |= {"name": "own", "title": "a device of one's own"}
    own |= draw(
        perhaps(
            interconnect=st.just(1e10),
            features=st.just(("tma",)),
            memory_bytes=st.just(2**36),
            shared_memory_bytes=st.just(2**16),
        )
    )
    return own


def _plans(spec: ModelSpec, device: str) -> list[Plan]:
    """A plan for each listed target and one for the machine at hand."""
    here = plan(spec, detect_target(device.partition(":")[0]), detect_environment())
    return [here, *(plan(spec, target) for target in spec.targets)]


def _with_kernels(data: Options, planned: list[Plan]) -> st.SearchStrategy[Options]:
    """The spec with kernels named, of which one at least serves on every target."""
    chains = [{choice.policy: choice.chain for choice in each.policies} for each in planned]
    own = {name: policy["kind"] for name, policy in data["policies"].items()}

    def serving(kind: str, names: Collection[str]) -> list[str]:
        return [
            kernel
            for kernel in discover()[kind].names
            if all(kernel in chain[name] for chain in chains for name in names if name in chain)
        ]

    demands = {name: _kernels(kind, serving(kind, [name])) for name, kind in own.items()}
    orders = {
        kind: _kernels(kind, serving(kind, [name for name in own if own[name] == kind]), single=False)
        for kind in dict.fromkeys(own.values())
    }
    return st.tuples(
        st.fixed_dictionaries({}, optional=demands), st.one_of(st.just({}), st.fixed_dictionaries({}, optional=orders))
    ).map(lambda drawn: _named(data, *drawn))


def _kernels(kind: str, serving: Sequence[str], single: bool = True) -> st.SearchStrategy[Any]:
    """`auto`, a kernel that serves, or a list with one that does among any others."""
    choices: list[st.SearchStrategy[Any]] = [st.just("auto")]
    if serving:
        others = st.lists(st.sampled_from(discover()[kind].names), max_size=2, unique=True)
        listed = st.tuples(st.sampled_from(serving), others, st.booleans()).map(_joined)
        choices += [listed, st.sampled_from(serving)] if single else [listed]
    return st.one_of(choices)


def _joined(drawn: tuple[str, list[str], bool]) -> tuple[str, ...]:
    name, others, first = drawn
    rest = [other for other in others if other != name]
    return (name, *rest) if first else (*rest, name)


def _named(data: Options, demands: Mapping[str, Any], orders: Mapping[str, Any]) -> Options:
    policies = {
        name: {**policy, **({"kernel": demands[name]} if name in demands else {})}
        for name, policy in data["policies"].items()
    }
    made = {**data, "policies": policies}
    if orders:
        made["fallback"] = {**data.get("fallback", {}), "order": dict(orders)}
    return made
