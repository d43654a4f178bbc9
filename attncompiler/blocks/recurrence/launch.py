"""One call of the pass: shapes of tiles, groups of chunks, and buffers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import triton.language as tl
from torch import Tensor

from attncompiler.blocks.gpu import Device, device_of, parts, power_of_2
from attncompiler.blocks.launching.launcher import Launcher, known_by
from attncompiler.blocks.recurrence.passes import (
    Added,
    Operand,
    Result,
    Skip,
    carry_kernel,
    divided_kernel,
    features_kernel,
    pass_kernel,
)
from attncompiler.blocks.recurrence.weights import Times, sums_kernel

Map = Literal["none", "elu", "relu", "exp"]
"""A feature map, of which that of all numbers to themselves is none; of exponentials the slope alone is known here."""
WIDEST = 256
"""numbers of a row or column at most: they are multiplied in one piece"""


@dataclass(frozen=True, slots=True)
class Side:
    """x, y or u: (B, T, H / share, width)."""

    tensor: Tensor
    share: int = 1

    @property
    def width(self) -> int:
        return self.tensor.shape[-1]

    def argument(self) -> Operand:
        tensor = self.tensor if self.tensor.stride(-1) == 1 else self.tensor.contiguous()
        batch, token, head, _ = tensor.stride()
        return Operand(tensor, batch, token, head, self.share)


@dataclass(frozen=True, slots=True)
class Order:
    """How tokens count for one another, and which see which."""

    decay: Tensor | None = None
    """(B, T, H), natural logarithms, fp32"""
    runs: Tensor | None = None
    """(B, T) int32"""
    real: Tensor | None = None
    """(B, T) bool"""
    strict: bool = False
    """whether a token does not see itself"""
    marks: Tensor | None = None
    """(2, B, H, T): in the place of decays, the running maxima and the tokens' own marks, logarithms of 2"""
    first: Tensor | None = None
    """(B, H): with marks, the maximum before the first token; None where nothing was before"""
    _sums: dict[int, Tensor] = field(default_factory=dict)

    def sums(self, tokens: int) -> Tensor | None:
        """(2, B, H, T): the decays' sums from the first token of each chunk on, found once for all passes."""
        if self.decay is None:
            return None
        if tokens not in self._sums:
            B, T, H = self.decay.shape
            found = torch.empty(2, B, H, T, dtype=torch.float32, device=self.decay.device)
            heads = min(16, power_of_2(H))
            SUMS(
                (B * parts(T, tokens) * parts(H, heads),),
                (known_by(self.decay, self.real), tokens, heads),
                *(self.decay, *self.decay.stride(), self.there, found, T, H, found.stride(0), tokens, heads),
            )
            self._sums[tokens] = found
        return self._sums[tokens]

    @property
    def there(self) -> Tensor | None:
        """`real` as numbers."""
        return None if self.real is None else self.real.contiguous().view(torch.uint8)

    def argument(self, tokens: int) -> Times:
        runs = None if self.runs is None else self.runs.to(torch.int32).contiguous()
        return Times(self.sums(tokens), self.marks, self.first, runs, self.there)


