"""The language of route conditions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attncompiler.spec.when import NAMES, ConditionError, condition

VALUES = {
    "seq_len": 1000,
    "training": True,
    "batch_size": 4,
    "padding_fraction": 0.25,
    "dtype": "float32",
    "device_type": "cpu",
}

numbers = st.recursive(
    st.sampled_from([(name, value) for name, value in VALUES.items() if NAMES[name] == "number"])
    | st.integers(0, 99).map(lambda n: (str(n), n)),
    lambda inner: st.tuples(inner, inner, st.sampled_from("+-*")).map(
        lambda t: (f"({t[0][0]} {t[2]} {t[1][0]})", {"+": sum, "-": sub, "*": mul}[t[2]]((t[0][1], t[1][1])))
    ),
    max_leaves=4,
)


def sub(pair: tuple[float, float]) -> float:
    return pair[0] - pair[1]


def mul(pair: tuple[float, float]) -> float:
    return pair[0] * pair[1]


comparisons = st.tuples(numbers, numbers, st.sampled_from(["<", ">=", "==", "!="])).map(
    lambda t: (
        f"{t[0][0]} {t[2]} {t[1][0]}",
        {"<": t[0][1] < t[1][1], ">=": t[0][1] >= t[1][1], "==": t[0][1] == t[1][1], "!=": t[0][1] != t[1][1]}[t[2]],
    )
)
truths = st.recursive(
    comparisons | st.just(("training", True)) | st.just(("dtype == 'float32'", True)),
    lambda inner: (
        st.tuples(inner, inner).map(lambda t: (f"({t[0][0]} and not {t[1][0]})", t[0][1] and not t[1][1]))
        | st.tuples(inner, inner).map(lambda t: (f"({t[0][0]} or {t[1][0]})", t[0][1] or t[1][1]))
    ),
    max_leaves=3,
)


@given(truths.filter(lambda case: len(case[0]) <= 200))
def test_a_condition_means_what_python_means_by_it(case: tuple[str, bool]) -> None:
    text, expected = case
    # `not a == b` binds as not (a == b), in both
    assert condition(text)(VALUES) == expected


@given(st.text(max_size=300))
def test_any_text_is_a_condition_or_a_condition_error(text: str) -> None:
    try:
        found = condition(text)
    except ConditionError:
        return
    assert found(VALUES) in (True, False)


def test_chained_comparisons_and_division() -> None:
    assert condition("10 < seq_len <= 1000 and seq_len % 8 == 0 and seq_len / 2 > 499 and -1 < 0")(VALUES)
    assert condition("seq_len // 3 == 333 or training == False").names == {"seq_len", "training"}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("seq_len", "is not true or false"),
        ("seqlen > 3", "unknown name 'seqlen'"),
        ("__import__('os')", "is not allowed"),
        ("seq_len.real > 1", "is not allowed"),
        ("seq_len > 'a'", "'a' is not a number"),
        ("dtype > 'a'", "has no order"),
        ("seq_len and training", "seq_len is not true or false"),
        ("seq_len / 0 > 1", "only a number other than 0"),
        ("seq_len % batch_size == 0", "only a number other than 0"),
        ("seq_len ** 9 > 1", "is not allowed"),
        ("seq_len > 1e999", "a constant is"),
        ("seq_len in [1]", "is not allowed"),
        ("lambda: 1", "is not allowed"),
        ("(x := 1) > 0", "is not allowed"),
        ("[" * 150, "is not a condition"),
        ("seq_len > " + "1" * 200, "at most 200 characters"),
        ("seq_len >", "is not a condition"),
        ("a\0b", "is not a condition"),
    ],
)
def test_what_is_refused(text: str, part: str) -> None:
    with pytest.raises(ConditionError) as caught:
        condition(text)
    assert part in str(caught.value)
