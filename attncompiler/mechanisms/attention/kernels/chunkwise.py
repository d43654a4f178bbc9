"""Plain torch over blocks of queries and tiles of the keys they can see (flash attention's recurrences).

The softmax is taken online over the tiles (Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867), the
backward recomputes the probabilities from the lse (Dao et al. 2022, https://arxiv.org/abs/2205.14135, algorithm 4).
Memory is linear in the length, and the work is that of the blocks a pattern keeps: a tile gathers ranges of keys from
where they lie. Scores are in base 2, whose exponential is faster.

Shapes: g = H / K query heads read one key head; a block of t queries of b sequences is (b·K, g·t, D), so that no key is
repeated.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attncompiler.blocks.underflow import LOG2_E, exp2_
from attncompiler.mechanisms.attention import one_query, residues, sinks
from attncompiler.mechanisms.attention.dropout import kept
from attncompiler.mechanisms.attention.one_query import LOWEST
from attncompiler.mechanisms.attention.op import AttentionOptions
from attncompiler.mechanisms.attention.tiles import Block, Tile, View, blocks, parts
from attncompiler.runtime.implementation import Implementation, Tensors

QUERIES = 128
KEYS = 512
TILE = 2**22
"""Scores that are held at once, when one sequence does not already need more: larger batches go in parts."""

LEAST, MOST = 2.0**-30, 2.0**60
"""Sums of weights whose largest was not divided out, in which nothing has been lost: neither to weights of less than
2**-100, which count as none, nor to the end of fp32 when values are added up by them."""
LARGE_VALUES = 2.0**40
"""Values above it might be lost to that end."""


class Call:
    """One call: its tensors, block by block and tile by tile."""

    def __init__(self, inputs: Tensors, options: AttentionOptions):
        self.inputs, self.options = inputs, options
        self.q, self.k, self.v = inputs["q"], inputs["k"], inputs["v"]
        self.kv_heads = self.k.shape[2]
        self.group = self.q.shape[2] // self.kv_heads
        self.dtype = torch.promote_types(self.q.dtype, torch.float32)
        self.scale = options.softmax_scale(self.q.shape[-1])
        # what queries are multiplied with beside the scale: softcap's argument, or at once the unit of the scores
        self.unit = LOG2_E if options.softcap is None else 1 / options.softcap
        self.view = View.of(inputs, options)
        self.careful = not self._may_be_bold()
        self.index = torch.arange(max(self.q.shape[:2] + self.k.shape[1:2]), device=self.q.device)

    def _may_be_bold(self) -> bool:
        """Whether blocks are first tried without a maximum: where it is cheap to read whether that went well.

        Rows that see nothing look as if it had not.
        """
        if self.q.device.type != "cpu" or "attention_mask" in self.inputs or "q_positions" in self.inputs:
            return False
        return all(abs(float(each)) <= LARGE_VALUES for each in self.v.aminmax())

    def blocks(self) -> Iterator[Block]:
        B, T, H, _ = self.q.shape
        rows = min(T, QUERIES)
        batches = parts(0, B, max(1, TILE // (H * rows * min(self.k.shape[1], KEYS))))
        return blocks(self.inputs, self.view, list(batches), QUERIES)

    def queries(self, block: Block) -> Tensor:
        return self.grouped(self.q, block) * (self.scale * self.unit)

    def grouped(self, tensor: Tensor, block: Block) -> Tensor:
        """A block of (B, T, H, D) as (b·K, g·t, D)."""
        rows = tensor[block.batch, block.rows].to(self.dtype)
        by_head = rows.reshape(-1, block.length, self.kv_heads, self.group, rows.shape[-1]).permute(0, 2, 3, 1, 4)
        return by_head.reshape(-1, self.group * block.length, rows.shape[-1])

    def write(self, into: Tensor, tensor: Tensor, block: Block) -> None:
        """Put (b·K, g·t, V) where a block lies in (B, T, H, V)."""
        by_head = tensor.view(-1, self.kv_heads * self.group, block.length, tensor.shape[-1])
        into[block.batch, block.rows] = by_head.transpose(1, 2)

    def gathered(self, tensor: Tensor, block: Block, tile: Tile) -> Tensor:
        """The keys or values of a tile, (B, S, K, D) → (b·K, s, D)."""
        rows = tensor if len(tensor) == 1 else tensor[block.batch]
        return tile.gathered(rows).to(self.dtype).transpose(1, 2).flatten(0, 1)

    def scattered(self, into: Tensor, block: Block, tile: Tile, tensor: Tensor) -> None:
        """Add what a tile's keys or values gain (b·K, s, D) to (B, S, K, D)."""
        tile.scattered(into[block.batch], tensor.unflatten(0, (-1, self.kv_heads)).transpose(1, 2))

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """(b·K, g·t, s) before what is hidden is hidden: in base 2, or the tanh of softcap's argument."""
        scores = torch.bmm(queries, keys.mT)
        return scores if self.options.softcap is None else scores.tanh_()

    def biased(self, scores: Tensor, block: Block, tile: Tile) -> Tensor:
        """The scores in base 2, −∞ where hidden; overwritten unless there is a softcap, whose tanh is kept."""
        if self.options.softcap is not None:
            scores = scores * (self.options.softcap * LOG2_E)
        alibi = "alibi_slopes" in self.inputs
        if tile.whole and not alibi:
            return scores
        by_head = scores.view(-1, self.kv_heads, self.group, block.length, scores.shape[-1])
        if alibi:
            slopes = self.inputs["alibi_slopes"].to(self.dtype).view(self.kv_heads, -1, 1, 1)
            by_head.addcmul_(self.view.distances(block, tile, self.dtype), slopes, value=-LOG2_E)
        for part, bias in zip(tile.split(by_head, -1), self.view.biases(block, tile, self.dtype), strict=True):
            if bias is not None:
                part.add_(bias)
        return scores

    def products(self, weights: Tensor, block: Block, tile: Tile) -> Tensor:
        """The values of a tile summed by their weights, less those that are dropped: (b·K, g·t, V)."""
        if (keep := self.kept(block, tile)) is not None:
            weights.mul_(keep)
        return torch.bmm(weights, self.gathered(self.v, block, tile))

    def kept(self, block: Block, tile: Tile) -> Tensor | None:
        """What dropout multiplies probabilities with, (b·K, g·t, s); None without dropout."""
        if not self.options.dropout:
            return None
        columns = tile.gathered(self.index[None])[0]
        batch, rows = self.index[: len(self.q)][block.batch], self.index[block.rows]
        keep = kept(self.inputs["dropout_seed"], self.options.dropout, self.q.shape[2], batch, rows, columns)
        return keep.to(self.dtype).view(-1, self.group * block.length, keep.shape[-1])

    def by_head(self, by_row: Tensor, block: Block) -> Tensor:
        """(b·K, g·t, 1) as (b, H, t)."""
        return by_row.view(-1, self.kv_heads * self.group, block.length)

    def by_row(self, by_head: Tensor, block: Block) -> Tensor:
        """(H,) or (b, H, t) as (b·K, g·t, 1)."""
        if by_head.dim() == 1:
            by_head = by_head[:, None].expand(len(self.q[block.batch]), -1, block.length)
        return by_head.to(self.dtype).reshape(-1, self.group * block.length, 1)


