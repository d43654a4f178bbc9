"""The gradient of decays, from what the passes over rows and columns found."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from attncompiler.blocks.recurrence.launch import Found


def decay_gradient(rows: Found, columns: Found, met: Tensor | None, T: int, runs: Tensor | None) -> Tensor:
    """The gradient of each token's decay, (B, T, H): everything that passes it, what is weighed times its gradient.

    `rows` is the pass that found the gradient of x, and `columns`, in reverse, that of y; both with `dots` of what is
    passing. Pairs inside a chunk were counted there, for the token behind the one at which they stand. What comes from
    before the chunk, x·dx, passes up to its row; what goes behind it, y·dy, from behind its column on; and the rest
    passes the whole chunk: that is what passes its first token, less what ends in it. What passes the first token of a
    group is known without a sum, as the product of the state there and of its gradient (`met` at the first group, None
    where it is 0), so that no sum of what is added and taken away is longer than a group; and nothing passes the first
    token of a document, by `runs` (B, T), so that none is of two documents.
    """
    assert rows.dots is not None
    assert columns.dots is not None
    groups = rows.groups
    C = groups.tokens

    def chunked(x: Tensor) -> Tensor:
        return pad(x, (0, -T % C)).unflatten(-1, (-1, C))

    started, between, ended = chunked(rows.dots[0]), chunked(rows.dots[1]), chunked(columns.dots[0])
    behind = ended.cumsum(-1) + between
    local = started.flip(-1).cumsum(-1).flip(-1) + pad(behind[..., :-1], (1, 0))
    ends, begins = started.sum(-1), ended.sum(-1)
    first = torch.zeros(*ends.shape[:2], groups.count, dtype=ends.dtype, device=ends.device)
    if met is not None:
        first[..., 0] = met
    if rows.states is not None:
        assert columns.states is not None
        first[..., 1:] = torch.linalg.vecdot(rows.states, columns.states.flip(2))
    fresh = ending = None
    if runs is not None:
        starts = torch.arange(0, T, C, device=runs.device)
        last = runs[:, (starts + C).clamp(max=T) - 1]
        before = pad(last[:, :-1], (1, 0))
        fresh, ending = (runs[:, starts] != before)[:, None], (last != before)[:, None]
    passing = torch.empty_like(ends)
    for chunk in range(groups.chunks):  # of all groups at once
        here = slice(chunk, None, groups.chunks)
        size = ends[..., here].shape[-1]
        first = first[..., :size] if fresh is None else first[..., :size].masked_fill(fresh[..., here], 0)
        leaving = first - ends[..., here]
        passing[..., here] = leaving if ending is None else leaving.masked_fill(ending[..., here], 0)
        first = passing[..., here] + begins[..., here]
    return (local + passing[..., None]).flatten(-2)[..., :T].transpose(1, 2)
