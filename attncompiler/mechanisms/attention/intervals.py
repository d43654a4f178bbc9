"""Which keys a range of queries sees under a pattern, as ranges of positions: what block lists and kernels start from.

For the queries at positions first … last of a sequence of `length` keys, `seen_by_some` gives the keys that at least
one of them sees and `seen_by_all` those that every one of them sees. Both are exact, and cost what there is to say:
the number of ranges, never the number of tokens. Ranges are half-open, in order, and do not touch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

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
from attncompiler.mechanisms.attention.random_blocks import NONE, drawn_range

Range = tuple[int, int]


def seen_by_some(pattern: Pattern, first: int, last: int, length: int, layer: int = 0) -> list[Range]:
    """The keys that at least one of the queries first … last sees."""
    return union(_some(pattern, first, last, length, layer), 0, min(length, last + 1) if pattern.causal else length)


def seen_by_all(pattern: Pattern, first: int, last: int, length: int, layer: int = 0) -> list[Range]:
    """The keys that each of the queries first … last sees."""
    return union(_all(pattern, first, last, length, layer), 0, min(length, first + 1) if pattern.causal else length)


def union(ranges: Iterable[Range], low: int, high: int) -> list[Range]:
    """The ranges between low and high, in order, those that touch joined."""
    joined: list[Range] = []
    for start, stop in sorted((max(start, low), min(stop, high)) for start, stop in ranges):
        if stop <= start:
            continue
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


EVERYTHING = (0, 2**62)


def _some(pattern: Pattern, first: int, last: int, length: int, layer: int) -> Iterator[Range]:
    match pattern:
        case Full() | Causal():
            yield EVERYTHING
        case SlidingWindow(window=window, global_tokens=tokens, causal=causal):
            yield EVERYTHING if not causal and first < tokens else (first - window + 1, last + window)
            yield 0, tokens
        case Chunked(chunk=chunk):
            yield first // chunk * chunk, last + 1
        case Strided():
            yield from _strided(pattern, first, last, length)
        case LocalGlobal() | Random():
            yield from _near_and_global(pattern, first // pattern.block_size, last // pattern.block_size)
            if isinstance(pattern, Random):
                drawn_blocks = _drawn(pattern, first // pattern.block_size, last // pattern.block_size, length, layer)
                yield from (_tokens(block, pattern.block_size) for row in drawn_blocks for block in row)


def _all(pattern: Pattern, first: int, last: int, length: int, layer: int) -> Iterator[Range]:
    match pattern:
        case Full() | Causal():
            yield EVERYTHING
        case SlidingWindow(window=window, global_tokens=tokens, causal=causal):
            # queries that are global see all there is: only the others bound what all of them see
            first = first if causal else max(first, tokens)
            yield EVERYTHING if last < first else (last - window + 1, first + window)
            yield 0, tokens
        case Chunked(chunk=chunk):
            if first // chunk == last // chunk:
                yield first // chunk * chunk, first + 1
        case Strided(stride=stride, window=window, block_size=size):
            i, k = first // size, last // size
            if i == k:
                yield from _strided(pattern, first, last, length)
            elif stride == 1:
                yield EVERYTHING
            else:
                # one distance more where it is a multiple of the stride: the one behind it is not
                reach = window + (window % stride == 0)
                yield (k - reach + 1) * size, (i + reach) * size
        case LocalGlobal(block_size=size):
            yield from _near_and_global(pattern, first // size, last // size, every=True)
        case Random(block_size=size):
            i, k = first // size, last // size
            yield from _near_and_global(pattern, i, k, every=True)
            rows = _drawn(pattern, i, k, length, layer)
            near = [union(_near_and_global(pattern, row, row), 0, length) for row in range(i, k + 1)]
            for block in set().union(*rows):
                start, stop = _tokens(block, size)
                if all(
                    block in row or any(low <= start < high for low, high in seen)
                    for row, seen in zip(rows, near, strict=True)
                ):
                    yield start, stop


def _tokens(block: int, size: int) -> Range:
    return block * size, (block + 1) * size


def _near_and_global(pattern: LocalGlobal | Random, first: int, last: int, every: bool = False) -> Iterator[Range]:
    """The local and global blocks of some, or of every one, of the blocks first … last of queries."""
    size, near, top = pattern.block_size, pattern.local_blocks, pattern.global_blocks
    yield 0, top * size
    if not pattern.causal and every:
        first = max(first, top)
    if not pattern.causal and (last < first if every else first < top):
        yield EVERYTHING
    elif every:
        yield (last - near + 1) * size, (first + near) * size
    else:
        yield (first - near + 1) * size, (last + near) * size


def _strided(pattern: Strided, first: int, last: int, length: int) -> Iterator[Range]:
    """What the queries see of the last `window` blocks, and of every `stride`-th before (and behind) them."""
    size, stride = pattern.block_size, pattern.stride
    i, k = first // size, last // size
    if k - i + 1 >= stride:
        yield EVERYTHING
        return
    yield (i - pattern.window + 1) * size, (k + pattern.window) * size
    beyond = 0 if pattern.causal else (length - 1) // size
    # blocks i + m·stride … k + m·stride, one set for each m that meets blocks 0 … beyond
    lowest = -(k // stride)
    highest = 0 if pattern.causal else (beyond - i) // stride
    for m in range(lowest, highest + 1):
        yield (i + m * stride) * size, (k + m * stride + 1) * size


def _drawn(pattern: Random, first: int, last: int, length: int, layer: int) -> list[set[int]]:
    """The blocks drawn for each of the blocks first … last of queries."""
    found = drawn_range(pattern, layer, first, last, -(-length // pattern.block_size))
    return [set(row) - {NONE} for row in found.tolist()]