@dataclass(frozen=True, slots=True)
class Tiles:
    """The shape of a chunk's tiles: its tokens, and how many of the W numbers a program takes."""

    tokens: int
    width: int
    num_warps: int
    num_stages: int

    def shared_memory(self, K: int, itemsize: int) -> int:
        """Bytes of a program at most: x, y and u once for each stage, the state and the pairs as operands."""
        met = self.tokens * (2 * K + self.width)
        return itemsize * (self.num_stages * met + K * self.width + self.tokens**2)

    def registers(self, K: int, itemsize: int, pairs: int) -> int:
        """Of a thread, for the sums of state and rows, so many numbers of a pair, and one of x and y."""
        sums = K * self.width + self.tokens * (self.width + pairs * self.tokens)
        return (sums + self.tokens * K * itemsize // 4) // (32 * self.num_warps)


@dataclass(frozen=True, slots=True)
class Groups:
    """So many groups of so many chunks each."""

    count: int
    chunks: int
    tokens: int
    """of a chunk"""


@dataclass(frozen=True, slots=True)
class Found:
    """What a pass found: `total` where one width more was asked of u, `dots` (2 or 1, B, H, T) where they were asked.

    `final` (B, H, M) is the state behind the last token, flat, with its sums of one width more behind it, and `states`
    (B, H, groups − 1, M) those between the groups, in the order in which they were met.
    """

    out: Tensor
    total: Tensor | None
    dots: Tensor | None
    final: Tensor | None
    states: Tensor | None
    groups: Groups


LEAST_TOKENS = 16
"""of a chunk: a product of matrices has at least so many rows"""
WARPGROUPS = (
    *(Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 2), Tiles(64, 16, 4, 2)),
    *(Tiles(16, 32, 8, 1), Tiles(16, 16, 4, 1)),
)
"""for bf16 on Hopper, whose products read shared memory, best first: two programs of four warps at a time were faster
on an H100 than one of eight, by half. With eight, beside 256 numbers, Triton 3.6 reads shared memory that is not there
(illegal access on an H200, by compute-sanitizer in the product of the transposed columns)"""
WARPS = (Tiles(32, 64, 8, 2), Tiles(32, 32, 8, 1), Tiles(16, 32, 8, 1), Tiles(16, 16, 4, 1))
"""for bf16 elsewhere: operands lie in registers"""
TF32 = (Tiles(32, 64, 8, 2), Tiles(32, 32, 8, 1), Tiles(16, 32, 8, 1), Tiles(16, 16, 4, 1))
"""for fp16, whose operands take fp32's room"""
VECTOR_UNITS = (Tiles(16, 32, 4, 1), Tiles(16, 16, 8, 1))
"""for fp32, which is multiplied number by number: all factors of a product lie in registers"""
INTERPRETED = Tiles(32, 16, 4, 1)
"""where there is no GPU"""
MOST_REGISTERS, MOST_BESIDE_WARPGROUPS = 55, 176
"""of a thread, for sums and operands: where operands come from registers, and where warpgroups read shared memory"""


def tiles_for(device: Device, dtype: torch.dtype, K: int, W: int, *, marked: bool = False, pairs: int = 1) -> Tiles:
    """The best shape that a device has room for, where a pair of tokens has so many numbers.

    Where keys are `marked`, fp32's is narrow, as ptxas 12.8 leaves a wide one 32 registers of 255; fp16's beside many
    numbers has eight warps to a narrow one, as these spill from any other.
    """
    wide, widest = max(16, power_of_2(K)), max(16, power_of_2(W))
    if device.interpreted:
        return replace(INTERPRETED, width=min(INTERPRETED.width, widest))
    if dtype == torch.float32 or (dtype == torch.float16 and wide > 128):
        found = VECTOR_UNITS[marked or wide > 64]
        return replace(found, width=min(found.width, widest))
    hopper = device.capability[0] == 9
    shapes, itemsize = (WARPGROUPS if hopper else WARPS, 2) if dtype == torch.bfloat16 else (TF32, 4)
    for shape in shapes:
        tiles = replace(shape, width=min(shape.width, widest))
        most = MOST_BESIDE_WARPGROUPS if hopper and tiles.tokens >= 64 else MOST_REGISTERS
        fits = tiles.shared_memory(wide, itemsize) <= device.shared_memory
        if fits and tiles.registers(wide, itemsize, pairs) <= most:
            break
    return tiles


MOST_CHUNKS, FEWEST_CHUNKS, WAVES, ENOUGH = 64, 8, 4, 1.5
"""Chunks of a group: at most, since a program goes through them one after the other; at least, since a state between
two groups is written and read; programs for each multiprocessor at most, which are two at a time there; and those that
are enough without groups."""


PASSING_TOKENS, MOST_PASSING = {True: 64, False: 32}, {2: 1024, 4: 256}
"""Where the gradient of decays is found: tokens of a chunk, whose pairs are in registers three times, by whether rows
of warpgroups have 64 numbers at most; and tokens of a group, by bytes of a number. Behind a group's first token what
passes is a running sum, with the error of the largest number in it; what is of 16-bit numbers has errors above that."""


def passing_tokens(device: Device, dtype: torch.dtype, K: int) -> int:
    """Tokens of a chunk at most where the gradient of decays is found."""
    return PASSING_TOKENS[device.capability[0] == 9 and dtype == torch.bfloat16 and K <= 64]


