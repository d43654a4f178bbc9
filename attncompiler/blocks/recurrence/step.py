"""One token of every sequence: what is read of it beside the state.

A step reads and writes each number of a state once, and hardly anything else: it is as fast as memory is. It has no
documents: the initial state belongs to the first, and so does the one token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


def warps_for(numbers: int, each: int) -> int:
    """Of a program that has so many numbers of a state, a power of 2, and so many of them for a thread."""
    return min(8, max(1, numbers // (32 * each)))


class Row(NamedTuple):
    """A tensor (B, 1, heads, width) by strides, a head's numbers side by side; `ptr` is None where there is none.

    It is no field of another tuple: Triton 3.6 forgets which fields of those are None.
    """

    ptr: Any
    batch: Any
    head: Any


NO_ROW = Row(None, 0, 0)


def row(tensor: Tensor | None) -> Row:
    """Of (B, 1, heads, width), or (B, 1, width) as of one head."""
    if tensor is None:
        return NO_ROW
    tensor = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
    return Row(tensor, tensor.stride(0), tensor.stride(2) if tensor.dim() == 4 else 0)


def each_head(tensor: Tensor | None) -> Row:
    """Of (B, 1, heads), each of one number."""
    return NO_ROW if tensor is None else Row(tensor, tensor.stride(0), tensor.stride(2))


def whole(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def there(real: Tensor | None) -> Tensor | None:
    """`real` (B, 1) as numbers."""
    return None if real is None else real.contiguous().view(torch.uint8)


@triton.jit
def is_real(real, b):
    """Whether a sequence's token is no padding."""
    if real is not None:
        return tl.load(real + b) != 0
    else:
        return tl.full([], 1, tl.int1)


@triton.jit
def of_row(row, b, head, at, inside):
    """A head's numbers `at` places, in fp32; 0 where they are not `inside`. b and head are int64."""
    return tl.load(row.ptr + b * row.batch + head * row.head + at, mask=inside, other=0.0).to(tl.float32)
