"""Which keys attention's queries see: the formulas against loops in plain Python, and the ranges the kernel visits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from attncompiler.mechanisms.attention.cases import PATTERNS
from attncompiler.mechanisms.attention.kernels import chunkwise
from attncompiler.mechanisms.attention.op import AttentionOptions
from attncompiler.mechanisms.attention.pattern import (
    Causal,
    Chunked,
    Full,
    LocalGlobal,
    Pattern,
    Random,
    SlidingWindow,
    Strided,
)
from attncompiler.mechanisms.attention.random_blocks import drawn
from attncompiler.mechanisms.attention.visibility import visible

Call = dict[str, Tensor]


def call(T: int, S: int, **masks: Tensor) -> Call:
    """The tensors of a call that visibility reads: of queries and keys only their lengths count."""
    B = max((len(tensor) for tensor in masks.values()), default=1)
    keys = torch.zeros(B, S, 1, 1)
    return {"q": torch.zeros(B, T, 1, 1), "k": keys, "v": keys, **masks}


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Lengths that differ or not, segments, padding on either side or with holes, given positions."""
    S = draw(st.integers(1, 24))
    T = draw(st.one_of(st.just(S), st.integers(1, 28)))
    B = draw(st.integers(1, 2))
    masks: Call = {}
    if draw(st.booleans()):
        ids = torch.tensor([sorted(draw(st.lists(st.integers(0, 3), min_size=S, max_size=S))) for _ in range(B)])
        masks |= {"segment_ids": ids[:, S - T :], "kv_segment_ids": ids} if T < S else {"segment_ids": ids}
        if T > S:
            masks["kv_segment_ids"] = ids
            masks["segment_ids"] = torch.cat([ids[:, :1].expand(B, T - S), ids], 1)
        if draw(st.integers(0, 3)) == 0:  # queries packed otherwise than keys
            masks |= {"kv_segment_ids": ids, "segment_ids": torch.arange(T).expand(B, T) // draw(st.integers(1, 9))}
    if draw(st.booleans()):
        rows = [draw(st.tuples(st.sampled_from(["left", "right", "holes"]), st.integers(0, S))) for _ in range(B)]
        masks["attention_mask"] = torch.stack([padding(kind, count, S) for kind, count in rows])
    if draw(st.integers(0, 4)) == 0:
        shuffled = [draw(st.permutations(range(S))) for _ in range(B)]
        asked = [draw(st.lists(st.integers(0, 30), min_size=T, max_size=T)) for _ in range(B)]
        masks |= {"kv_positions": torch.tensor(shuffled), "q_positions": torch.tensor(asked)}
    return call(T, S, **masks)


def padding(kind: str, count: int, S: int) -> Tensor:
    index = torch.arange(S)
    return {"left": index >= count, "right": index < S - count, "holes": (index + count) % 3 != 0}[kind]


# --- the formulas, as the table of patterns says them ---------------------------------------------------------------


def sees(pattern: Pattern, i: int, j: int, layer: int, length: int) -> bool:
    """DESIGN's table, row by row; `length` is how many keys the sequence has."""
    if pattern.causal and j > i:
        return False
    match pattern:
        case Full() | Causal():
            return True
        case SlidingWindow(window=window, global_tokens=tokens, causal=causal):
            return abs(i - j) < window or j < tokens or (not causal and i < tokens)
        case Chunked(chunk=chunk):
            return i // chunk == j // chunk
        case Strided(block_size=b, stride=stride, window=window):
            distance = abs(i // b - j // b)
            return distance < window or distance % stride == 0
        case LocalGlobal(block_size=b) | Random(block_size=b):
            row, column, top = i // b, j // b, pattern.global_blocks
            if abs(row - column) < pattern.local_blocks or column < top or (not pattern.causal and row < top):
                return True
            if isinstance(pattern, LocalGlobal):
                return False
            return column in drawn(pattern, layer, torch.tensor([row]), torch.tensor([-(-length // b)]))[0].tolist()
    raise AssertionError(pattern)


def places(inputs: Call, b: int) -> tuple[list[int], list[int]]:
    """Positions of queries and keys, counted from each segment's first real token; the last two stand side by side."""
    T, S = inputs["q"].shape[1], inputs["k"].shape[1]
    if "q_positions" in inputs:
        return inputs["q_positions"][b].tolist(), inputs["kv_positions"][b].tolist()
    ids = inputs.get("kv_segment_ids", inputs.get("segment_ids", torch.zeros(b + 1, S)))[b].tolist()
    real = inputs.get("attention_mask", torch.ones(b + 1, S, dtype=torch.bool))[b].tolist()
    keys = []
    for s in range(S):
        firsts = [f for f in range(S) if ids[f] == ids[s] and real[f]]
        keys.append(s - (firsts[0] if firsts else 0))
    return [keys[t + S - T] if t + S - T >= 0 else t + S - T for t in range(T)], keys


def key_counts(inputs: Call, b: int, keys: list[int]) -> list[int]:
    """For each query how many keys its sequence has, up to the last real one."""
    T, S = inputs["q"].shape[1], len(keys)
    ids = inputs.get("kv_segment_ids", inputs.get("segment_ids", torch.zeros(b + 1, S)))[b].tolist()
    if "q_positions" in inputs:
        ids = [0] * S
    real = inputs.get("attention_mask", torch.ones(b + 1, S, dtype=torch.bool))[b].tolist()
    ends = [max((keys[f] + 1 for f in range(S) if ids[f] == ids[s] and real[f]), default=0) for s in range(S)]
    return [ends[max(t + S - T, 0)] for t in range(T)]


def brute_force(inputs: Call, pattern: Pattern, layer: int = 0) -> Tensor:
    B, T, S = inputs["q"].shape[0], inputs["q"].shape[1], inputs["k"].shape[1]
    seen = torch.zeros(B, T, S, dtype=torch.bool)
    for b in range(B):
        i, j = places(inputs, b)
        lengths = key_counts(inputs, b, j)
        for t in range(T):
            for s in range(S):
                ok = sees(pattern, i[t], j[s], layer, lengths[t])
                if "segment_ids" in inputs:
                    keys = inputs.get("kv_segment_ids", inputs["segment_ids"])
                    ok = ok and bool(inputs["segment_ids"][b, t] == keys[b, s])
                if "attention_mask" in inputs:
                    mask = inputs["attention_mask"][b]
                    ok = ok and bool(mask[s]) and (t + S - T < 0 or bool(mask[t + S - T]))
                seen[b, t, s] = ok
    return seen


@given(calls(), PATTERNS, st.integers(0, 2))
@example(call(3, 5), SlidingWindow(window=2, global_tokens=1), 0)
@example(call(5, 3), SlidingWindow(window=2, global_tokens=1, causal=False), 0)
def test_visibility_is_what_the_patterns_formulas_say(inputs: Call, pattern: Pattern, layer: int) -> None:
    expected = brute_force(inputs, pattern, layer)
    assert torch.equal(visible(inputs, pattern, layer=layer).expand_as(expected), expected)


@given(calls(), PATTERNS)
def test_a_part_of_the_mask_is_that_part_of_the_whole(inputs: Call, pattern: Any) -> None:
    rows, columns = slice(1, 7), slice(2, 11)
    assert torch.equal(visible(inputs, pattern, rows, columns), visible(inputs, pattern)[:, rows, columns])


# --- the ranges that chunkwise visits -------------------------------------------------------------------------------

LEFT = call(9, 9, attention_mask=padding("left", 3, 9)[None])
SHORT_THEN_LONG = call(8, 8, segment_ids=torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1]]))


@given(calls(), PATTERNS, st.integers(1, 9), st.integers(1, 9))
@example(SHORT_THEN_LONG, SlidingWindow(window=1, global_tokens=2), 4, 9)
@example(call(2, 1), SlidingWindow(window=1, causal=False), 1, 9)
@example(LEFT, SlidingWindow(window=1, global_tokens=2), 2, 9)
@example(LEFT, SlidingWindow(window=1, global_tokens=2, causal=False), 2, 9)
def test_every_visible_key_is_visited_exactly_once(inputs: Call, pattern: Any, size: int, keys: int) -> None:
    seen = brute_force(inputs, pattern)
    visits = torch.zeros(seen.shape, dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunkwise, "QUERIES", size)
        patch.setattr(chunkwise, "KEYS", keys)
        visited = chunkwise.Call(inputs, AttentionOptions(pattern=pattern))
        for block in visited.blocks():
            for tile in block.tiles(keys):
                assert len(tile) <= keys
                for span, bias in zip(tile.spans, visited.view.biases(block, tile, torch.float32), strict=True):
                    shown = 1 if bias is None else (bias[:, 0, 0] == 0).long()
                    visits[block.batch, block.rows, span.start : span.stop] += shown
    assert torch.equal(visits, seen.long())


def work(inputs: Call, pattern: Any) -> int:
    """Pairs of query and key that chunkwise computes."""
    return sum(
        (block.batch.stop - block.batch.start) * block.length * len(span)
        for block in chunkwise.Call(inputs, AttentionOptions(pattern=pattern)).blocks()
        for span in block.columns
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [False, True])
def test_a_windows_work_is_linear_in_the_length(causal: bool, padded: bool) -> None:
    T, W, G = 8192, 256, 16
    masks = {"attention_mask": padding("left", 1000, T)[None]} if padded else {}
    pairs = work(call(T, T, **masks), SlidingWindow(window=W, global_tokens=G, causal=causal))
    wide = 0 if causal else 2 * chunkwise.QUERIES * T  # the rows of global tokens see everything, in one or two blocks
    assert pairs <= T * ((1 if causal else 2) * W + G + chunkwise.QUERIES) + wide


def test_packed_documents_cost_what_they_cost_apart() -> None:
    length, documents = 512, 16
    ids = torch.arange(documents).repeat_interleave(length)[None]
    packed = call(length * documents, length * documents, segment_ids=ids)
    for pattern in (Causal(), Full(), SlidingWindow(window=64, global_tokens=4, causal=False)):
        assert work(packed, pattern) <= documents * work(call(length, length), pattern)
