"""Laws of the spec layer over any text, and over what stands in specs/."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from attncompiler.errors import SpecError
from attncompiler.spec import ModelSpec, dump, parse, read

from .samples import BASE, SPECS

TEXTS = [path.read_text(encoding="utf-8") for path in SPECS]
WORDS = sorted({word for text in TEXTS for word in text.replace("{", " ").replace("}", " ").split()})
SCRAPS = [
    *(
        "[",
        "]",
        "{",
        "}",
        ": ",
        "- ",
        "\n",
        "  ",
        "\t",
        "&a",
        " *a",
        "!!int",
        "'",
        '"',
        "#",
        "|",
        ">",
        "? ",
        "%",
        "---",
    ),
    *("null", ".inf", "-.inf", ".nan", "1e999", "-1", "0", "0x", "true", "1" * 30, "9" * 450, "<<", "\u2028", "\ud800"),
    *("kind: moe", "routes: [{when: 'seq_len > 1', kernel: x}]", "rope_theta: 1", "rope_scaling: {factor: 2}", "[[]]"),
    *("pattern: {kind: sliding_window}", "kernel: [a, 1]", "targets: [{name: x}]", "share: a", "repeat: 100000", "é"),
]


def obeys_the_law(text: str, overrides: list[str] | None = None) -> ModelSpec | None:
    """Any text parses, or raises SpecError whose every diagnostic has a place and can be printed."""
    try:
        return parse(text, overrides=overrides or [])
    except SpecError as error:
        found = error.diagnostics
    assert found
    for diagnostic in found:
        assert diagnostic.location is not None
        assert diagnostic.location.option is not None or diagnostic.location.file == "<spec>"
        str(diagnostic).encode()
    return None


@given(st.text())
@example("? ")
@example("!!binary")
@example("{? a: b")
@example("'\\ud800'")
def test_any_text_parses_or_says_why_not(text: str) -> None:
    obeys_the_law(text)


@st.composite
def mutations(draw: st.DrawFn) -> str:
    """A valid spec with a few pieces cut, doubled, moved or overwritten."""
    text = draw(st.sampled_from([BASE, *TEXTS]))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 40)))
        other = draw(
            st.sampled_from(SCRAPS) | st.sampled_from(WORDS) | st.text(max_size=4) | st.just(text[start:end] * 2)
        )
        text = text[:start] + other + text[end:]
    return text


@given(mutations())
@settings(max_examples=150)
def test_a_mutated_spec_parses_or_says_why_not(text: str) -> None:
    obeys_the_law(text)


@st.composite
def word_mutations(draw: st.DrawFn) -> str:
    """A valid spec in which whole words are exchanged, so that most of the faults are in its meaning."""
    text = draw(st.sampled_from([BASE, *TEXTS]))
    for _ in range(draw(st.integers(1, 4))):
        words = [word for word in WORDS if word in text]
        text = text.replace(
            draw(st.sampled_from(words)), draw(st.sampled_from(WORDS + SCRAPS)), draw(st.integers(1, 3))
        )
    return text


@given(word_mutations())
@settings(max_examples=200)
def test_exchanged_words_parse_and_round_trip_or_say_why_not(text: str) -> None:
    spec = obeys_the_law(text)
    if spec is not None:
        assert parse(dump(spec)) == spec
        assert len(spec.resolved_layers) > 0


steps = st.sampled_from(["model", "policies", "full", "layers", "0", "pattern", "kind", "targets", "name", "x", "norm"])
paths = st.lists(steps | st.integers(0, 3).map(lambda i: f"[{i}]"), max_size=5).map(
    lambda parts: "".join(part if part.startswith("[") else f".{part}" for part in parts).lstrip(".")
)


@given(
    st.lists(st.tuples(paths | st.text(max_size=8), st.sampled_from(WORDS + SCRAPS) | st.text(max_size=8)), max_size=3)
)
def test_any_override_applies_or_says_why_not(pairs: list[tuple[str, str]]) -> None:
    obeys_the_law(BASE, [f"{path}={value}" for path, value in pairs])


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_every_spec_that_ships_is_valid_and_survives_dump(path: Path) -> None:
    spec = read(path)
    assert spec.name == path.stem.replace("_", "-")
    assert parse(dump(spec)) == spec
    assert dump(parse(dump(spec))) == dump(spec)


def test_what_an_artifact_holds_is_the_resolved_spec() -> None:
    assert "intermediate_size: 96, hidden_act: silu, bias: false" in dump(parse(BASE))


def test_a_spec_is_frozen() -> None:
    spec = parse(BASE)
    with pytest.raises(ValueError, match="frozen"):
        spec.seed = 3  # type: ignore[misc]
