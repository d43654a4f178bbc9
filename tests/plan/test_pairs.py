"""Attention's pairs in closed form are those that its patterns' formulas see, one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attncompiler.mechanisms.attention.cost import visible_pairs
from attncompiler.mechanisms.attention.pattern import Causal, Chunked, Full, LocalGlobal, Pattern, SlidingWindow
from attncompiler.mechanisms.attention.visibility import visible

sizes = st.integers(1, 40)
windows = st.builds(SlidingWindow, window=sizes, global_tokens=st.integers(0, 45), causal=st.booleans())


@given(st.one_of(st.just(Full()), st.just(Causal()), windows), sizes, sizes)
def test_pairs_are_counted_as_the_mask_has_them(pattern: Pattern, T: int, S: int) -> None:
    inputs = {"q": torch.zeros(1, T, 1, 1), "k": torch.zeros(1, S, 1, 1)}
    assert visible_pairs(pattern, T, S) == int(visible(inputs, pattern).expand(1, T, S).sum())


@given(sizes, sizes, sizes)
def test_chunked_pairs(chunk: int, T: int, S: int) -> None:
    seen = sum(j <= i and i // chunk == j // chunk for i in range(S - T, S) for j in range(S))
    assert visible_pairs(Chunked(kind="chunked", chunk=chunk), T, S) == seen


def test_a_million_tokens_are_counted_at_once() -> None:
    T = 2**20
    window = SlidingWindow(window=4096, global_tokens=64)
    assert visible_pairs(window, T, T) == sum(min(i + 1, 4096) + min(64, max(0, i - 4095)) for i in range(T))


def test_a_pattern_that_is_not_built_is_not_counted() -> None:
    with pytest.raises(TypeError, match="is not built"):
        visible_pairs(LocalGlobal(kind="local_global", block_size=4, local_blocks=1), 8, 8)
