"""Favor's features in Triton: exponentials, each token's as multiples of its largest, and the running maximum of those.

With m the logarithm of a key's largest feature and g the decays, a token sees keys of up to exp(M), M[t] being the
larger of M[t−1] + g[t] and m[t]. Sums as multiples of exp(M[t]) are those of a recurrence again, whose columns are
multiplied by exp(m − M) and whose decays are M[t−1] + g[t] − M[t], never above 0. Where nothing decays by itself a key
counts for a query by exp(m − M) at once: m and M are marks of the recurrence. Where a token sees what comes later, M is
that of its whole document.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attncompiler.blocks.gpu import Device, device_of, parts, power_of_2
from attncompiler.blocks.launching.launcher import Launcher, known_by
from attncompiler.blocks.recurrence.launch import DTYPES, Side, precision
from attncompiler.blocks.recurrence.passes import tile
from attncompiler.blocks.recurrence.weights import LOG2E, LOWEST

NOTHING = tl.constexpr(float("-inf"))


# --- features -----------------------------------------------------------------------------------------------------


@triton.jit
def projected(projection, r, d, R: tl.constexpr, D: tl.constexpr):
    """Rows r and columns d of the projection (R, D), 0 outside."""
    inside = (r < R)[:, None] & (d < D)[None, :]
    return tl.load(projection + r[:, None] * D + d[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=["T", "H", "quarter", "shift"])
def features_kernel(
    x, projection, rest, phi, largest, T, H, quarter, shift,
    D: tl.constexpr, R: tl.constexpr, C: tl.constexpr, BLOCK_R: tl.constexpr, DEPTH: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """φ(x) (B, T, H, R) over the largest of its token, and `largest` (B, H, T), the logarithm of that.

    x is an Operand (B, T, H, D). `projection` (R, D) is as it is multiplied, and `rest` what that leaves of it. x is
    multiplied by `quarter`, and `shift` is the logarithm that all features have in common.
    """
    tiles = tl.cdiv(T, C)  # on one axis with the heads: a second has 65535 programs at most
    both = tl.program_id(0) // tiles
    b, h = both // H, both % H
    t, r = tl.program_id(0) % tiles * C + tl.arange(0, C), tl.arange(0, BLOCK_R)
    there = t < T
    products, squares = tl.zeros([C, BLOCK_R], tl.float32), tl.zeros([C], tl.float32)
    for first in range(0, D, DEPTH):
        d = first + tl.arange(0, DEPTH)
        numbers = tile(x, b, h, t, first, there, D, DEPTH, False)
        row = numbers.to(DTYPE)
        weights = projected(projection, r, d, R, D)
        products = tl.dot(row, tl.trans(weights), products, input_precision=PRECISION)
        if rest is not None:
            products = tl.dot(row, tl.trans(projected(rest, r, d, R, D)), products, input_precision=PRECISION)
        wide = numbers.to(tl.float32) * quarter
        squares += tl.sum(wide * wide, 1)
    products = tl.where((r < R)[None, :], products * quarter, LOWEST)
    top = tl.max(products, 1)
    found = tl.exp(products - top[:, None])
    at = phi + ((b.to(tl.int64) * T + t) * H + h)[:, None] * R + r[None, :]
    tl.store(at, found.to(phi.dtype.element_ty), mask=there[:, None] & (r < R)[None, :])
    tl.store(largest + both.to(tl.int64) * T + t, (top - squares / 2) + shift, mask=there)


@triton.jit(do_not_specialize=["T", "H", "quarter"])
def gradient_kernel(
    grad, x, projection, out, T, H, quarter,
    D: tl.constexpr, R: tl.constexpr, C: tl.constexpr, BLOCK_D: tl.constexpr, DEPTH: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of x, an Operand (B, T, H, D), by `grad` (B, T, H, R), that of the logarithms of its features."""
    BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    tiles = tl.cdiv(T, C)
    block, place = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    both = place // tiles
    b, h = both // H, both % H
    t, d = place % tiles * C + tl.arange(0, C), block * BLOCK_D + tl.arange(0, BLOCK_D)
    there = t < T
    each = (b.to(tl.int64) * T + t) * H + h
    found, total = tl.zeros([C, BLOCK_D], tl.float32), tl.zeros([C], tl.float32)
    for first in range(0, R, DEPTH):
        r = first + tl.arange(0, DEPTH)
        at = grad + each[:, None] * R + r[None, :]
        if R % DEPTH == 0:
            numbers = tl.load(at, mask=there[:, None], other=0.0)
        else:
            numbers = tl.load(at, mask=there[:, None] & (r < R)[None, :], other=0.0)
        found = tl.dot(numbers.to(DTYPE), projected(projection, r, d, R, D), found, input_precision=PRECISION)
        total += tl.sum(numbers.to(tl.float32), 1)
    row = tile(x, b, h, t, block * BLOCK_D, there, D, BLOCK_D, False).to(tl.float32)
    found = (found - total[:, None] * (row * quarter)) * quarter
    at = out + each[:, None] * D + d[None, :]
    tl.store(at, found.to(out.dtype.element_ty), mask=there[:, None] & (d < D)[None, :])


