"""torch's FlexAttention (https://arxiv.org/abs/2412.05496): a Triton kernel compiled for each pattern and option.

Which tiles are met comes from the pattern's block lists, made analytically; within a tile the pattern's own formula is
traced into the kernel. Where positions are not those of the lists (packed documents, padding, positions given) every
tile that may be met is masked by the formula.

The backward recomputes the forward under autograd: torch's backward operator takes the out and lse of another kernel
only inside a graph that Dynamo has traced itself. It adds no numbers in an order of chance, so it is repeatable.

A kernel is compiled once for each pattern, option, head count and width; torch compiles it for one length at first, and
when a second one comes, once more for all others. Layers share it: what differs from layer to layer, the draws of
`random`, is data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, FlexKernelOptions, flex_attention

from attncompiler.mechanisms.attention import sinks
from attncompiler.mechanisms.attention.block_lists import TileList, block_lists
from attncompiler.mechanisms.attention.op import OPERATOR, AttentionOptions
from attncompiler.mechanisms.attention.pattern import Causal, Full, LocalGlobal, Pattern, Random, is_band
from attncompiler.mechanisms.attention.random_blocks import NONE, drawn_range
from attncompiler.mechanisms.attention.visibility import pattern_visible, positions, query_mask
from attncompiler.mechanisms.attention.widths import widened
from attncompiler.runtime.implementation import Implementation, Tensors, differentiate

TILE = 128
LEAST_WIDTH = 16
"""The narrowest head that the kernel multiplies."""
KERNEL_OPTIONS: FlexKernelOptions = {"BACKEND": "TRITON"}


# --- what a query sees, element by element --------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """What a kernel is compiled for, beside shapes and dtypes."""

    pattern: Pattern
    scale: float
    softcap: float | None
    given: frozenset[tuple[str, int]]
    """which of `captured` there are, and of how many axes"""


Formula = Callable[[Tensor, Tensor], Tensor]


@lru_cache(maxsize=256)
def formula(pattern: Pattern) -> Formula:
    """(i, j) → whether i sees j, of 0-dim tensors: the pattern's own formula as a function without branches.

    Of `random` it is what is not drawn.
    """
    if isinstance(pattern, Random):
        near = pattern.model_dump(include=set(LocalGlobal.model_fields) - {"kind"})
        pattern = LocalGlobal(**near)
    i, j = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    traced = make_fx(lambda i, j: pattern_visible(pattern, i, j))(i, j)
    return traced.forward  # type: ignore[no-any-return]


def captured(inputs: Tensors, options: AttentionOptions) -> dict[str, Tensor]:
    """The tensors that mask and scores read, by name: positions where they are not q_idx and kv_idx, and the rest."""
    q, k = inputs["q"], inputs["k"]
    T, S = q.shape[1], k.shape[1]
    found = {}
    if T != S or inputs.keys() & {"segment_ids", "attention_mask", "q_positions"}:
        found["i"], found["j"] = positions(inputs)
    if "segment_ids" in inputs:
        found["query_segments"] = inputs["segment_ids"]
        found["key_segments"] = inputs.get("kv_segment_ids", inputs["segment_ids"])
    if "attention_mask" in inputs:
        found["real_keys"] = inputs["attention_mask"]
        found["real_queries"] = query_mask(inputs["attention_mask"], T, S)
    if "alibi_slopes" in inputs:
        found["slopes"] = inputs["alibi_slopes"].float()
    if isinstance(options.pattern, Random):
        found["drawn"], found["first_row"] = _draws(options.pattern, options.layer, T, S, q.device)
    # one row for the whole batch is read by one index: torch 2.11 takes a number beside a tensor for data it must know
    return {name: (x[0] if x.dim() == 2 and len(x) == 1 else x).contiguous() for name, x in found.items()}


@lru_cache(maxsize=64)
def _draws(pattern: Random, layer: int, T: int, S: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The blocks (random_blocks · rows,) that each block of queries sees by chance, and the number of the first row."""
    first, last = min(0, S - T) // pattern.block_size, (S - 1) // pattern.block_size
    drawn = drawn_range(pattern, layer, first, last, -(-S // pattern.block_size))
    drawn = torch.nn.functional.pad(drawn, (0, pattern.random_blocks - drawn.shape[1]), value=NONE)
    return drawn.T.flatten().to(device), torch.tensor(first, device=device)


def mods(
    kind: Kind, sees: Formula, data: dict[str, Tensor]
) -> tuple[Callable[..., Tensor], Callable[..., Tensor] | None]:
    """FlexAttention's mask_mod and score_mod over `captured` tensors."""
    pattern, softcap = kind.pattern, kind.softcap
    chances = pattern.random_blocks if isinstance(pattern, Random) else 0

    def read(name: str, b: Tensor, index: Tensor) -> Tensor:
        tensor = data[name]
        return tensor[index] if tensor.dim() == 1 else tensor[b, index]

    def places(b: Tensor, q_idx: Tensor, kv_idx: Tensor) -> tuple[Tensor, Tensor]:
        return (read("i", b, q_idx), read("j", b, kv_idx)) if "i" in data else (q_idx, kv_idx)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        i, j = places(b, q_idx, kv_idx)
        seen = sees(i, j)
        if chances:
            size = pattern.block_size  # type: ignore[union-attr]
            row, column = i // size - data["first_row"], j // size
            for number in range(chances):
                chance = data["drawn"][row + number * (len(data["drawn"]) // chances)] == column
                seen = seen | ((j <= i) & chance if pattern.causal else chance)
        if "query_segments" in data:
            seen = seen & (read("query_segments", b, q_idx) == read("key_segments", b, kv_idx))
        if "real_keys" in data:
            seen = seen & read("real_keys", b, kv_idx) & read("real_queries", b, q_idx)
        return seen

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if "slopes" in data:
            i, j = places(b, q_idx, kv_idx)
            score = score - data["slopes"][h] * (i - j).abs()
        return score

    return mask_mod, score_mod if softcap is not None or "slopes" in data else None


# --- tiles ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiles:
    """The tiles that are met, as BlockMask takes them: by row and by column, partial and full apart."""

    tensors: dict[str, Tensor]

    @staticmethod
    def of(inputs: Tensors, options: AttentionOptions) -> Tiles:
        """Those of the pattern; where positions are others, all that there may be, each of them partial."""
        T, S, device = inputs["q"].shape[1], inputs["k"].shape[1], inputs["q"].device
        masked = bool(inputs.keys() & {"segment_ids", "attention_mask"})
        if "q_positions" in inputs:
            return _tiles(Full(), 0, T, S, True, device)
        if not masked or is_band(options.pattern):
            return _tiles(options.pattern, options.layer, T, S, masked, device)
        return _tiles(Causal() if options.pattern.causal else Full(), 0, T, S, True, device)


@lru_cache(maxsize=64)
def _tiles(pattern: Pattern, layer: int, T: int, S: int, partial: bool, device: torch.device) -> Tiles:
    lists = block_lists(pattern, T, S, tile_q=TILE, tile_k=TILE, layer=layer)
    rows, columns = -(-T // TILE), -(-S // TILE)
    full, some = _coordinates(lists.full), _coordinates(lists.partial)
    # of a tile that hangs over an end, the kernel takes what is not there for seen, unless it is masked
    whole = (full[0] < T // TILE) & (full[1] < S // TILE) & (not partial)
    some = torch.cat([some, full[:, ~whole]], 1)
    full = full[:, whole]
    # the kernel reads the indices of full tiles by the strides of the partial ones: one width for both
    widest = [max(int(x[axis].bincount().max()) if len(x[axis]) else 1 for x in (some, full)) for axis in (0, 1)]
    found = {}
    for name, (r, c) in {"": some, "full_": full}.items():
        found[f"{name}kv_num_blocks"], found[f"{name}kv_indices"] = _listed(r, c, rows, widest[0])
        found[f"{name}q_num_blocks"], found[f"{name}q_indices"] = _listed(c, r, columns, widest[1])
    return Tiles({name: tensor.to(device) for name, tensor in found.items()})


def _coordinates(tiles: TileList) -> Tensor:
    """(2, n): row and column of each listed tile."""
    return torch.stack([tiles.rows(), tiles.indices.long()])


def _listed(rows: Tensor, columns: Tensor, count: int, width: int) -> tuple[Tensor, Tensor]:
    """How many columns each of `count` rows has, (1, 1, count), and which, in order, (1, 1, count, width)."""
    order = torch.argsort(rows * (int(columns.max()) + 1 if len(columns) else 1) + columns)
    rows, columns = rows[order], columns[order]
    number = rows.bincount(minlength=count)
    place = torch.arange(len(rows)) - (number.cumsum(0) - number)[rows]
    indices = torch.zeros(count, width, dtype=torch.int32)
    indices[rows, place] = columns.int()
    return number.int()[None, None], indices[None, None]


# --- the kernel -----------------------------------------------------------------------------------------------------


def attend(
    q: Tensor, k: Tensor, v: Tensor, kind: Kind, sees: Formula, data: dict[str, Tensor], tiles: dict[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """q (B, T, H, D), k (B, S, K, D), v (B, S, K, V) → out (B, T, H, V), lse (B, H, T)."""
    width = v.shape[-1]
    q, k, v = (widened(tensor, max(LEAST_WIDTH, tensor.shape[-1])).transpose(1, 2) for tensor in (q, k, v))
    mask_mod, score_mod = mods(kind, sees, data)
    mask = BlockMask(
        seq_lengths=(q.shape[2], k.shape[2]),
        BLOCK_SIZE=(TILE, TILE),
        mask_mod=mask_mod,
        **tiles,  # type: ignore[arg-type]
    )
    out, aux = flex_attention(
        q,
        k,
        v,
        score_mod=score_mod,
        block_mask=mask,
        scale=kind.scale,
        enable_gqa=q.shape[1] != k.shape[1],
        kernel_options=KERNEL_OPTIONS,
        return_aux=AuxRequest(lse=True),
    )
    return out.transpose(1, 2)[..., :width], aux.lse


@lru_cache(maxsize=256)
def _compiled(kind: Kind, shape: tuple[int, ...], dtype: torch.dtype, recorded: bool) -> Callable[..., Any]:
    """`attend` for one kind, as a function of its own name.

    torch keeps by name what it has seen vary between calls, numbers of the kind too, and stops at 8 recompilations.
    """
    sees = formula(kind.pattern)

    def run(q: Tensor, k: Tensor, v: Tensor, data: dict[str, Tensor], tiles: dict[str, Tensor]) -> Any:
        return attend(q, k, v, kind, sees, data, tiles)

    code = run.__code__.replace(co_name=f"flex_{hash((kind, shape, dtype, recorded)):x}".replace("-", "_"))
    return torch.compile(FunctionType(code, run.__globals__, code.co_name, None, run.__closure__), fullgraph=True)


def _call(inputs: Tensors, options: AttentionOptions) -> dict[str, Tensor]:
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    data = captured(inputs, options)
    given = frozenset((name, tensor.dim()) for name, tensor in data.items())
    kind = Kind(options.pattern, options.softmax_scale(q.shape[-1]), options.softcap, given)
    run = _compiled(kind, (*q.shape[2:], *v.shape[2:]), q.dtype, torch.is_grad_enabled())
    out, lse = run(q, k, v, data, Tiles.of(inputs, options).tensors)
    if "sinks" in inputs:
        out, lse = sinks.join(out, lse, inputs["sinks"])
    return {"out": out, "lse": lse}


def forward(inputs: Tensors, options: AttentionOptions) -> dict[str, Tensor]:
    """q (B, T, H, D), k (B, S, K, D), v (B, S, K, V) → out (B, T, H, V), lse (B, H, T)."""
    with torch.no_grad():
        found = _call({name: tensor.detach() for name, tensor in inputs.items()}, options)
    return {name: tensor.contiguous() for name, tensor in found.items()}


_backward = differentiate(_call, OPERATOR.differentiable)


def backward(grads: Tensors, inputs: Tensors, outputs: Tensors, options: AttentionOptions) -> dict[str, Tensor]:
    """The gradients of q, k, v and sinks, by the forward once more."""
    found = _backward(grads, inputs, outputs, options)
    return {name: grad.contiguous() for name, grad in found.items()}


KERNEL = Implementation(forward, backward)
