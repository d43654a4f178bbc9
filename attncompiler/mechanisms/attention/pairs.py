"""How many pairs of query and key see each other under a pattern, in closed form: what attention's work is made of.

Block patterns are counted through C(n, m), the visible pairs of the first n queries and the first m keys where the
pattern is not causal. It is symmetric, and a causal pattern is its lower half with the diagonal.
"""

from __future__ import annotations

from collections.abc import Callable

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


def visible_pairs(pattern: Pattern, T: int, S: int) -> int:
    """Pairs (query, key) that see each other among T queries and S keys, the last of each aligned; in O(1).

    Where `random` is not causal and S no multiple of its blocks, a last block that is drawn counts as a whole one.
    """
    before = S - T  # the position of the first query
    match pattern:
        case Full():
            return T * S
        case Causal():
            return ramp(S, S) - ramp(before, S)
        case SlidingWindow(window=W, global_tokens=G, causal=True):
            seen = ramp(S, W) + ramp(S - W, G)
            return seen - (ramp(before, W) + ramp(before - W, G))
        case SlidingWindow(window=W, global_tokens=G):
            # a query before G sees every key; a later one min(S, i + W), less those between the globals and the band
            wide = max(0, min(G, S) - before)
            first = max(min(G, S), before)
            ends = ramp(S - 1 + W, S) - ramp(first - 1 + W, S)
            gaps = ramp(S - W - G, S) - ramp(first - W - G, S)
            return wide * S + ends - gaps
        case Chunked(chunk=C):
            return _chunked(S, C) - _chunked(before, C)
        case Strided(block_size=b):
            blocks = _Blocks(b, _strided_blocks(pattern), lambda x: _strided_sum(pattern, x))
            if pattern.causal:
                return _half(blocks.pairs, S) - _half(blocks.pairs, before)
            # queries before the first key: all positions are moved by whole blocks until none is negative
            moved = max(0, -(before // b)) * b
            rows = blocks.pairs(S + moved, S + moved) - blocks.pairs(before + moved, S + moved)
            return rows - blocks.pairs(S + moved, moved) + blocks.pairs(before + moved, moved)
        case LocalGlobal() | Random():
            return _near_and_global(pattern, T, S)


def ramp(count: int, limit: int) -> int:
    """Σ min(x, limit) over x = 1 … count; 0 for a count below 1."""
    if count < 1 or limit < 1:
        return 0
    low = min(count, limit)
    return low * (low + 1) // 2 + (count - low) * limit


def _half(pairs: Callable[[int, int], int], n: int) -> int:
    """Of the first n queries, those keys that are not later."""
    return (pairs(n, n) + n) // 2 if n > 0 else 0


def _chunked(count: int, chunk: int) -> int:
    whole, rest = divmod(max(count, 0), chunk)
    return whole * ramp(chunk, chunk) + ramp(rest, chunk)


class _Blocks:
    """Pairs of a pattern that the distance of two blocks decides, each block seeing itself.

    `seen(x)` is how many of the distances 0 … x see each other, `summed(x)` the sum of seen(0) … seen(x − 1).
    """

    def __init__(self, size: int, seen: Callable[[int], int], summed: Callable[[int], int]):
        self.size, self.seen, self.summed = size, seen, summed

    def pairs(self, n: int, m: int) -> int:
        """C(n, m), for n and m not negative."""
        (rows, r), (columns, u) = divmod(n, self.size), divmod(m, self.size)
        whole = self.size**2 * self._grid(rows, columns)
        edges = self.size * (u * self._column(rows, columns) + r * self._column(columns, rows))
        distance = abs(rows - columns)
        return whole + edges + r * u * (self._seen(distance) - self._seen(distance - 1))

    def _seen(self, x: int) -> int:
        return self.seen(x) if x >= 0 else 0

    def _grid(self, rows: int, columns: int) -> int:
        """Pairs of blocks: before and at the diagonal, behind it, less what lies before the first block."""
        both = min(rows, columns)
        behind = self.summed(columns) - self.summed(columns - both) - both
        return self.summed(rows) + behind - self.summed(max(0, rows - columns))

    def _column(self, rows: int, column: int) -> int:
        """The blocks of the first `rows` that see the block `column`."""
        if rows <= column:
            return self._seen(column) - self._seen(column - rows)
        return self._seen(column) + self._seen(rows - 1 - column) - 1


def _strided_blocks(pattern: Strided) -> Callable[[int], int]:
    near, stride = pattern.window, pattern.stride
    return lambda x: min(x + 1, near) + max(0, x // stride - (near - 1) // stride)


def _strided_sum(pattern: Strided, x: int) -> int:
    near, stride = pattern.window, pattern.stride
    total = ramp(x, near)
    if x > near:
        total += _floors(x, stride) - _floors(near, stride) - (x - near) * ((near - 1) // stride)
    return total


def _floors(x: int, stride: int) -> int:
    """Σ i div stride over i = 0 … x − 1."""
    whole, rest = divmod(x, stride)
    return stride * whole * (whole - 1) // 2 + rest * whole


def _near_and_global(pattern: LocalGlobal | Random, T: int, S: int) -> int:
    size, near, top = pattern.block_size, pattern.local_blocks, pattern.global_blocks
    band = _Blocks(size, lambda x: min(x + 1, near), lambda x: ramp(x, near))
    before = S - T

    def pairs(n: int, m: int) -> int:
        """All with a global token on either side, and the band of the others, which begins at a block."""
        rows, columns = max(0, n - top * size), max(0, m - top * size)
        return n * m - rows * columns + band.pairs(rows, columns)

    def further(n: int) -> int:
        """The keys that the first n queries see by chance."""
        if not isinstance(pattern, Random):
            return 0
        rows, rest = divmod(max(n, 0), size)
        drawn = [_drawn(pattern, count, -(-S // size)) for count in (rows, rows + 1)]
        return size * (size * drawn[0] + rest * (drawn[1] - drawn[0]))

    if pattern.causal:
        return _half(pairs, S) - _half(pairs, before) + further(S) - further(before)
    if before < 0:
        return pairs(S, S) + further(S) - before * S  # a query before the first key is before the globals' last
    return pairs(S, S) - pairs(before, S) + further(S) - further(before)


def _drawn(pattern: Random, rows: int, blocks: int) -> int:
    """How many blocks the first `rows` blocks of queries see by chance, of so many blocks of keys."""
    near, top, most = pattern.local_blocks, pattern.global_blocks, pattern.random_blocks
    if pattern.causal:
        return ramp(rows - near - top, most)
    rows = min(rows, blocks)

    def falling(low: int, high: int) -> int:
        """Rows low … high − 1, which have candidates behind them alone."""
        return ramp(blocks - near - low, most) - ramp(blocks - near - high, most) if high > low else 0

    def rising(low: int, high: int) -> int:
        """Rows low … high − 1, which have candidates before them alone."""
        return ramp(high - near - top, most) - ramp(low - near - top, most) if high > low else 0

    first, last = near + top, blocks - near  # candidates before a row from `first` on, behind it up to `last`
    both = max(0, min(last, rows) - first) * min(most, max(0, blocks - 2 * near + 1 - top))
    return falling(top, min(first, last, rows)) + both + rising(max(first, last, top), rows)