def groups_for(device: Device, programs: int, T: int, tiles: Tiles, most: int | None = None) -> Groups:
    """How a sequence is cut for `programs` heads and blocks of W, into groups of at most so many chunks."""
    chunks = parts(T, tiles.tokens)
    if device.interpreted:  # short sequences have several groups too
        return Groups(parts(chunks, 2), 2, tiles.tokens)
    enough = programs >= ENOUGH * device.multiprocessors  # a state between two groups costs a pass of its own
    wanted = 1 if enough else max(1, WAVES * device.multiprocessors // programs)
    most = most or (chunks if enough else MOST_CHUNKS)
    each = min(chunks, most, max(FEWEST_CHUNKS, parts(chunks, wanted)))
    return Groups(parts(chunks, each), each, tiles.tokens)


DTYPES: dict[torch.dtype, Any] = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float32, torch.float32: tl.float32}
"""What is multiplied. States and weighted sums of fp16 numbers leave its range: they are multiplied in tf32, which has
fp16's digits and fp32's range."""


def precision(dtype: torch.dtype) -> str:
    """How fp32 operands are multiplied: those that were fp32 exactly, unless torch is told otherwise for its own."""
    exact = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    return "ieee" if exact else "tf32"


PASS, CARRY = Launcher(pass_kernel), Launcher(carry_kernel)
FEATURES, DIVIDED, SUMS = Launcher(features_kernel), Launcher(divided_kernel), Launcher(sums_kernel)
NOTHING_ADDED = Added(None, None)
NOWHERE = Operand(None, 0, 0, 0, 1)
"""No operand. It is no field of another tuple: Triton 3.6 forgets which fields of those are None."""


