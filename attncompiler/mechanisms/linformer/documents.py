"""Rows of a batch taken apart into documents, each of which begins at column 0 of the projections.

A row is one document, or as many as its segment_ids say. A document runs from its first real token to its last, and
padding between the two keeps its columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from attncompiler.blocks.segments import run_numbers


@dataclass(frozen=True)
class Documents:
    """Some documents, one a row: which of the batch's B·S tokens each column reads, and whether it is a real token of
    the document. Both (N, L)."""

    index: Tensor
    real: Tensor

    def taken(self, x: Tensor) -> Tensor:
        """x (B, S, …) → (N, L, …), with 0 where a column has no token: that of another document may be NaN."""
        return x.flatten(0, 1)[self.index].masked_fill_(~self._real(x), 0)

    def add_to(self, into: Tensor, rows: Tensor) -> None:
        """Add rows (N, L, …) to into (B, S, …) where `taken` took them from; each token is of one document."""
        # columns without a token share another's index, and add 0 to it
        rows = rows.to(into.dtype).masked_fill(~self._real(rows), 0)
        into.view(-1, *into.shape[2:]).index_add_(0, self.index.flatten(), rows.flatten(0, 1))

    def _real(self, x: Tensor) -> Tensor:
        return self.real.view(*self.real.shape, *[1] * (x.dim() - 2))


def documents(segment_ids: Tensor | None, attention_mask: Tensor | None) -> list[Documents] | None:
    """The documents of a batch that have tokens; None where neither argument is given: rows are documents then.

    `segment_ids` (B, S), `attention_mask` (B, S) bool. Without segments there is one batch of them, B × S, and no
    value is read on the host. With segments documents of like length are together, so that none has less than half
    of its columns filled, and there are at most log₂(S) + 1 batches; their lengths are read on the host.
    """
    if segment_ids is None:
        if attention_mask is None:
            return None
        first = attention_mask.int().argmax(1)
        length = attention_mask.shape[1]
        starts = torch.arange(len(first), device=first.device) * length
        return [_batch(starts + first, length - first, length, attention_mask)]
    first, lengths = extents(segment_ids, attention_mask)
    found = []
    sizes = lengths.double().log2().ceil()
    for size in sizes[lengths > 0].unique().tolist():
        chosen = sizes == size
        longest = int(lengths[chosen].max())
        found.append(_batch(first[chosen], lengths[chosen], longest, attention_mask))
    return found


def extents(segment_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of each document its first real token among the batch's B·S, and its length up to the last one, 0 without any."""
    runs = run_numbers(segment_ids, attention_mask)
    begins = pad(runs[:, 1:] != runs[:, :-1], (1, 0), value=True).flatten()
    document = begins.cumsum(0) - 1
    token = torch.arange(len(document), device=document.device)
    if attention_mask is not None:
        real = attention_mask.flatten()
        document, token = document[real], token[real]
    count = int(begins.sum())
    first = token.new_zeros(count).scatter_reduce_(0, document, token, "amin", include_self=False)
    last = token.new_full((count,), -1).scatter_reduce_(0, document, token, "amax", include_self=False)
    return first, last - first + 1


def _batch(first: Tensor, lengths: Tensor, longest: int, attention_mask: Tensor | None) -> Documents:
    columns = torch.arange(longest, device=first.device)
    real = columns < lengths[:, None]
    index = torch.where(real, first[:, None] + columns, first[:, None])
    if attention_mask is not None:
        real = real & attention_mask.flatten()[index]
    return Documents(index, real)


def last_queries(x: Tensor, queries: int) -> Tensor:
    """What stands at the queries: the last query stands at the last key."""
    return x[:, x.shape[1] - queries :]
