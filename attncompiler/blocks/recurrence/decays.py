"""The gradient of decays, from what the passes over rows and columns found."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attncompiler.blocks.gpu import power_of_2
from attncompiler.blocks.launching.launcher import Launcher, known_by
from attncompiler.blocks.recurrence.launch import Found, Order

NUMBERS = tl.constexpr(1024)
"""of a state at a time"""


@triton.jit(do_not_specialize=["T", "H", "apart", "M", "groups", "chunks"])
def decays_kernel(
    rows, columns, rows_states, columns_states, met, runs, real, out, T, H, apart, M, groups, chunks, C: tl.constexpr,
):  # fmt: skip
    """The gradient of each token's decay, (B, T, H), of one group of chunks of one head.

    `rows` (2, B, H, T), `apart` from one another, and `columns` (B, H, T) are what the passes left as `dots`, the
    states (B, H, groups − 1, M) those between groups, of columns in reverse. `met` (B, H) is the product of the state
    before the first token and of its gradient; None where it is 0.
    """
    group, both = tl.program_id(0) % groups, tl.program_id(0) // groups
    b, h = both // H, both % H
    first = tl.zeros([], tl.float32)
    if rows_states is not None:  # noqa: SIM102 (that is known when this is compiled, and the group is not)
        if group > 0:
            at = both.to(tl.int64) * (groups - 1)
            sums = tl.zeros([NUMBERS], tl.float32)
            for begin in range(0, M, NUMBERS):
                m = begin + tl.arange(0, NUMBERS)
                one = tl.load(rows_states + (at + group - 1) * M + m, mask=m < M, other=0.0)
                sums += one * tl.load(columns_states + (at + groups - 1 - group) * M + m, mask=m < M, other=0.0)
            first = tl.sum(sums, 0)
    if met is not None:  # noqa: SIM102 (that is known when this is compiled, and the group is not)
        if group == 0:
            first = tl.load(met + both)
    for i in range(group * chunks, tl.minimum((group + 1) * chunks, tl.cdiv(T, C))):
        t = i * C + tl.arange(0, C)
        at = both.to(tl.int64) * T + t
        started = tl.load(rows + at, mask=t < T, other=0.0)
        between = tl.load(rows + apart + at, mask=t < T, other=0.0)
        ended = tl.load(columns + at, mask=t < T, other=0.0)
        passing = first
        ending = i < 0
        if runs is not None:
            of_sequence = runs + b.to(tl.int64) * T
            before = tl.load(of_sequence + i * C - 1, mask=i > 0, other=0)
            passing = tl.where(tl.load(of_sequence + i * C) != before, 0.0, passing)
            ending = tl.load(of_sequence + tl.minimum((i + 1) * C, T) - 1) != before
        passing = tl.where(ending, 0.0, passing - tl.sum(started, 0))
        first = passing + tl.sum(ended, 0)
        found = tl.cumsum(started, 0, reverse=True) + (tl.cumsum(ended, 0) - ended) + between + passing
        inside = t < T
        if real is not None:
            found = tl.where(tl.load(real + b.to(tl.int64) * T + t, mask=inside, other=0) != 0, found, 0.0)
        tl.store(out + (b.to(tl.int64) * T + t) * H + h, found, mask=inside)


DECAYS = Launcher(decays_kernel)


def decay_gradient(rows: Found, columns: Found, met: Tensor | None, order: Order) -> Tensor:
    """The gradient of each token's decay, (B, T, H): everything that passes it, what is weighed times its gradient.

    `rows` is the pass that found the gradient of x, and `columns`, in reverse, that of y; both with `dots`. Pairs
    inside a chunk were counted there. What comes from before the chunk, x·dx, passes up to its row; what goes behind
    it, y·dy, from behind its column on; and the rest passes the whole chunk: that is what passes its first token, less
    what ends in it. What passes the first token of a group is known without a sum, as the product of the state there
    and of its gradient (`met` at the first group, None where it is 0), so that no sum of what is added and taken away
    is longer than a group; and nothing passes the first token of a document, so that none is of two documents.
    """
    assert rows.dots is not None
    assert columns.dots is not None
    _, B, H, T = rows.dots.shape
    groups = rows.groups
    runs = None if order.runs is None else order.runs.to(torch.int32).contiguous()
    out = torch.empty(B, T, H, dtype=torch.float32, device=rows.dots.device)
    M = 0 if rows.states is None else rows.states.shape[-1]
    DECAYS(
        (B * H * groups.count,),
        (known_by(rows.dots, columns.dots, rows.states, columns.states, met, runs, order.there), groups.tokens),
        *(rows.dots, columns.dots, rows.states, columns.states, met, runs, order.there, out),
        *(T, H, B * H * T, M, groups.count, groups.chunks, groups.tokens),
        num_warps=max(1, min(4, power_of_2(groups.tokens) // 32)),
    )
    return out