def run(
    x: Side,
    y: Side,
    u: Side,
    order: Order,
    *,
    H: int,
    reverse: bool = False,
    extra: Literal["none", "total", "added"] = "none",
    added: Added = NOTHING_ADDED,
    scales: Tensor | None = None,
    normalize: bool = False,
    eps: float = 0.0,
    scale: float = 1.0,
    slope: Map = "none",
    raw: Side | None = None,
    factor: Tensor | None = None,
    levels: Tensor | None = None,
    dots: bool = False,
    skip: Tensor | None = None,
    z: Side | None = None,
    most_tokens: int | None = None,
    initial: Tensor | None = None,
    final: bool = False,
    dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Found:
    """One pass over all tokens: out (B, T, H, W) of x (B, T, H, K), y (…, K) and u (…, W), as the package says.

    `scales` (B, H, T), fp32, are what the tokens of y are multiplied by. `extra` is one width more: "total", of u, by
    numbers 1; or "added", of x and y, by `added`. `raw` (B, T, H, W) are features, whose map's `slope` is multiplied
    onto out, and whose products with what the gradient of decays is made of are `dots`.
    Then out is multiplied by `factor` (B, H, T), fp32; `skip` (H, W), fp32, times u is added to it; and silu of `z`
    (B, T, H, W) multiplied onto it. `most_tokens` bounds a chunk, as far as its tiles can be so small.
    With `levels` (B, H, T), fp32, sums are multiples of exp(levels): normalised, `eps` and `total`, the divisor, are
    logarithms; else out is multiplied by exp(levels).
    `initial` (B, H, M) is the state that the first token met sees, M being K·W and the width of `extra`'s sums.
    Products are of numbers as good as `dtype`'s, which is u's unless another is said, and so is out.
    """
    B, T = x.tensor.shape[:2]
    K, W, device = x.width, u.width, x.tensor.device
    dtype = dtype or u.tensor.dtype
    M = K * W + {"none": 0, "total": K, "added": W}[extra]
    facts = device_of(device)
    # the weight of a pair, and whether both are of one document and no padding: on Hopper, where operands lie in shared
    # memory, there is room for that but beside exponentials
    masked = order.decay is not None and not (order.runs is None and order.real is None)
    masked = masked and (facts.capability[0] != 9 or levels is not None or slope == "exp")
    tiles = tiles_for(facts, dtype, K, W, marked=order.marks is not None, pairs=1 + masked)
    if dots:
        passing = passing_tokens(facts, dtype, K)
        most_tokens = min(most_tokens or passing, passing)
    if most_tokens is not None:
        tiles = replace(tiles, tokens=min(tiles.tokens, max(LEAST_TOKENS, 1 << (most_tokens.bit_length() - 1))))
    blocks = parts(W, tiles.width)
    most = MOST_PASSING[dtype.itemsize] // tiles.tokens if dots else None
    groups = groups_for(facts, B * H * blocks, T, tiles, most)
    out = torch.empty(B, T, H, W, dtype=out_dtype or dtype, device=device)
    wide: dict[str, Any] = {"dtype": torch.float32, "device": device}
    total = torch.empty(B, T, H, **wide) if extra == "total" else None
    kinds = 1 if reverse else 2
    products = torch.empty(kinds, blocks, B, H, T, **wide) if dots else None
    behind = torch.empty(B, H, M, **wide) if final else None
    between = states = None
    source = (raw or Side(out)).argument()
    gate = NOWHERE if z is None else z.argument()
    skipped = Skip(None, 0, 0) if skip is None else Skip(skip, *skip.stride())
    whole = order.real is None and T % tiles.tokens == 0
    constants = (
        *(slope, extra, normalize, reverse, order.strict, whole, tiles.tokens, K, W, M),
        *(max(16, power_of_2(K)), tiles.width, DTYPES[dtype], precision(dtype)),
    )
    times = order.argument(tiles.tokens)
    given = (x.tensor, y.tensor, u.tensor, source.ptr, gate.ptr, levels, *added, scales, *times)
    shares = x.share, y.share, u.share, source.share
    known = known_by(*given, skip, factor, initial), shares, constants, dots, tiles, out.dtype
    sides = (x.argument(), y.argument(), u.argument(), source, gate, added, scales, times, skipped)
    shapes = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    chunks = groups.count * groups.chunks if reverse else parts(T, tiles.tokens)
    if groups.count > 1:
        between = torch.empty(B, H, groups.count - 1, M, **wide)
        kept = torch.empty(B, H, groups.count - 1, **wide)
        PASS(
            (B * H * (groups.count - 1) * blocks,),
            (known, "states"),
            *(*sides, None, between, kept, Result(out, None, None, None, None, None)),
            *(T, H, B * H * T, groups.count - 1, groups.chunks, chunks, eps, scale),
            *(False, *constants),
            **shapes,
        )
        CARRY((B * H, parts(M, 1024)), known, between, kept, initial, groups.count - 1, M, 1024)
        states = between
    PASS(
        (B * H * groups.count * blocks,),
        (known, "rows", states is None, behind is None),
        *(*sides, initial, states, None, Result(out, total, products, factor, levels, behind)),
        *(T, H, B * H * T, groups.count, groups.chunks, chunks, eps, scale),
        *(True, *constants),
        **shapes,
    )
    return Found(out, total, None if products is None else products.sum(1), behind, states, groups)


NUMBERS = 4096
"""of a program that goes through tokens one by one"""


def features(q: Tensor, k: Tensor, map: Map) -> tuple[Tensor, Tensor]:
    """φ(q) and φ(k), (B, T, H, K), as they are multiplied: those of fp16 numbers leave its range."""
    if map == "none":
        return q, k
    B, T, H, K = q.shape
    dtype = torch.float32 if q.dtype == torch.float16 else q.dtype
    found = [torch.empty(B, T, H, K, dtype=dtype, device=q.device) for _ in "qk"]
    wide = max(16, power_of_2(K))
    tokens = max(1, NUMBERS // wide)
    FEATURES(
        (2 * parts(T, tokens) * B * H,),
        (known_by(q, k), map, K),
        *(Side(q).argument(), Side(k).argument(), *found, T, H, map, tokens, K, wide),
    )
    return found[0], found[1]


def divided(
    dout: Tensor,
    out: Tensor,
    divisor: Tensor,
    scale: float,
    real: Tensor | None = None,
    levels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of numerator and divisor, (B, T, H, W) as they are multiplied and (B, H, T) in fp32, of
    out (B, T, H, W) = scale · numerator / divisor; 0 where `real` (B, T) is not.

    With `levels` (B, H, T) both are multiples of exp(levels), and `divisor` is the logarithm of what it is.
    """
    dtype = torch.float32 if dout.dtype == torch.float16 else dout.dtype
    numerator = torch.empty(dout.shape, dtype=dtype, device=dout.device)
    B, T, H, W = dout.shape
    d_divisor = torch.empty(B, H, T, dtype=torch.float32, device=dout.device)
    wide = max(16, power_of_2(W))
    tokens = max(1, NUMBERS // wide)
    there = None if real is None else real.contiguous().view(torch.uint8)
    DIVIDED(
        (parts(T, tokens) * B * H,),
        (known_by(dout, out, divisor, levels, there), W),
        *(Side(dout).argument(), Side(out).argument(), divisor.contiguous(), levels, there, d_divisor, numerator),
        *(T, H, scale, tokens, W, wide),
    )
    return numerator, d_divisor
