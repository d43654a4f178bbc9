"""The visibility patterns, as data: which keys j a query i may see.

i and j are positions inside one segment, counted from its first real token. The window counts the query itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from attncompiler.mechanisms.base import Length, StrictModel

Count = Annotated[int, Field(ge=0, lt=2**40)]


class Full(StrictModel):
    """Every key, always."""

    kind: Literal["full"] = "full"

    @property
    def causal(self) -> bool:
        return False


class Causal(StrictModel):
    """j ≤ i."""

    kind: Literal["causal"] = "causal"

    @property
    def causal(self) -> bool:
        return True


class SlidingWindow(StrictModel):
    """Causal: j ≤ i and (i − j < window or j < global_tokens). Not causal: |i − j| < window, or j or i global."""

    kind: Literal["sliding_window"] = "sliding_window"
    window: Length
    global_tokens: Count = 0
    causal: bool = True


class Strided(StrictModel):
    """Over blocks I, J: the last `window` blocks, and every `stride`-th before them."""

    kind: Literal["strided"] = "strided"
    stride: Length
    window: Length
    block_size: Length = 1
    causal: bool = True


class LocalGlobal(StrictModel):
    """Over blocks I, J: the last `local_blocks` blocks, own block included, and the first `global_blocks`."""

    kind: Literal["local_global"] = "local_global"
    block_size: Length
    local_blocks: Length
    global_blocks: Count = 0
    causal: bool = True


class Random(StrictModel):
    """BigBird (Zaheer et al. 2020): local and global blocks, and `random_blocks` more drawn by a documented hash."""

    kind: Literal["random"] = "random"
    block_size: Length
    random_blocks: Length
    local_blocks: Length = 1
    global_blocks: Count = 0
    seed: Count = 0
    causal: bool = True


class Chunked(StrictModel):
    """j ≤ i inside chunks of `chunk` tokens."""

    kind: Literal["chunked"] = "chunked"
    chunk: Length

    @property
    def causal(self) -> bool:
        return True


Pattern = Annotated[
    Full | Causal | SlidingWindow | Strided | LocalGlobal | Random | Chunked, Field(discriminator="kind")
]
PATTERNS = (Full, Causal, SlidingWindow, Strided, LocalGlobal, Random, Chunked)


def is_band(pattern: Pattern) -> bool:
    """Whether each query sees one run of keys that ends with itself, as long for every query or as there are keys."""
    return isinstance(pattern, Causal) or (
        isinstance(pattern, SlidingWindow) and pattern.causal and not pattern.global_tokens
    )


# --- what decoding keeps --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Retention:
    """Which keys a decode state must hold: the `first` of a sequence, and the `recent` ones (None: all).

    Beside the first ones a query at position p sees none before `start(p)`: `recent` positions are counted back from
    the end of p's own block of `block_size`, so they are p and those before it where blocks are single tokens.
    """

    first: int = 0
    recent: int | None = None
    block_size: int = 1

    def start(self, position: int) -> int:
        """The first position among the recent ones of a query at `position`."""
        if self.recent is None:
            return 0
        return max(0, (position // self.block_size + 1) * self.block_size - self.recent)

    def slots(self, max_length: int) -> int:
        """How many keys of a sequence of up to `max_length` tokens are held at most."""
        return max_length if self.recent is None else min(max_length, self.first + self.recent)


def retained(pattern: Pattern) -> Retention:
    """What later queries may still see under a causal pattern: all keys, where any may come into sight again."""
    match pattern:
        case SlidingWindow(window=W, global_tokens=G, causal=True):
            return Retention(G, W)
        case LocalGlobal(block_size=b, local_blocks=L, global_blocks=g, causal=True):
            return Retention(g * b, L * b, b)
        case Chunked(chunk=C):
            return Retention(0, C, C)
    return Retention()
