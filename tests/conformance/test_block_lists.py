"""Patterns as ranges and as block lists: the same pairs as the dense mask, made without one."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from attncompiler import ops
from attncompiler.bench.measure import Work, peak_bytes
from attncompiler.errors import InputError
from attncompiler.mechanisms.attention.block_lists import BlockLists, TileList, block_lists
from attncompiler.mechanisms.attention.cases import PATTERNS
from attncompiler.mechanisms.attention.intervals import seen_by_all, seen_by_some
from attncompiler.mechanisms.attention.pattern import LocalGlobal, Pattern, Random, SlidingWindow, Strided
from attncompiler.mechanisms.attention.random_blocks import NONE, drawn
from attncompiler.mechanisms.attention.visibility import visible

LENGTHS = st.integers(1, 60)
LAYERS = st.integers(0, 3)


def dense(pattern: Pattern, T: int, S: int, layer: int) -> Tensor:
    inputs = {"q": torch.zeros(1, T, 1, 1), "k": torch.zeros(1, S, 1, 1)}
    return visible(inputs, pattern, layer=layer).expand(1, T, S)[0]


@given(PATTERNS, LENGTHS, LENGTHS, LAYERS, st.data())
def test_ranges_hold_what_some_and_what_all_queries_see(
    pattern: Pattern, T: int, S: int, layer: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, T - 1))
    stop = data.draw(st.integers(first + 1, T))
    seen = dense(pattern, T, S, layer)[first:stop]
    for ranges, expected in ((seen_by_some, seen.any(0)), (seen_by_all, seen.all(0))):
        found = ranges(pattern, first + S - T, stop - 1 + S - T, S, layer)
        held = torch.zeros(S, dtype=torch.bool)
        for low, high in found:
            held[low:high] = True
        assert torch.equal(held, expected)
        assert all(low < high for low, high in found)
        assert all(before < low for (_, before), (low, _) in itertools.pairwise(found))


def as_mask(tiles: TileList, rows: int, columns: int) -> Tensor:
    mask = torch.zeros(rows, columns, dtype=torch.int64)
    for row in range(rows):
        listed = tiles.indices[tiles.offsets[row] : tiles.offsets[row + 1]].long()
        assert torch.equal(listed, listed.unique())
        mask[row, listed] = 1
    assert int(tiles.offsets[-1]) == len(tiles)
    return mask.bool()


@given(PATTERNS, LENGTHS, LENGTHS, st.sampled_from([1, 4, 8, 16]), st.sampled_from([1, 4, 8, 16]), LAYERS)
@example(Strided(stride=2, window=2, block_size=3), 40, 40, 6, 3, 0)
@example(Strided(stride=2, window=2, block_size=3, causal=False), 40, 37, 6, 3, 0)
@example(Random(block_size=3, random_blocks=2, causal=False), 40, 40, 8, 4, 1)
@example(SlidingWindow(window=5, global_tokens=6, causal=False), 40, 40, 4, 4, 0)
def test_block_lists_equal_the_dense_mask(
    pattern: Pattern, T: int, S: int, tile_q: int, tile_k: int, layer: int
) -> None:
    seen = dense(pattern, T, S, layer)
    lists = block_lists(pattern, T, S, tile_q=tile_q, tile_k=tile_k, layer=layer)
    tiles = [part.split(tile_k, 1) for part in seen.split(tile_q, 0)]
    some = torch.tensor([[bool(tile.any()) for tile in row] for row in tiles])
    every = torch.tensor([[bool(tile.all()) for tile in row] for row in tiles])
    rows, columns = some.shape
    assert torch.equal(as_mask(lists.full, rows, columns), every)
    assert torch.equal(as_mask(lists.partial, rows, columns), some & ~every)
    assert torch.equal(as_mask(lists.full_transposed, columns, rows), every.T)
    assert torch.equal(as_mask(lists.partial_transposed, columns, rows), (some & ~every).T)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pattern": "bands"}, "E403 pattern 'bands' is not valid"),
        ({"tile_q": 0}, "E403 tile_q must be a whole number of at least 1, not 0"),
        ({"keys": 2.0}, "E403 keys must be a whole number"),
        ({"layer": -1}, "E403 layer must be a whole number of at least 0"),
    ],
)
def test_what_lists_nothing_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ops.block_lists(**{"pattern": "causal", "queries": 8, "keys": 8, **arguments})


def test_a_pattern_may_be_named_or_be_as_in_yaml() -> None:
    named, written = ops.block_lists("causal", 9, 9, tile_q=4, tile_k=4), {"kind": "sliding_window", "window": 4}
    assert [len(named.full), len(named.partial)] == [4, 2]  # of the last tile there is one token, which sees itself
    made = [ops.block_lists(pattern, 9, 9, tile_q=4, tile_k=4) for pattern in (written, SlidingWindow(window=4))]
    assert torch.equal(made[0].partial.indices, made[1].partial.indices)


MILLION, WINDOW, GLOBALS, BLOCK = 2**20, 4096, 64, 128


def listing(tokens: int) -> Work:
    """What lists the window's blocks of so many tokens; a function of this module, for a process of its own."""
    pattern = SlidingWindow(window=WINDOW, global_tokens=GLOBALS)
    return lambda: block_lists(pattern, tokens, tokens, tile_q=BLOCK, tile_k=BLOCK)


