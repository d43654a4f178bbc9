"""The loader: YAML 1.2 core scalars, places, and caps that hold while the tree grows."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attncompiler.errors import SpecError
from attncompiler.spec.loader import MAX_BYTES, MAX_DEPTH, load
from attncompiler.spec.nodes import locate, plain
from attncompiler.spec.scalars import resolve, write


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1e5", 1e5),
        ("+.5", 0.5),
        ("12.", 12.0),
        ("0o17", 15),
        ("0x1F", 31),
        ("017", 17),
        ("-3", -3),
        ("-.inf", -math.inf),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("True", True),
        ("~", None),
        ("1_000", "1_000"),
        ("12:30:45", "12:30:45"),
        ("2024-01-01", "2024-01-01"),
        ("٣", "٣"),
        ("0b1", "0b1"),
        ("=", "="),
    ],
)
def test_plain_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    found = plain(load(f"x: {text}", "f")[0])["x"]
    assert found == value
    assert type(found) is type(value)


@given(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text())
def test_a_written_scalar_reads_back_the_same(value: object) -> None:
    root, faults = load(f"[{write(value)}]", "f")  # type: ignore[arg-type]
    assert plain(root) == (value,)
    assert type(plain(root)[0]) is type(value)
    assert not faults


@given(st.text(max_size=30))
def test_resolving_any_text_gives_a_scalar_or_the_text(text: str) -> None:
    value = resolve(text)
    assert value is None or isinstance(value, (bool, int, float)) or value == text


def test_quoted_scalars_are_text() -> None:
    assert plain(load("{a: '12', b: \"true\"}", "f")[0]) == {"a": "12", "b": "true"}


def test_places_are_those_of_the_file() -> None:
    root, _ = load("a:\n  b: [1,\n      2]\n", "f")
    assert str(locate(root, ("a", "b", 1))) == "f:3:7"
    assert str(locate(root, ("a", "b"), key=True)) == "f:2:3"
    assert str(locate(root, ("a", "missing", "below"))) == "f:1:1"


def code(text: str) -> str:
    with pytest.raises(SpecError) as caught:
        load(text, "f")
    return caught.value.diagnostics[-1].code


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def test_depth_is_capped_where_it_is_written_and_where_it_is_expanded() -> None:
    load(nested(MAX_DEPTH), "f")
    assert code(nested(MAX_DEPTH + 2)) == "E004"
    half = MAX_DEPTH // 2
    assert code(f"a: &a {nested(half + 2)}\nb: {'[' * half}*a{']' * half}") == "E004"


def test_aliases_count_as_what_they_expand_to() -> None:
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    assert code("\n".join(lines)) == "E004"
    assert plain(load("a: &x {b: 1}\nc: *x", "f")[0]) == {"a": {"b": 1}, "c": {"b": 1}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "E003"),
        ("# only a comment\n", "E003"),
        ("---\n...\n", "E003"),
        ("null", "E003"),
        ("a: b: c", "E002"),
        ("a: [1", "E002"),
        ("a: *nowhere", "E002"),
        ("a: 1\n---\nb: 2", "E002"),
        ('a: "\\UFFFFFFFF"', "E002"),
        ("a: \x07", "E002"),
        ("%YAML " + "9" * 5000 + ".1\n---\na: 1", "E002"),
        ("&a [*a]", "E004"),
        ("x" * (MAX_BYTES + 1), "E004"),
        ("[" * 10_000_000, "E004"),
        ("- " * 100_000, "E004"),
        ("? " * 100_000, "E004"),
    ],
    ids=lambda value: value[:12],
)
def test_what_is_not_a_document_is_refused(text: str, expected: str) -> None:
    assert code(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3", "f:3:1: E005 the key 'a' was given before on line 1"),
        ("1: a", "f:1:1: E011 a key must be text; quote it"),
        ("? [a]\n: b", "f:1:3: E011 a key must be text; quote it"),
        ("<<: {a: 1}", "f:1:1: E150 merge keys ('<<') are YAML 1.1 and not offered; write the keys out"),
        ("a: !!python/name:os.system x", "f:1:4: E014 tags are not read: '!!python/name:os.system'"),
        ("a: ! 3", "f:1:4: E014 tags are not read: '!'"),
        ("a: .nan", "f:1:4: E014 '.nan' is not a value"),
        ("a: " + "9" * 500, "f:1:4: E014 a number of 500 digits is too long"),
    ],
)
def test_faults_that_do_not_stop_the_reading(text: str, expected: str) -> None:
    assert [str(fault) for fault in load(text, "f")[1]] == [expected]
