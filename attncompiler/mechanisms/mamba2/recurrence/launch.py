"""The gradients of what heads share and of each: shapes of tiles, segments of the sequence, and buffers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attncompiler.blocks.gpu import Device, device_of, parts, power_of_2
from attncompiler.blocks.launching.launcher import Launcher, known_by
from attncompiler.blocks.recurrence.launch import (
    CARRY,
    DTYPES,
    Groups,
    Order,
    Side,
    Tiles,
    groups_for,
    precision,
    tiles_for,
)
from attncompiler.blocks.recurrence.passes import Skip
from attncompiler.mechanisms.mamba2.cost import HELD
from attncompiler.mechanisms.mamba2.recurrence.heads import Dots, columns_kernel, rows_kernel
from attncompiler.mechanisms.mamba2.recurrence.states import states_kernel

STATES, ROWS, COLUMNS = Launcher(states_kernel), Launcher(rows_kernel), Launcher(columns_kernel)

PROGRAMS = 1
"""for each multiprocessor, before a program takes all heads of a group"""


@dataclass(frozen=True, slots=True)
class Found:
    """The gradients of x, B, C and the state before the first token, and what others are made of, by chunks."""

    x: Tensor
    b: Tensor
    c: Tensor
    initial: Tensor
    dots: Dots
    passing: Tensor
    """(blocks, B, H, chunks)"""
    tokens: int
    """of a chunk"""


ALONG = 64
"""rows of a state for a program that goes through chunks of bf16 numbers: its chain of chunks is what it waits for"""


MOST_NUMBERS = {True: 128, False: 64}
"""numbers of N for a program that goes through heads at most, whose sums for C tokens lie in registers: by whether
operands lie in shared memory"""


def shapes(device: Device, dtype: torch.dtype, N: int, P: int, most: int, masked: bool) -> tuple[Tiles, Tiles, int]:
    """Of the kernel that goes through chunks, and of those that go through heads, which have the same chunks, and the
    numbers of N of these. Where pairs are `masked`, their masks take registers that a block of P leaves."""
    along = tiles_for(device, dtype, N, P)
    tokens = min(along.tokens, max(16, 1 << (most.bit_length() - 1)))
    wide = max(16, power_of_2(N))
    if device.interpreted:
        return replace(along, tokens=tokens), Tiles(tokens, along.width, 4, 1), min(wide, 16)
    # beside several blocks of N no more than elsewhere
    in_shared_memory = device.capability[0] == 9 and dtype == torch.bfloat16 and wide <= 128
    wide = min(wide, MOST_NUMBERS[in_shared_memory])
    if dtype != torch.bfloat16:
        return replace(along, tokens=tokens), Tiles(tokens, min(max(16, power_of_2(P)), 16), 8, 1), wide
    width = min(max(16, power_of_2(P)), 16 if masked else 32)
    ahead = 2 * (2 * (2 * tokens + wide) * width + 2 * tokens * wide)  # bytes, with the next head's on their way
    stages = 2 if ahead <= device.shared_memory // 2 else 1
    return replace(along, tokens=tokens), Tiles(tokens, width, 4, stages), wide


def segments(groups: Groups, each: int, held: int) -> Iterator[tuple[int, int]]:
    """Groups, from one to before another, of which about so many bytes of states are held, `each` of a chunk."""
    wanted = max(1, round(groups.count * groups.chunks * each / held))
    some = parts(groups.count, wanted)
    for begin in range(0, groups.count, some):
        yield begin, min(begin + some, groups.count)


def gradients(
    x: Tensor,
    b: Tensor,
    c: Tensor,
    dy: Tensor,
    factor: Tensor,
    order: Order,
    skip: Tensor | None,
    skipped: bool,
    start: Tensor | None,
    end: Tensor | None,
    most_tokens: int,
) -> Found:
    """The gradients of Σ dy · (C·h + D·x), x and dy (B, T, H, P), b and c (B, T, G, N), by the time steps `factor`.

    `skipped` says whether x·dy is asked for. `start` is the state before the first token, and `end` the gradient of the
    one behind the last, (B, H, N·P).
    """
    B, T, H, P = x.shape
    G, N = b.shape[2:]
    device, dtype, M = device_of(x.device), x.dtype, N * P
    along, across, numbers = shapes(
        device, dtype, N, P, most_tokens, masked=not (order.runs is None and order.real is None)
    )
    C, wide_n = along.tokens, max(16, power_of_2(N))
    rows = 16 if device.interpreted else min(wide_n, ALONG) if dtype == torch.bfloat16 else wide_n
    blocks = parts(P, along.width) * parts(N, rows)
    groups = groups_for(device, B * H * blocks, T, along)
    chunks = parts(T, C)
    sets = _sets(device, B * min(chunks, max(1, HELD // (B * H * M * dtype.itemsize))) * G, H // G)
    wide: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    held_type = torch.float32 if dtype == torch.float16 else dtype
    whole = order.real is None and T % C == 0
    times = order.argument(C)
    share = H // G
    sides = Side(x).argument(), Side(b, share).argument(), Side(c, share).argument(), Side(dy).argument()
    share_of = Skip(None, 0, 0) if skip is None else Skip(skip, *skip.stride())
    common = wide_n, DTYPES[dtype], precision(dtype)
    known = known_by(x, b, c, dy, factor, *times, skip, start, end), skipped, along, across, numbers, sets, whole, G, H

    def boundaries(y: int, u: int, weight: Tensor | None, state: Tensor | None, reverse: bool) -> Tensor | None:
        """The states between groups, (B, H, groups − 1, M), in the order in which they are met."""
        if groups.count == 1:
            return None
        count = groups.count - 1
        found, kept = torch.empty(B, H, count, M, **wide), torch.empty(B, H, count, **wide)
        walk(y, u, weight, None, found, kept, None, None, None, count, 0, count, 0, chunks, reverse)
        CARRY((B * H, parts(M, 1024)), (known, reverse), found, kept, state, count, M, 1024)
        return found

    def walk(
        y: int, u: int, weight: Tensor | None, initial: Tensor | None, states: Tensor | None, kept: Tensor | None,
        held: Tensor | None, passing: Tensor | None, final: Tensor | None, count: int, offset: int, some: int,
        first: int, holds: int, reverse: bool,
    ) -> None:  # fmt: skip
        behind = groups.count * groups.chunks if reverse else chunks
        STATES(
            (B * H * some * blocks,),
            (known, "states", reverse, held is None, states is None, initial is None, final is None),
            *(sides[y], sides[u], weight, times, initial, states, kept, held, passing, final),
            *(T, H, B * H * T, count, groups.chunks, behind, offset, some, first, holds),
            *(held is not None, reverse, whole, C, N, P, rows, along.width, *common[1:]),
            num_warps=along.num_warps,
            # a turn asks at its end for what the next one has: of two stages that leaves one, waited for
            num_stages=3 if along.num_stages == 2 else 1,
        )

    before = boundaries(1, 0, factor, start, False)
    behind = boundaries(2, 3, None, end, True)
    dx = torch.empty(B, T, H, P, dtype=dtype, device=x.device)
    shared_type = torch.float32 if sets > 1 else dtype
    dc = torch.empty(sets, B, T, G, N, dtype=shared_type, device=x.device)
    part = torch.empty(sets, B, T, G, N, **wide)
    db = part if sets > 1 else torch.empty_like(dc)
    of_n = parts(N, numbers)
    each_token = [torch.empty(of_n, B, H, T, **wide) for _ in range(5 if skipped else 4)]
    dots = Dots(*each_token, *([] if skipped else [None]))
    passing = torch.empty(blocks, B, H, chunks, **wide)
    initial = torch.empty(B, H, M, **wide)
    each = B * H * M * held_type.itemsize
    space: Tensor | None = None
    held_bytes = each * groups.chunks if device.interpreted else HELD  # short sequences have several segments too
    for begin, stop in segments(groups, each, held_bytes):
        first, last = begin * groups.chunks, min(stop * groups.chunks, chunks)
        count = last - first
        if space is None:  # the first segment is the longest
            space = torch.empty(B * count * H * M, dtype=held_type, device=x.device)
        held = space[: B * count * H * M]
        walk(
            1, 0, factor, start, before, None, held, None, None, groups.count, begin, stop - begin, first, count, False
        )
        sizes = T, H, B * H * T, first, count, sets
        constants = G, whole, C, N, P, numbers, across.width, *common[1:]
        warps = {"num_warps": across.num_warps, "num_stages": across.num_stages}
        grid = (B * count * G * sets * of_n,)
        ROWS(grid, (known, "rows"), *sides, times, factor, held, dots, dc, part, *sizes, *constants, **warps)
        walk(
            2, 3, None, end, behind, None, held, passing, initial, groups.count, groups.count - stop, stop - begin,
            first, count, True,
        )  # fmt: skip
        COLUMNS(
            grid,
            (known, "columns"),
            *(*sides, times, factor, share_of, held, dots, dx, part, db),
            *(*sizes, *constants),
            **warps,
        )
    if sets > 1:
        db, dc = db.sum(0), dc.sum(0)
    else:
        db, dc = db[0], dc[0]
    if of_n > 1:  # pairs are those of all of N in every block: the first wrote them
        dots = Dots(*(each if each is None else each.sum(0) for each in dots._replace(between=dots.between[:1])))
    return Found(dx, db.to(dtype), dc.to(dtype), initial, dots, passing, C)


def _sets(device: Device, programs: int, heads: int) -> int:
    """Into how many sets a group's heads are cut, where there are so many programs for all of them."""
    if device.interpreted:
        return 2 - heads % 2
    wanted = parts(PROGRAMS * device.multiprocessors, programs)
    return min((count for count in range(1, heads + 1) if heads % count == 0 and count >= wanted), default=heads)
