"""Which probabilities dropout keeps: one mask for all kernels, made from counters, so that any tile can be made alone.

    number(b, h, t, s) = mix(mix(mix(mix(mix(low) + high) + b·H + h) + t) ^ mix(s))

`low` and `high` are the two halves of the seed, all sums are of 32 bits and wrap around, t and s are indices in the
call, and mix is a 32-bit finaliser (xor-shifts by 16, 15, 16 around two multiplications; constants by C. Wellons,
https://github.com/skeeto/hash-prospector). A probability is dropped where number >> 1 < share · 2³¹, else divided by
1 − share (Srivastava et al. 2014).
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIERS = (0x7FEB352D, 0x846CA68B - 2**32)
BITS = 31


def _mix(x: Tensor) -> Tensor:
    """The finaliser, of an int32 tensor that may be overwritten; torch's shift is signed, so the sign is cut off."""
    x ^= (x >> 16) & 0xFFFF
    x *= MULTIPLIERS[0]
    x ^= (x >> 15) & 0x1FFFF
    x *= MULTIPLIERS[1]
    x ^= (x >> 16) & 0xFFFF
    return x


def kept(seed: Tensor, share: float, heads: int, batch: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """A mask (b, H, t, s) of 0 and 1 / (1 − share), in fp32.

    `seed` is one int64; `batch` (b,), `rows` (t,) and `columns` (s,) are the indices, int64, of what is asked for.
    """
    seed = seed.reshape(())
    key = _mix(_mix(seed.int()) + (seed >> 32).int())
    key = _mix(key + (batch[:, None] * heads + torch.arange(heads, device=batch.device)).int())
    key = _mix(key[..., None] + rows.int())
    number = _mix(key[..., None] ^ _mix(columns.int()))
    keep = ((number >> 1) & (2**BITS - 1)) >= round(share * 2**BITS)
    return keep.float().mul_(1 / (1 - share))
