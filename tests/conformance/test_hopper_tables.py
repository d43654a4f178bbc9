"""The tables of the kernels for Hopper say what the patterns' formulas say, which needs no such GPU to be seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attncompiler.mechanisms.attention.op import as_pattern
from attncompiler.mechanisms.attention.visibility import visible

pytest.importorskip("triton")

LISTED: list[tuple[dict[str, Any], int, int]] = [
    ({"kind": "strided", "block_size": 64, "stride": 4, "window": 2}, 384, 512),
    ({"kind": "strided", "block_size": 128, "stride": 2, "window": 1, "causal": False}, 512, 512),
    ({"kind": "local_global", "block_size": 32, "local_blocks": 2, "global_blocks": 1}, 300, 384),
    ({"kind": "local_global", "block_size": 128, "local_blocks": 1, "global_blocks": 1, "causal": False}, 384, 384),
    ({"kind": "sliding_window", "window": 70, "global_tokens": 20, "causal": False}, 450, 384),
    ({"kind": "chunked", "chunk": 100}, 384, 384),
    ({"kind": "random", "block_size": 128, "random_blocks": 1}, 512, 640),
    ({"kind": "random", "block_size": 256, "random_blocks": 1, "causal": False}, 1024, 1024),
]
SEGMENTED: list[dict[str, Any]] = [
    {"kind": "full"},
    {"kind": "causal"},
    {"kind": "sliding_window", "window": 100},
    {"kind": "sliding_window", "window": 60, "global_tokens": 150},
    {"kind": "sliding_window", "window": 60, "global_tokens": 20, "causal": False},
]


def tensors_of(T: int, S: int, device: str) -> dict[str, Tensor]:
    return {"q": torch.zeros(1, T, 1, 1, device=device)} | {
        name: torch.zeros(1, S, 1, 1, device=device) for name in "kv"
    }


def met(visits: Any, b: int, number: int) -> tuple[list[int], list[int]]:
    """The partial tiles and the whole ones that a tile meets."""
    tables = visits.tables
    if visits.listed:
        partial, whole = (
            indices[offsets[number] : offsets[number + 1]].tolist()
            for offsets, indices in (
                (tables.partial_offsets, tables.partial_indices),
                (tables.full_offsets, tables.full_indices),
            )
        )
        return partial, whole
    global_first, global_last, first, full_first, full_last, last = tables.bounds[b, number].tolist()
    assert 0 <= global_first <= global_last <= first <= full_first <= full_last <= last
    partial = [*range(global_first, global_last), *range(first, full_first), *range(full_last, last)]
    return partial, [*range(full_first, full_last)]


def seen_by_rows(visits: Any, b: int, T: int, S: int) -> Tensor:
    """(T, S): what the table of rows says."""
    fields = visits.tables.rows[b % len(visits.tables.rows), :, :, None].long()
    column = torch.arange(S, device=fields.device)[None]
    seen = (column >= fields[0]) & (column < fields[0] + fields[1])
    if visits.globals:
        seen |= (column >= fields[2]) & (column < fields[2] + fields[3])
    if visits.classes:
        seen |= (visits.tables.classes[None] == fields[2]) & (column < fields[3])
    assert not seen[T:].any()
    return seen[:T]


def check(visits: Any, wanted: Tensor, queries: int, transposed: bool) -> None:
    """Every pair that sees itself is in one tile that is met, and nothing else is, as the kernels would mask it."""
    B, T, S = wanted.shape
    own, other = (128, queries) if transposed else (queries, 128)
    for b in range(B):
        rows, found = seen_by_rows(visits, b, T, S), torch.zeros_like(wanted[b], dtype=torch.int)
        for number in range(-(-(S if transposed else T) // own)):
            for tiles, whole in zip(met(visits, b, number), (False, True), strict=True):
                for tile in tiles:
                    here = slice(number * own, (number + 1) * own), slice(tile * other, (tile + 1) * other)
                    here = here[::-1] if transposed else here
                    found[here] += 1 if whole else rows[here].int()
                    # keys that are not there would be seen
                    assert not whole or here[1].stop <= S
        assert torch.equal(found, wanted[b].int())


@pytest.mark.parametrize("number", range(len(LISTED)), ids=lambda number: str(LISTED[number][0]["kind"]))
@pytest.mark.parametrize(("queries", "transposed"), [(128, False), (64, True), (128, True)])
def test_lists_and_rows_are_those_of_the_pattern(number: int, queries: int, transposed: bool, device: str) -> None:
    from attncompiler.mechanisms.attention.flash import hopper_tables

    pattern, (T, S) = as_pattern(LISTED[number][0]), LISTED[number][1:]
    visits = hopper_tables.of_pattern(pattern, 0, T, S, torch.device(device), queries, transposed)
    own = 128 if transposed else queries
    assert sorted(visits.tables.order.tolist()) == [*range(-(-(S if transposed else T) // own))]
    assert 0 <= visits.heavy < len(visits.tables.order)
    check(visits, visible(tensors_of(T, S, device), pattern), queries, transposed)


@pytest.mark.parametrize("number", range(len(SEGMENTED)), ids=lambda number: str(SEGMENTED[number]["kind"]))
@pytest.mark.parametrize(("queries", "transposed"), [(128, False), (64, True), (128, True)])
def test_ranges_and_rows_are_those_of_the_segments(number: int, queries: int, transposed: bool, device: str) -> None:
    from attncompiler.mechanisms.attention.flash import hopper_tables

    pattern, T = as_pattern(SEGMENTED[number]), 700
    generator = torch.Generator().manual_seed(number)
    short = (torch.rand(1, T, generator=generator) < 0.01).cumsum(1)
    long = torch.arange(T)[None] // 400
    alone = torch.where(torch.arange(T) < T - 1, 5, -1)[None]
    ids = torch.cat([short, long, alone, torch.zeros_like(long)]).to(device)
    visits = hopper_tables.of_segments(ids, pattern, queries, transposed)
    wanted = visible(tensors_of(T, T, device) | {"segment_ids": ids}, pattern)
    check(visits, wanted, queries, transposed)
