"""A row's tensors, made once for all who take part, and who sees whom as a formula.

Layouts: ours (B, T, H, D), torch's (B, H, T, D), and packed documents (T, H, D).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from attncompiler.bench.attention.rows import Row
from attncompiler.ops import block_lists

Mask = Callable[[Any, Any, Tensor, Tensor], Tensor]
"""(batch, head, query, key) → whether the query sees the key, as FlexAttention asks for it"""


class Inputs:
    """q, k and v of a row, drawn from a seed; each layout is made when it is first asked for."""

    def __init__(self, row: Row, device: str, dtype: torch.dtype):
        self.row, self.device, self.dtype = row, device, dtype
        generator = torch.Generator(device).manual_seed(0)
        self.qkv = tuple(
            torch.randn(shape, generator=generator, device=device, dtype=dtype).requires_grad_(row.backward)
            for shape in row.shapes.values()
        )

    @cached_property
    def heads_first(self) -> tuple[Tensor, ...]:
        """(B, H, T, D), contiguous, leaves of their own."""
        return tuple(
            tensor.detach().transpose(1, 2).contiguous().requires_grad_(self.row.backward) for tensor in self.qkv
        )

    @cached_property
    def packed(self) -> tuple[Tensor, ...]:
        """(T, H, D) of a row of packed documents."""
        return tuple(tensor.detach()[0].requires_grad_(self.row.backward) for tensor in self.qkv)

    @cached_property
    def offsets(self) -> Tensor:
        """Where packed documents begin, and where the last ends (documents + 1,), int32."""
        return torch.tensor([0, *accumulate(self.row.lengths)], dtype=torch.int32, device=self.device)

    @cached_property
    def masks(self) -> dict[str, Tensor]:
        """What our operator takes beside q, k and v."""
        row = self.row
        if row.layout == "packed":
            return {"segment_ids": self.documents[None]}
        return {"attention_mask": self.real} if row.layout == "padded" else {}

    @cached_property
    def documents(self) -> Tensor:
        """The document of each packed token (T,)."""
        lengths = torch.tensor(self.row.lengths)
        return torch.arange(len(lengths)).repeat_interleave(lengths).to(self.device)

    @cached_property
    def real(self) -> Tensor:
        """Which tokens are no padding (B, T)."""
        lengths = torch.tensor(self.row.lengths, device=self.device)
        return torch.arange(self.row.T, device=self.device) < lengths[:, None]

    def compared(self, out: Tensor) -> Tensor:
        """An output without what padding has, which is of no account."""
        return out * self.real[:, :, None, None] if self.row.layout == "padded" else out

    def mask(self) -> Mask:
        """The row's pattern, and its packed documents, as a formula on positions. Padding is not in it."""
        seen = pattern_mask(self.row, self.device)
        if self.row.layout != "packed":
            return seen
        documents = self.documents
        return lambda b, h, i, j: seen(b, h, i, j) & (documents[i] == documents[j])

    def dense(self) -> Tensor:
        """The same as booleans (T, S), of a row with as many queries as keys."""
        index = torch.arange(self.row.T, device=self.device)
        return self.mask()(0, 0, index[:, None], index[None])


def pattern_mask(row: Row, device: str) -> Mask:
    """The formula of a row's pattern, on tensors of positions; a random one is looked up in a table of its blocks."""
    pattern, causal = row.pattern, row.causal
    kind, size = pattern["kind"], pattern.get("block_size", 1)
    if kind == "full":
        return lambda b, h, i, j: (i >= 0) & (j >= 0)
    if kind == "causal":
        return lambda b, h, i, j: i >= j
    if kind == "sliding_window":
        window, first = pattern["window"], pattern.get("global_tokens", 0)
        if not first and causal:
            return lambda b, h, i, j: (i >= j) & (i - j < window)
        if causal:
            return lambda b, h, i, j: (i >= j) & ((i - j < window) | (j < first))
        return lambda b, h, i, j: ((i - j).abs() < window) | (j < first) | (i < first)
    if kind == "strided":
        near, stride = pattern["window"], pattern["stride"]

        def strided(b: Any, h: Any, i: Tensor, j: Tensor) -> Tensor:
            distance = (i // size - j // size).abs()
            seen = (distance < near) | (distance % stride == 0)
            return seen & (i >= j) if causal else seen

        return strided
    table = _blocks(row).to(device)
    if causal:
        return lambda b, h, i, j: table[i // size, j // size] & (i >= j)
    return lambda b, h, i, j: table[i // size, j // size]


def _blocks(row: Row) -> Tensor:
    """Which blocks of a row's pattern see one another, wholly or in part."""
    size = row.pattern["block_size"]
    lists = block_lists(row.pattern, row.T, row.T, tile_q=size, tile_k=size)
    blocks = -(-row.T // size)
    table = torch.zeros(blocks, blocks, dtype=torch.bool)
    for tiles in (lists.full, lists.partial):
        table[tiles.rows(), tiles.indices.long()] = True
    return table
