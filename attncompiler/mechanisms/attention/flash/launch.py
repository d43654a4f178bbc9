"""Launches: block shapes that fit the device, and the arguments that all kernels share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from attncompiler.blocks.gpu import Device
from attncompiler.mechanisms.attention.dropout import BITS
from attncompiler.mechanisms.attention.flash.forward import Sizes
from attncompiler.mechanisms.attention.flash.scores import Scoring
from attncompiler.mechanisms.attention.flash.visible import Strided
from attncompiler.mechanisms.attention.op import AttentionOptions
from attncompiler.runtime.implementation import Tensors

CACHE = 2**25
"""bytes of keys and values that programs beside each other may read, so that they stay in the second-level cache"""


PART_WAVES = 24
"""Programs for each multiprocessor that a part of the heads has at least: what its last ones leave idle is 2% then."""


def parts_of(programs: int, heads: int, device: Device) -> int:
    """In how many parts of its `heads` a call of so many programs is computed, one after the other: the most that keep
    the device busy, since what is held for a part in float32 is smaller for more of them."""
    most = min(heads, programs // (PART_WAVES * device.multiprocessors))
    return max((parts for parts in range(1, most + 1) if heads % parts == 0), default=1)


@dataclass(frozen=True, slots=True)
class Blocks:
    """The shape of a kernel's tiles, and how it is compiled.

    `own` tokens are a program's own, queries or keys, and it meets those of the other side `met` at a time.
    """

    own: int
    met: int
    num_warps: int
    num_stages: int

    def shared_memory(self, own_width: int, met_width: int, itemsize: int) -> int:
        """Bytes of the operands, the tiles that are met once for each stage."""
        return (self.own * own_width + self.num_stages * self.met * met_width) * itemsize

    def registers(self, sums_width: int) -> int:
        """Registers of a thread that hold sums and the scores of a tile."""
        return self.own * (sums_width + self.met) // (32 * self.num_warps)

    def products(self, width: int) -> int:
        """Multiplications of a thread for one matrix product of two tiles."""
        return self.own * self.met * width // (32 * self.num_warps)


MATRIX_UNITS = (
    Blocks(128, 64, 8, 3),
    Blocks(128, 64, 8, 2),
    Blocks(128, 32, 8, 2),
    Blocks(64, 64, 4, 2),
    Blocks(64, 32, 4, 2),
    Blocks(64, 32, 8, 2),
    Blocks(32, 32, 4, 2),
    Blocks(16, 16, 4, 1),
)
"""Shapes for 16-bit operands, best first."""
VECTOR_UNITS = (
    Blocks(64, 32, 4, 2),
    Blocks(32, 32, 4, 2),
    Blocks(32, 16, 4, 1),
    Blocks(32, 32, 8, 2),
    Blocks(16, 16, 4, 1),
)
"""Shapes for fp32, which is multiplied number by number."""
INTERPRETED = Blocks(64, 32, 4, 1)
"""Where there is no GPU: a few short sequences are several tiles, and a tile takes about as long whatever its size."""
MOST_REGISTERS = 150
"""of 255, for sums and scores"""
MOST_OF_VECTORS = 64
"""the same where operands are in registers, too"""
MOST_PRODUCTS = 512
"""Multiplications that are written out one by one, where matrix units do not do them."""


TENSOR_MEMORY = (Blocks(64, 32, 8, 2), Blocks(32, 32, 4, 2))
"""For 16-bit operands of the backward that has keys of its own, on compute capability 10: larger ones spill there, as
compiled; nobody has timed them."""
MOST_BESIDE_TENSOR_MEMORY = 100
"""registers for sums and scores, with these"""


def gathering_blocks(device: Device, dtype: torch.dtype, width: int) -> Blocks:
    """The shape for keys of a program's own, of which keys and values together are `width` wide, as are the sums."""
    if device.capability[0] != 10 or dtype == torch.float32:
        blocks = blocks_for(device, dtype, width, width, width)
        # copies of a third turn take registers that sums need, where operands lie in registers
        return blocks if device.capability[0] == 9 else replace(blocks, num_stages=min(blocks.num_stages, 2))
    large, small = TENSOR_MEMORY
    return large if large.registers(width) <= MOST_BESIDE_TENSOR_MEMORY else small


def blocks_for(device: Device, dtype: torch.dtype, own_width: int, met_width: int, sums_width: int) -> Blocks:
    """The best shape that a device has room for, by how wide a program's own operands, those it meets and its sums
    are."""
    if device.interpreted:
        return INTERPRETED
    exact = dtype == torch.float32
    for blocks in VECTOR_UNITS if exact else MATRIX_UNITS:
        if exact and blocks.products(met_width // 2) > MOST_PRODUCTS:
            continue
        room = blocks.shared_memory(own_width, met_width, dtype.itemsize) <= device.shared_memory
        if room and blocks.registers(sums_width) <= (MOST_OF_VECTORS if exact else MOST_REGISTERS):
            return blocks
    return blocks


def padded(D: int, V: int) -> tuple[int, int]:
    """How wide tiles of heads and of values are: powers of two, of at least what matrix units multiply.

    Values of 16 beside heads of 32 are widened: for Hopper, ptxas 12.8 would compute where most rows of the values lie
    from registers that nothing has set.
    """
    wide, wide_v = (max(16, triton.next_power_of_2(width)) for width in (D, V))
    return wide, max(wide_v, 32) if wide == 32 else wide_v


def strided(tensor: Tensor) -> Strided:
    """(B, T, H, D) as the kernels take it: a copy only where the last axis is not contiguous."""
    tensor = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
    return Strided(tensor, *tensor.stride()[:3])


def sizes_of(inputs: Tensors) -> Sizes:
    (B, T, H, _), (S, K) = inputs["q"].shape, inputs["k"].shape[1:3]
    return Sizes(B, T, S, H, K)


def scoring_of(inputs: Tensors, options: AttentionOptions) -> Scoring:
    share = options.dropout
    return Scoring(
        options.softmax_scale(inputs["q"].shape[-1]),
        options.softcap,
        inputs.get("alibi_slopes"),
        inputs.get("dropout_seed") if share else None,
        round(share * 2**BITS) if share else None,
        1 / (1 - share) if share else None,
    )


def precision(dtype: torch.dtype) -> str:
    """How fp32 is multiplied: exactly, or, where torch is told so for its own products, in tf32."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def widths(inputs: Tensors) -> dict[str, Any]:
    """The arguments that say how wide heads and tiles are."""
    D, V = inputs["q"].shape[-1], inputs["v"].shape[-1]
    wide, wide_v = padded(D, V)
    return {"D": D, "V": V, "BLOCK_D": wide, "BLOCK_V": wide_v}
