"""Attention's pairs in closed form are those that its patterns' formulas see, one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attncompiler.mechanisms.attention.cases import PATTERNS
from attncompiler.mechanisms.attention.pairs import visible_pairs
from attncompiler.mechanisms.attention.pattern import LocalGlobal, Pattern, Random, SlidingWindow, Strided
from attncompiler.mechanisms.attention.visibility import visible

sizes = st.integers(1, 40)
WIDE_GLOBALS = st.builds(SlidingWindow, window=sizes, global_tokens=st.integers(0, 45), causal=st.booleans())


def count(pattern: Pattern, T: int, S: int) -> int:
    inputs = {"q": torch.zeros(1, T, 1, 1), "k": torch.zeros(1, S, 1, 1)}
    return int(visible(inputs, pattern).expand(1, T, S).sum())


@settings(max_examples=400)
@given(st.one_of(PATTERNS, WIDE_GLOBALS), sizes, sizes)
def test_pairs_are_counted_as_the_mask_has_them(pattern: Pattern, T: int, S: int) -> None:
    if isinstance(pattern, Random) and not pattern.causal:
        S += -S % pattern.block_size  # a last block that is drawn counts as whole
    assert visible_pairs(pattern, T, S) == count(pattern, T, S)


@given(sizes, sizes)
def test_a_last_block_that_is_drawn_counts_as_whole(T: int, S: int) -> None:
    pattern = Random(block_size=8, random_blocks=2, causal=False)
    missing = -S % 8
    assert 0 <= visible_pairs(pattern, T, S) - count(pattern, T, S) <= T * missing


def test_a_million_tokens_are_counted_at_once() -> None:
    T = 2**20
    window = SlidingWindow(window=4096, global_tokens=64)
    assert visible_pairs(window, T, T) == sum(min(i + 1, 4096) + min(64, max(0, i - 4095)) for i in range(T))


@pytest.mark.parametrize("causal", [True, False])
def test_lengths_beyond_any_machine_are_counted_too(causal: bool) -> None:
    T = 2**40
    for pattern in (
        Strided(stride=64, window=3, block_size=128, causal=causal),
        LocalGlobal(block_size=128, local_blocks=4, global_blocks=2, causal=causal),
        Random(block_size=128, random_blocks=3, local_blocks=3, global_blocks=2, causal=causal),
    ):
        assert 0 < visible_pairs(pattern, T, T) < T * T