# --- the running maximum ------------------------------------------------------------------------------------------


@triton.jit
def larger(x, y):
    """The larger of two, and NaN where either is: a GPU's maximum swallows it."""
    return tl.where((x > y) | (x != x), x, y)


@triton.jit
def after(decay, top, more, other):
    """Two steps as one: what each adds to the maximum before it, and the maximum that it brings."""
    return decay + more, larger(top + more, other)


@triton.jit
def steps_of(largest, decay, batch, token, head, runs, real, both, b, h, i, T, REVERSE: tl.constexpr):
    """Tokens' steps at places i, and where a document begins among them; in reverse places are from the last token."""
    there = i < T
    t = T - 1 - i if REVERSE else i
    counted = there
    if real is not None:
        counted = there & (tl.load(real + b.to(tl.int64) * T + t, mask=there, other=0) != 0)
    m = tl.load(largest + both.to(tl.int64) * T + t, mask=counted, other=NOTHING).to(tl.float64)
    g = tl.zeros_like(m)
    if decay is not None:
        at = decay + b.to(tl.int64) * batch + t.to(tl.int64) * token + h.to(tl.int64) * head
        g = tl.load(at, mask=counted, other=0.0).to(tl.float64)
    fresh = i < 0
    if runs is not None:
        at = runs + b.to(tl.int64) * T + t
        before = tl.load(at + 1 if REVERSE else at - 1, mask=there & (i > 0), other=0)
        fresh = there & (tl.load(at, mask=there, other=0) != before)
        g = tl.where(fresh, NOTHING, g)
    return t, m, g, fresh


