"""A strategy of texts that are no spec: valid specs with one thing made wrong, in every way that a person makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from pydantic import BaseModel

from attncompiler.spec import ModelSpec
from attncompiler.spec.dump import given, written
from attncompiler.testing.strategies.specs import specs

Path = tuple[str | int, ...]
HOLE = "put_here_what_is_wrong"
"""a key or value of plain text that other text takes the place of"""


@dataclass(frozen=True)
class Invalid:
    """A text that `check` must refuse, and in words what was done to it."""

    text: str
    fault: str


@st.composite
def invalid_specs(draw: st.DrawFn) -> Invalid:
    """Specs with one fault each: of YAML, of a key, a type, a range, a reference, or of two options together."""
    spec = draw(specs())
    faulty = {fault: made for fault, make in FAULTS.items() if (made := make(spec)) is not None}
    fault = draw(st.sampled_from(sorted(faulty)))
    return Invalid(draw(faulty[fault]), fault)


Faulty = Callable[[ModelSpec], st.SearchStrategy[str] | None]
"""a valid spec → texts with a fault; None where the spec has no place for it"""


# --- places -------------------------------------------------------------------------------------------------------


def _data(spec: ModelSpec) -> dict[str, Any]:
    return spec.model_dump(exclude_unset=True)


def _leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every scalar, with its place; numbers of a target aside, whose ranges are wide."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (tuple, list)) else None
    if items is None:
        yield path, value
        return
    for step, item in items:
        if (*path, step) != ("targets",) or not any(isinstance(each, dict) for each in item):
            yield from _leaves(item, (*path, step))


def _mappings(value: Any, path: Path = ()) -> Iterator[Path]:
    """Every mapping."""
    if isinstance(value, dict):
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (tuple, list)) else ()
    for step, item in items:
        yield from _mappings(item, (*path, step))


def _required(value: Any, path: Path = ()) -> Iterator[Path]:
    """Every key that a model of the grammar cannot do without, and the kinds of unions."""
    if isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            # the kind of a layer's changes may be left out: it stays that of the model
            told_apart = name == "kind" and name in value.model_fields_set and field.default is not None
            if field.is_required() or told_apart:
                yield (*path, name)
            if name in value.model_fields_set:
                yield from _required(getattr(value, name), (*path, name))
    elif isinstance(value, (dict, tuple)):
        for step, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _required(item, (*path, step))


def _with(value: Any, path: Path, made: Any) -> Any:
    """A copy in which `made(what stands at path)` stands there."""
    if not path:
        return made(value)
    step, *rest = path
    if isinstance(value, dict):
        return {key: _with(item, tuple(rest), made) if key == step else item for key, item in value.items()}
    return tuple(_with(item, tuple(rest), made) if index == step else item for index, item in enumerate(value))


def _without(value: Any, path: Path) -> Any:
    return _with(value, path[:-1], lambda holder: {key: item for key, item in holder.items() if key != path[-1]})


def _put(spec: ModelSpec, path: Path, text: str) -> str:
    """The spec with YAML text in the place of what stands at `path`."""
    return written(_with(_data(spec), path, lambda _: HOLE)).replace(HOLE, text)


def _replaced(kinds: tuple[type, ...], texts: list[str]) -> Faulty:
    """One of the texts in the place of a scalar of these types."""

    def faulty(spec: ModelSpec) -> st.SearchStrategy[str] | None:
        places = [path for path, value in _leaves(_data(spec)) if type(value) in kinds]
        if not places:
            return None
        return st.tuples(st.sampled_from(places), st.sampled_from(texts)).map(lambda drawn: _put(spec, *drawn))

    return faulty


# --- faults -------------------------------------------------------------------------------------------------------


def _unknown_key(spec: ModelSpec) -> st.SearchStrategy[str]:
    names = st.sampled_from(["num_heads_kv", "hiden_size", "no such", "kindd", "0"])
    return st.tuples(st.sampled_from(list(_mappings(_data(spec)))), names).map(
        lambda drawn: written(_with(_data(spec), drawn[0], lambda held: {**held, drawn[1]: 1}))
    )


def _twice(spec: ModelSpec) -> st.SearchStrategy[str]:
    """A key of a mapping given again, with its value."""
    places = [path for path, _ in _leaves(_data(spec)) if isinstance(path[-1], str)]

    def again(path: Path) -> str:
        data = _with(_data(spec), path[:-1], lambda held: {**held, HOLE: held[path[-1]]})
        return written(data).replace(HOLE, str(path[-1]))

    return st.sampled_from(places).map(again)


def _missing(spec: ModelSpec) -> st.SearchStrategy[str]:
    data = _data(spec)
    places = [path for path in _required(spec) if path[-1] != "kind" or path[:-1] != ("model", "head")]
    return st.sampled_from(places).map(lambda path: written(_without(data, path)))


def _reference(spec: ModelSpec) -> st.SearchStrategy[str]:
    """A name that nothing has: of a policy, a kernel, a target, a mechanism."""
    data, policy = _data(spec), next(iter(spec.policies))
    made = [
        {**data, "layers": ({"policy": "nowhere"},)},
        {**data, "targets": ("h2000",)},
        {**data, "fallback": {"order": {"attentoin": "auto"}}},
        _with(data, ("policies", policy), lambda held: {**held, "kernel": "flsah"}),
        _with(data, ("policies", policy), lambda held: {**held, "kernel": ["eager", "flsah"]}),
        _with(data, ("policies", policy), lambda held: {**held, "kind": "transformer"}),
    ]
    return st.sampled_from(made).map(written)


def _relation(spec: ModelSpec) -> st.SearchStrategy[str]:
    """Options that are valid one by one."""
    data, policy = _data(spec), next(iter(spec.policies))
    first = {"policy": policy}
    made = [
        {**data, "layers": ()},
        {**data, "layers": ({"layers": (), "repeat": 3},)},
        {**data, "layers": ({"policy": policy, "repeat": 20_000},)},
        {**data, "layers": ({**first, "mlp": {"kind": "none", "bias": True}},)},
        {
            **data,
            "layers": (
                {**first, "share": "s", "mlp": {"kind": "none"}},
                {**first, "share": "s", "mlp": {"kind": "plain", "intermediate_size": 8}},
            ),
        },
        {**data, "name": "../up"},
        {**data, "targets": ("cpu", "cpu")},
        {**data, "targets": ()},
        _with(data, ("model",), lambda held: {**held, "input": "embeds", "vocab_size": 3}),
        _with(data, ("model",), lambda held: {**held, "input": "embeds", "head": {"kind": "lm"}}),
        _with(data, ("policies", policy), lambda held: {**held, "kernel": ["eager", "eager"]}),
        _with(data, ("policies", policy), lambda held: {**held, "kernel": []}),
        _with(data, ("policies", policy), lambda held: {**held, "routes": ({"when": "seq_len >", "packing": True},)}),
        _with(data, ("policies", policy), lambda held: {**held, "routes": ({"when": "seq_len > 1"},)}),
    ]
    return st.sampled_from(made).map(written)


def _yaml(spec: ModelSpec) -> st.SearchStrategy[str]:
    """Text that is not one YAML mapping."""
    text = given(spec)
    endings = ["more: [1", "more: }", "more: 'x", "more: *nowhere", "\tmore: 1", "@", "---\nname: again", "- item", "%"]
    others = ["", "\n", "# nothing\n", "null", "- a\n- b\n", "text", "3", "{", "\x00", "a: b: c", "? [x]\n: 1\n"]
    cut = st.integers(1, max(1, text.index("\n") - 1)).map(lambda end: text[:end])
    return st.one_of(st.sampled_from(endings).map(lambda end: f"{text}{end}\n"), st.sampled_from(others), cut)


def _deep(spec: ModelSpec) -> st.SearchStrategy[str]:
    places = [path for path, _ in _leaves(_data(spec))]
    depths = st.sampled_from([70, 400, 5000])
    brackets = st.sampled_from([("[", "]"), ("{a: ", "}"), ("[", "")])
    return st.tuples(st.sampled_from(places), depths, brackets).map(
        lambda drawn: _put(spec, drawn[0], drawn[2][0] * drawn[1] + drawn[2][1] * drawn[1])
    )


SCALARS = (int, float, bool, str)
FAULTS: dict[str, Faulty] = {
    "an unknown key": _unknown_key,
    "a key given twice": _twice,
    "a required key missing": _missing,
    "an unknown name": _reference,
    "a relation broken": _relation,
    "not YAML": _yaml,
    "deep nesting": _deep,
    "a mapping for a value": _replaced(SCALARS, ["{}", "{a: 1}", "{kind: none}"]),
    "text for a number": _replaced((int, float), ["'12'", "many", "1_000", "0b11"]),
    "a number for text": _replaced((str,), ["12", "-1.5", "1e400"]),
    "text for a truth": _replaced((bool,), ["yes", "'true'", "1", "0.0", "[]"]),
    "a number out of range": _replaced((int,), ["-1", "1" + "0" * 30, "9" * 450, "-9999999999999999999"]),
    "a number that is none": _replaced((int, float), [".nan", "-.inf", "1" * 500]),
    "a tag": _replaced(SCALARS, ["!!python/object/apply:os.getcwd []", "!!binary aGk=", "!x 1"]),
    "an alias of itself": _replaced(SCALARS, ["&a [*a]", "&a {k: *a}"]),
}
"""what can be wrong → how to make it so"""
