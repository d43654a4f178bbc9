"""The visibility patterns, as data: which keys j a query i may see.

i and j are positions inside one segment, counted from its first real token. The window counts the query itself.
"""

from __future__ import annotations

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