def test_a_million_tokens_are_listed_without_a_mask() -> None:
    """1,048,576 tokens, window 4096, 64 globals, blocks of 128: what is kept is counted, and held in megabytes."""
    lists = listing(MILLION)()
    n, reach = MILLION // BLOCK, WINDOW // BLOCK
    # the diagonal, the tile that the window begins in, and the globals' half tile where it is neither
    assert len(lists.partial) == n + (n - reach) + (n - 1 - reach)
    assert len(lists.full) == sum(min(row, reach - 1) for row in range(n))
    assert sum(tensor.nbytes for tensor in tensors_of(lists)) < 8 * 2**20


def test_listing_a_million_tokens_takes_megabytes() -> None:
    """By how much the resident memory of a process rises, whoever allocates: not a byte for each pair of tiles."""
    assert peak_bytes(listing, (MILLION,), small=(2**14,)) < (MILLION // BLOCK) ** 2


def tensors_of(lists: BlockLists) -> list[Tensor]:
    listed = (lists.full, lists.partial, lists.full_transposed, lists.partial_transposed)
    return [tensor for tiles in listed for tensor in (tiles.offsets, tiles.indices)]


# --- the draws of `random` ------------------------------------------------------------------------------------------

RANDOM = st.builds(
    Random,
    block_size=st.integers(1, 4),
    random_blocks=st.integers(1, 5),
    local_blocks=st.integers(1, 3),
    global_blocks=st.integers(0, 3),
    seed=st.integers(0, 2**39),
    causal=st.booleans(),
)


@given(RANDOM, LAYERS, st.integers(1, 40))
def test_draws_are_distinct_and_as_many_as_there_may_be(pattern: Random, layer: int, blocks: int) -> None:
    near, top = pattern.local_blocks, pattern.global_blocks
    rows = torch.arange(blocks)
    for row, found in enumerate(drawn(pattern, layer, rows, torch.full_like(rows, blocks)).tolist()):
        behind = [] if pattern.causal else [J for J in range(top, blocks) if J - row >= near]
        candidates = [J for J in range(top, blocks) if row - J >= near] + behind
        candidates = [] if not pattern.causal and row < top else candidates
        chosen = [J for J in found if J != NONE]
        assert set(chosen) <= set(candidates)
        assert len(set(chosen)) == len(chosen) == min(pattern.random_blocks, len(candidates))


@given(RANDOM, LAYERS)
def test_causal_draws_are_those_of_every_length(pattern: Random, layer: int) -> None:
    pattern = pattern.model_copy(update={"causal": True})
    rows = torch.arange(40)
    long = drawn(pattern, layer, rows, torch.full_like(rows, 40))
    for stop in (1, 7, 39):
        short = drawn(pattern, layer, rows[:stop], torch.full((stop,), stop))
        assert torch.equal(long[:stop, : short.shape[1]], short)
        assert (long[:stop, short.shape[1] :] == NONE).all()


def test_draws_are_the_documented_hash() -> None:
    """The hash once more in Python's own integers, and its draws for one block."""

    def mix(x: int) -> int:
        for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> shift)) * multiplier % 2**64
        return x ^ (x >> 31)

    pattern, layer, row = Random(block_size=8, random_blocks=6, local_blocks=2, global_blocks=1, seed=77), 5, 30
    candidates = row - 2  # blocks 1 … 28
    chosen: list[int] = []
    for s in range(6):
        m = candidates - 6 + s
        value = mix((mix((mix((mix(77) + layer) % 2**64) + row) % 2**64) + s) % 2**64)
        pick = (value & (2**63 - 1)) % (m + 1)
        chosen.append(m if pick in chosen else pick)
    assert drawn(pattern, layer, torch.tensor([row]), 31).tolist() == [[c + 1 for c in chosen]]


@pytest.mark.parametrize("causal", [True, False])
def test_draws_are_uniform(causal: bool) -> None:
    """χ² of how often each candidate is drawn, over 4,000 seeds: within five standard deviations of its mean."""
    counts: Counter[int] = Counter()
    row, blocks, r = 20, 40, 3
    for seed in range(4000):
        pattern = Random(block_size=1, random_blocks=r, seed=seed, causal=causal)
        counts.update(drawn(pattern, 0, torch.tensor([row]), torch.tensor([blocks]))[0].tolist())
    candidates = row if causal else blocks - 1
    assert len(counts) == candidates
    expected = 4000 * r / candidates
    # draws of one seed exclude each other, which lowers the variance of a count by 1 − r / candidates
    chi = sum((count - expected) ** 2 for count in counts.values()) / (expected * (1 - r / candidates))
    freedom = candidates - 1
    assert abs(chi - freedom) < 5 * (2 * freedom) ** 0.5


def test_layers_and_seeds_draw_otherwise() -> None:
    rows = torch.arange(100, 140)
    pattern = Random(block_size=1, random_blocks=4)
    first = drawn(pattern, 0, rows, 140)
    assert not torch.equal(first, drawn(pattern, 1, rows, 140))
    assert not torch.equal(first, drawn(pattern.model_copy(update={"seed": 1}), 0, rows, 140))
    assert torch.equal(first, drawn(pattern, 0, rows, 140))


def test_bigbirds_blocks_are_few() -> None:
    """As many tiles as the paper's pattern has, whatever the length."""
    pattern = Random(block_size=64, random_blocks=3, local_blocks=2, global_blocks=2)
    lists = block_lists(pattern, 2**16, 2**16, tile_q=64, tile_k=64)
    assert len(lists.full) + len(lists.partial) <= 2**10 * (2 + 2 + 3)


def test_local_blocks_of_a_page_are_whole_tiles() -> None:
    lists: Any = block_lists(
        LocalGlobal(block_size=64, local_blocks=3, global_blocks=1), 2048, 2048, tile_q=64, tile_k=64
    )
    assert len(lists.partial) == 2048 // 64  # the diagonal alone