def forward(inputs: Tensors, options: AttentionOptions) -> dict[str, Tensor]:
    """q (B, T, H, D), k (B, S, K, D), v (B, S, K, V) → out (B, T, H, V), lse (B, H, T)."""
    if one_query.serves(inputs, options):
        results = one_query.forward(inputs, options)
    elif residues.splits(inputs, options):
        results = residues.forward(_forward, inputs, options)
    else:
        results = _forward(inputs, options)
    if "sinks" in inputs:
        results["out"], results["lse"] = sinks.join(results["out"], results["lse"], inputs["sinks"])
    return results


def backward(grads: Tensors, inputs: Tensors, outputs: Tensors, options: AttentionOptions) -> dict[str, Tensor]:
    """The gradients of q, k, v and sinks, from the probabilities that the lse gives back."""
    if residues.splits(inputs, options):
        found = residues.backward(_backward, grads, inputs, outputs, options)
    else:
        found = _backward(grads, inputs, outputs, options)
    if "sinks" in inputs:
        found["sinks"] = sinks.gradient(inputs["sinks"], outputs["out"], outputs["lse"], grads["out"])
    return found


def _forward(inputs: Tensors, options: AttentionOptions) -> dict[str, Tensor]:
    call = Call(inputs, options)
    (B, T, H, _), V = call.q.shape, call.v.shape[-1]
    out, lse = call.q.new_empty(B, T, H, V), call.q.new_empty(B, H, T, dtype=call.dtype)
    for block in call.blocks():
        queries = call.queries(block)
        sums = None if call.careful else _boldly(call, block, queries)
        if sums is None:
            sums = _carefully(call, block, queries)
        if sums is None:
            out[block.batch, block.rows], lse[block.batch, :, block.rows] = 0, -torch.inf
            continue
        normaliser, total, weighted = sums
        lse[block.batch, :, block.rows] = call.by_head(normaliser, block)
        call.write(out, weighted.div_(total), block)
    return {"out": out, "lse": lse.div_(LOG2_E)}