@triton.jit(do_not_specialize=["T", "H"])
def totals_kernel(
    largest, decay, batch, token, head, runs, real, totals, T, H, C: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """totals (B·H, chunks, 2), fp64: the steps of each chunk as one."""
    chunks = tl.cdiv(T, C)
    both, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    o = tl.arange(0, C)
    _t, m, g, _fresh = steps_of(
        largest, decay, batch, token, head, runs, real, both, both // H, both % H, chunk * C + o, T, REVERSE
    )
    added, top = tl.associative_scan((g, m), 0, after)
    at = totals + tl.program_id(0).to(tl.int64) * 2
    tl.store(at, tl.sum(tl.where(o == C - 1, added, 0.0), 0))
    tl.store(at + 1, tl.sum(tl.where(o == C - 1, top, 0.0), 0))


@triton.jit(do_not_specialize=["chunks"])
def carried_kernel(totals, initial, carried, chunks, N: tl.constexpr):
    """carried (B·H, chunks + 1), fp64: the maximum before each chunk, and behind the last; first is `initial` or −∞."""
    both = tl.program_id(0)
    at = carried + both.to(tl.int64) * (chunks + 1)
    o = tl.arange(0, N)
    before = tl.full([], NOTHING, tl.float64)
    if initial is not None:
        before = tl.load(initial + both).to(tl.float64)
    tl.store(at, before)
    for first in range(0, chunks, N):
        i = first + o
        place = totals + (both.to(tl.int64) * chunks + i) * 2
        added = tl.load(place, mask=i < chunks, other=0.0)
        top = tl.load(place + 1, mask=i < chunks, other=NOTHING)
        added, top = tl.associative_scan((added, top), 0, after)
        top = larger(added + before, top)
        tl.store(at + 1 + i, top, mask=i < chunks)
        before = tl.sum(tl.where(o == N - 1, top, 0.0), 0)


@triton.jit(do_not_specialize=["T", "H", "apart"])
def tops_kernel(
    largest, queries, decay, batch, token, head, runs, real, carried, first, tops, passed, columns, levels,
    marks, apart, T, H,
    C: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """`tops` (B, H, T), the running maximum M, or the larger of it and `first`; and of the recurrence of multiples of
    exp(M), where they are asked: its decays `passed`, the factors of its `columns`, and the `levels` of its rows, whose
    `queries` have logarithms likewise; each (B, H, T), fp32. `marks` are M and m as logarithms of 2, `apart` from one
    another."""
    chunks = tl.cdiv(T, C)
    both, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    o = tl.arange(0, C)
    i = chunk * C + o
    t, m, g, fresh = steps_of(largest, decay, batch, token, head, runs, real, both, both // H, both % H, i, T, REVERSE)
    added, top = tl.associative_scan((g, m), 0, after)
    at = carried + both.to(tl.int64) * (chunks + 1) + chunk
    before = tl.load(at)
    top = larger(added + before, top)
    top = tl.where(o == C - 1, tl.load(at + 1), top).to(tl.float32)  # as the next chunk has it, to the last digit
    base = both.to(tl.int64) * T
    there = i < T
    if first is not None:
        top = larger(top, tl.load(first + base + t, mask=there, other=NOTHING))
    tl.store(tops + base + t, top, mask=there)
    least = tl.where(top == NOTHING, LOWEST, top)
    if passed is not None:
        tl.debug_barrier()  # the maximum one token before is what another thread wrote
        last = tl.load(tops + base + t - 1, mask=there & (o > 0), other=0.0)
        last = tl.where(o > 0, last, before.to(tl.float32))
        left = tl.where(fresh, 0.0, (last - least) + tl.where(fresh, 0.0, g).to(tl.float32))
        tl.store(passed + base + t, left, mask=there)
    if columns is not None:
        tl.store(columns + base + t, tl.exp(m.to(tl.float32) - least), mask=there)
    if levels is not None:
        tl.store(levels + base + t, tl.load(queries + base + t, mask=there, other=0.0) + top, mask=there)
    if marks is not None:
        mark = top * LOG2E
        tl.store(marks + base + t, tl.where(mark < LOWEST, LOWEST, mark), mask=there)
        tl.store(marks + apart + base + t, m.to(tl.float32) * LOG2E, mask=there)


# --- launching ----------------------------------------------------------------------------------------------------

FEATURES, GRADIENT = Launcher(features_kernel), Launcher(gradient_kernel)
TOTALS, CARRIED, TOPS = Launcher(totals_kernel), Launcher(carried_kernel), Launcher(tops_kernel)
SCANNED, CHUNKS, INTERPRETED = 1024, 256, 32
"""Tokens, and chunks of them, whose maximum a program finds at once; where there is no GPU, of both."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tokens of a program, how many numbers of a sum it takes at once, and columns of the gradient."""

    tokens: int
    depth: int
    width: int
    num_warps: int


def tiles_for(device: Device, dtype: torch.dtype) -> Tiles:
    """The shape of a tile of features."""
    if device.interpreted:
        return Tiles(16, 16, 16, 4)
    if dtype == torch.float32:
        return Tiles(16, 16, 64, 8)
    if dtype == torch.float16:
        return Tiles(32, 32, 64, 8)
    return Tiles(64, 32, 128, 4 if device.capability[0] == 9 else 8)


def exactly(dtype: torch.dtype) -> str:
    """How an exponent's products are multiplied: those of fp16 as fp32 is in tf32, in three parts."""
    return "tf32x3" if dtype == torch.float16 else precision(dtype)


@dataclass(frozen=True, slots=True)
class Projection:
    """The projection (R, D) in fp32, as it is multiplied: in bf16 twice, and elsewhere as it is."""

    whole: Tensor
    rounded: Tensor
    rest: Tensor | None

    @classmethod
    def of(cls, projection: Tensor, dtype: torch.dtype) -> Projection:
        whole = projection.contiguous()
        if dtype != torch.bfloat16:
            return cls(whole, whole, None)
        rounded = whole.to(dtype)
        return cls(whole, rounded, (whole - rounded).to(dtype))

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """φ(x) over its token's largest, (B, T, H, R) as it is multiplied, and the logarithm of that, (B, H, T)."""
        B, T, H, D = x.shape
        R, tiles = len(self.whole), tiles_for(device_of(x.device), x.dtype)
        phi = torch.empty(B, T, H, R, dtype=torch.float32 if x.dtype == torch.float16 else x.dtype, device=x.device)
        largest = torch.empty(B, H, T, dtype=torch.float32, device=x.device)
        how = exactly(x.dtype)
        FEATURES(
            (parts(T, tiles.tokens) * B * H,),
            (known_by(x, self.rounded), tiles, how),
            *(Side(x).argument(), self.rounded, self.rest, phi, largest, T, H, D**-0.25, -math.log(R) / 2),
            *(D, R, tiles.tokens, max(16, power_of_2(R)), tiles.depth, DTYPES[x.dtype], how),
            num_warps=tiles.num_warps,
            num_stages=2,
        )
        return phi, largest

    def gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        """The gradient of x (B, T, H, D), by that of the logarithms of its features (B, T, H, R), contiguous."""
        B, T, H, D = x.shape
        R, tiles = len(self.whole), tiles_for(device_of(x.device), x.dtype)
        width = min(tiles.width, max(16, power_of_2(D)))
        out = torch.empty(B, T, H, D, dtype=x.dtype, device=x.device)
        how = precision(x.dtype)
        GRADIENT(
            (parts(T, tiles.tokens) * B * H * parts(D, width),),
            (known_by(x, grad, self.rounded), tiles, how),
            *(grad, Side(x).argument(), self.rounded, out, T, H, D**-0.25),
            *(D, R, tiles.tokens, width, tiles.depth, DTYPES[x.dtype], how),
            num_warps=tiles.num_warps,
            num_stages=2,
        )
        return out


@dataclass(frozen=True, slots=True)
class Tops:
    """The maximum M that each token sees, and the recurrence of multiples of exp(M)."""

    m: Tensor
    """(B, H, T)"""
    decay: Tensor | None
    """(B, T, H): None where M is one for all tokens of a document, or there are marks"""
    columns: Tensor | None
    """(B, H, T): what keys are multiplied by; None where there are marks"""
    levels: Tensor
    """(B, H, T): the logarithms of what sums are multiples of"""
    marks: Tensor | None = None
    """(2, B, H, T): M and m as the recurrence's `Order` has them"""
    first: Tensor | None = None
    """(B, H): M before the first token likewise, where there was one"""


def tops_of(
    queries: Tensor,
    keys: Tensor,
    decay: Tensor | None,
    runs: Tensor | None,
    real: Tensor | None,
    initial: Tensor | None,
    causal: bool,
) -> Tops:
    """Of logarithms (B, H, T) of queries and keys, decays (B, T, H), documents and padding (B, T), and the first M."""
    runs = None if runs is None else runs.to(torch.int32).contiguous()
    there = None if real is None else real.contiguous().view(torch.uint8)
    initial = None if initial is None else initial.contiguous()
    wide: dict[str, Any] = {"dtype": torch.float32, "device": keys.device}
    tops, levels = torch.empty(keys.shape, **wide), torch.empty(keys.shape, **wide)
    if causal and decay is None:
        marks = torch.empty(2, *keys.shape, **wide)
        _scan(queries, keys, None, runs, there, initial, None, Asked(tops, levels=levels, marks=marks))
        first = None if initial is None else (initial * LOG2E.value).clamp(min=LOWEST.value)
        return Tops(tops, None, None, levels, marks, first)
    columns = torch.empty(keys.shape, **wide)
    if causal:
        passed = torch.empty(keys.shape, **wide)
        _scan(queries, keys, decay, runs, there, initial, None, Asked(tops, passed, columns, levels))
        return Tops(tops, passed.transpose(1, 2), columns, levels)
    upto = torch.empty(keys.shape, **wide)
    _scan(queries, keys, None, runs, there, initial, None, Asked(upto))
    _scan(queries, keys, None, runs, there, None, upto, Asked(tops, None, columns, levels))
    return Tops(tops, None, columns, levels)


@dataclass(frozen=True, slots=True)
class Asked:
    """What is found of the running maximum, None where nobody asks for it: as `tops_kernel` says."""

    tops: Tensor
    passed: Tensor | None = None
    columns: Tensor | None = None
    levels: Tensor | None = None
    marks: Tensor | None = None

    def arguments(self) -> tuple[Any, ...]:
        apart = 0 if self.marks is None else self.marks.stride(0)
        return self.tops, self.passed, self.columns, self.levels, self.marks, apart


def _scan(
    queries: Tensor,
    keys: Tensor,
    decay: Tensor | None,
    runs: Tensor | None,
    real: Tensor | None,
    initial: Tensor | None,
    first: Tensor | None,
    asked: Asked,
) -> None:
    """The maximum from the first token on, or with a `first` one, from the last on."""
    B, H, T = keys.shape
    interpreted, reverse = device_of(keys.device).interpreted, first is not None
    tokens = INTERPRETED if interpreted else SCANNED
    chunks = parts(T, tokens)
    exact: dict[str, Any] = {"dtype": torch.float64, "device": keys.device}
    totals, carried = torch.empty(B * H, chunks, 2, **exact), torch.empty(B * H, chunks + 1, **exact)
    strides = (0, 0, 0) if decay is None else decay.stride()
    found = asked.arguments()
    known = known_by(keys, decay, runs, real, initial), tuple(each is None for each in found), reverse
    steps = decay, *strides, runs, real
    TOTALS((B * H * chunks,), known, keys, *steps, totals, T, H, tokens, reverse)
    CARRIED((B * H,), known, totals, initial, carried, chunks, INTERPRETED if interpreted else CHUNKS)
    TOPS((B * H * chunks,), known, keys, queries, *steps, carried, first, *found, T, H, tokens, reverse)
