"""What is measured, as data. Nothing here imports torch.

Symbols: B sequences, T queries, S keys, H query heads, K key heads, D their width.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from attncompiler.bench.grid import rows as grid

CAUSAL: Mapping[str, Any] = {"kind": "causal"}
FULL: Mapping[str, Any] = {"kind": "full"}


@dataclass(frozen=True)
class Row(grid.Row):
    """One row: a call of attention. `lengths` are those of its documents, where it has some.

    Packed documents are one sequence of T tokens told apart by segment ids; padded ones are B sequences of T tokens, of
    which each has its length's first real.
    """

    T: int
    H: int
    D: int
    B: int = 1
    K: int = 0
    S: int = 0
    pattern: Mapping[str, Any] = field(default_factory=lambda: CAUSAL)
    layout: Literal["plain", "packed", "padded"] = "plain"
    lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "K", self.K or self.H)
        object.__setattr__(self, "S", self.S or self.T)

    @property
    def causal(self) -> bool:
        return bool(self.pattern.get("causal", self.pattern["kind"] != "full"))

    @property
    def step(self) -> bool:
        """Whether it is a decoding step: fewer queries than keys."""
        return self.T != self.S

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of q, k and v."""
        keys = (self.B, self.S, self.K, self.D)
        return {"q": (self.B, self.T, self.H, self.D), "k": keys, "v": keys}


def log_normal(count: int, total: int, sigma: float = 0.8) -> tuple[int, ...]:
    """So many lengths whose logarithms are Gaussian, as lengths of documents are, of `total` tokens together."""
    drawn = random.Random(0)
    raw = [drawn.lognormvariate(0, sigma) for _ in range(count)]
    scale = (total - count) / sum(raw)
    lengths = [1 + int(length * scale) for length in raw]
    lengths[lengths.index(max(lengths))] += total - sum(lengths)
    return tuple(lengths)


def _dense(group: str, pattern: Mapping[str, Any]) -> tuple[Row, ...]:
    sizes = (
        (32, 512, 16, 128),
        (8, 2048, 16, 128),
        (2, 8192, 16, 128),
        (1, 16384, 16, 128),
        (1, 65536, 8, 128),
        (4, 4096, 32, 64),
        (1, 16384, 32, 64),
    )
    return tuple(Row(group, f"b{B}-t{T}-h{H}-d{D}", B=B, T=T, H=H, D=D, pattern=pattern) for B, T, H, D in sizes)


def _sparse(group: str, T: int, H: int, D: int, **patterns: Mapping[str, Any]) -> tuple[Row, ...]:
    return tuple(
        Row(group, f"{name.replace('_', '-')}-t{T}", T=T, H=H, D=D, pattern=pattern)
        for name, pattern in patterns.items()
    )


def _documents(group: str, H: int, D: int, count: int, total: int) -> tuple[Row, ...]:
    uneven, even = log_normal(count, total), (total // count,) * count
    longest = max(uneven)
    return (
        Row(group, "packed", T=total, H=H, D=D, layout="packed", lengths=uneven),
        Row(group, "packed-equal", T=total, H=H, D=D, layout="packed", lengths=even),
        Row(group, "padded", B=count, T=longest, H=H, D=D, layout="padded", lengths=uneven),
    )


def _window(window: int, global_tokens: int = 0) -> dict[str, Any]:
    return {"kind": "sliding_window", "window": window, "global_tokens": global_tokens}


BLOCKS: Mapping[str, Mapping[str, Any]] = {
    "strided_blocks": {"kind": "strided", "block_size": 128, "stride": 16, "window": 8},
    "strided_tokens": {"kind": "strided", "stride": 128, "window": 128},
    "local_global": {"kind": "local_global", "block_size": 128, "local_blocks": 8, "global_blocks": 2},
    # 2.5% of all pairs
    "random": {"kind": "random", "block_size": 128, "random_blocks": 2, "local_blocks": 3, "global_blocks": 2},
}

CUDA: tuple[Row, ...] = (
    *_dense("causal", CAUSAL),
    *_dense("full", FULL),
    *_sparse("sparse", 16384, 16, 128, window1024=_window(1024)),
    *_sparse("sparse", 32768, 16, 128, window4096=_window(4096), window4096_global64=_window(4096, 64), **BLOCKS),
    *_sparse("sparse", 131072, 16, 128, window4096_global64=_window(4096, 64)),
    *_sparse("long", 131072, 16, 128, window4096=_window(4096), causal=CAUSAL),
    Row("decode", "b64-s32768-h32-k8-d128", B=64, T=1, S=32768, H=32, K=8, D=128),
    *_documents("documents", 16, 128, 64, 65536),
)

CPU: tuple[Row, ...] = (
    *(
        Row(group, f"b1-t{T}-h8-d64", T=T, H=8, D=64, pattern=pattern)
        for group, pattern in (("causal", CAUSAL), ("full", FULL))
        for T in (128, 512, 2048)
    ),
    *_sparse("sparse", 512, 8, 64, window64=_window(64), random=BLOCKS["random"]),
    *_sparse("sparse", 4096, 8, 64, window256=_window(256), window256_global16=_window(256, 16), **BLOCKS),
    Row("decode", "b4-s512-h8-k2-d64", B=4, T=1, S=512, H=8, K=2, D=64),
    Row("decode", "b4-s4096-h8-k2-d64", B=4, T=1, S=4096, H=8, K=2, D=64),
    *_documents("documents", 8, 64, 8, 2048),
)