Sums = tuple[Tensor, Tensor, Tensor]
"""Of a block: log2 of the sums of 2 to the scores, −∞ for none (b·K, g·t, 1), sums of weights, none of them 0, and of
values by those weights (b·K, g·t, V)."""


def _boldly(call: Call, block: Block, queries: Tensor) -> Sums | None:
    """With 2 to the scores as weights: two passes less. None where that lost anything, and none is tried again then."""
    total: Tensor | None = None
    weighted: Tensor | None = None
    for tile in block.tiles(KEYS):
        weights = exp2_(call.biased(call.scores(queries, call.gathered(call.k, block, tile)), block, tile))
        sums = weights.sum(-1, keepdim=True)
        products = call.products(weights, block, tile)
        total = sums if total is None else total.add_(sums)
        weighted = products if weighted is None else weighted.add_(products)
    if total is not None and weighted is not None:
        low, high = total.aminmax()
        if float(low) >= LEAST and float(high) <= MOST:
            return total.log2(), total, weighted
    call.careful = True
    return None


def _carefully(call: Call, block: Block, queries: Tensor) -> Sums | None:
    """With 2 to the scores less the largest so far. None where there are no keys."""
    largest: Tensor | None = None
    total = weighted = queries.new_zeros(())
    for tile in block.tiles(KEYS):
        scores = call.biased(call.scores(queries, call.gathered(call.k, block, tile)), block, tile)
        before, largest = largest, scores.amax(-1, keepdim=True)
        if before is not None:
            largest = torch.maximum(largest, before)
        base = largest.clamp(min=LOWEST)
        weights = exp2_(scores.sub_(base))
        sums = weights.sum(-1, keepdim=True)
        products = call.products(weights, block, tile)
        if before is not None:
            fading = (before - base).exp2_()
            sums.addcmul_(total, fading)
            products.addcmul_(weighted, fading)
        total, weighted = sums, products
    if largest is None:
        return None
    # the largest weight of a row that sees something is 1
    return largest + total.log2(), total.clamp_(min=1), weighted


def _backward(grads: Tensors, inputs: Tensors, outputs: Tensors, options: AttentionOptions) -> dict[str, Tensor]:
    call = Call(inputs, options)
    dq = torch.empty_like(call.q, memory_format=torch.contiguous_format)
    dk, dv = _accumulator(call.k, call.dtype), _accumulator(call.v, call.dtype)
    for block in call.blocks():
        queries = call.queries(block)
        dweighted = call.grouped(grads["out"], block)
        delta = (dweighted * call.grouped(outputs["out"], block)).sum(-1, keepdim=True)
        lse = call.by_row(outputs["lse"][block.batch, :, block.rows], block)
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # a row that sees nothing has only weights of 0
        lse = lse * LOG2_E
        dqueries = torch.zeros_like(queries)
        for tile in block.tiles(KEYS):
            keys, values = call.gathered(call.k, block, tile), call.gathered(call.v, block, tile)
            scores = call.scores(queries, keys)
            weights = exp2_(call.biased(scores, block, tile).sub_(lse))
            dscores = torch.bmm(dweighted, values.mT)
            if (keep := call.kept(block, tile)) is None:
                call.scattered(dv, block, tile, torch.bmm(weights.mT, dweighted))
            else:
                call.scattered(dv, block, tile, torch.bmm((weights * keep).mT, dweighted))
                dscores.mul_(keep)
            dscores.sub_(delta).mul_(weights)
            if options.softcap is not None:
                dscores.addcmul_(dscores * scores, scores, value=-1)
            call.scattered(dk, block, tile, torch.bmm(dscores.mT, queries))
            dqueries.baddbmm_(dscores, keys)
        call.write(dq, dqueries.mul_(call.scale), block)
    return {"q": dq, "k": dk.div_(call.unit).to(call.k.dtype), "v": dv.to(call.v.dtype)}


def _accumulator(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(tensor.shape, dtype=dtype, device=tensor.device)


KERNEL = Implementation(forward, backward)
