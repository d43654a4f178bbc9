"""Attention's decode state: the keys and values that later queries may still see, each at a slot of its own.

What must be held follows from the pattern (`pattern.retained`). A sequence's token at position p, counted over its real
tokens alone, has slot p while there is room; behind the first ones the slots are a ring, in which it takes the place of
the key that left every later query's sight as it came. So padding has no slot, and what a slot holds follows from how
many tokens the sequence has: no position and no mask is kept.

Shapes: N slots; n tokens of a sequence so far.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from attncompiler.mechanisms.attention.mechanism import AttentionPolicy
from attncompiler.mechanisms.attention.pattern import Retention, retained
from attncompiler.runtime.context import MixerContext

State = dict[str, Any]


def init_state(
    policy: AttentionPolicy,
    context: MixerContext,
    batch: int,
    max_length: int,
    device: torch.device,
    dtype: torch.dtype,
) -> State:
    """An empty cache: k (B, N, K, D) and v (B, N, K, V), `seen` tokens, and no lengths.

    `lengths` (B,) are the sequences' numbers of real tokens, once padding has come; until then all have `seen`.
    Sequences lie beside each other in every slot, so that the first slots are one piece of memory however many they
    are: with sequences one behind another they are only where the cache is full, and a compiled step would be compiled
    again there.
    """
    slots = retained(policy.pattern).slots(max_length)
    M, K = context.hidden_size, policy.kv_heads
    return {
        # a slot that holds nothing is read with weight 0, which NaN would survive
        "k": torch.zeros(slots, batch, K, policy.key_width(M), device=device, dtype=dtype).transpose(0, 1),
        "v": torch.zeros(slots, batch, K, policy.value_width(M), device=device, dtype=dtype).transpose(0, 1),
        "seen": 0,
        "lengths": None,
    }


Reading = dict[str, Tensor | None]
"""What queries attend to, as the operator's inputs: k, v (B, S, K, ·), and a mask or positions where needed."""

NOTHING: Mapping[str, Tensor | None] = MappingProxyType({})


def extend(
    retention: Retention,
    state: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None = None,
    scores: Mapping[str, Tensor | None] = NOTHING,
) -> tuple[Tensor, Reading, State, Tensor | None]:
    """q (B, T, H, D), k (B, T, K, D), v (B, T, K, V) of T new tokens → q, what it attends to, and the state after them.

    `attention_mask` (B, T) is non-zero for real tokens; padding may lie anywhere. Where it does, q comes back with the
    real tokens of each sequence first, and last the index (B, T) that puts what is computed for them in its old place.

    The cache is written in place unless autograd may need what it held. Where no padding ever came, one new query
    attends to the cache as it lies, without a mask. `scores` are what the operator is given beside: with alibi_slopes
    it counts how far keys are, so positions are given wherever a ring may have turned.
    """
    cache = _Cache(retention, state, _writable(state, (q, k, v, *scores.values())))
    distances = scores.get("alibi_slopes") is not None
    seen = state["seen"] + k.shape[1]
    if attention_mask is None and state["lengths"] is None:
        return q, _extend_even(cache, k, v, distances), cache.after(seen, None), None
    real = place = None
    if attention_mask is not None:
        real = attention_mask != 0
        if k.shape[1] > 1:
            order = torch.argsort((~real).to(torch.uint8), dim=1, stable=True)
            place = order.argsort(1)
            real = real.gather(1, order)
            q, k, v = moved(q, order), moved(k, order), moved(v, order)
        q, k, v = (tensor.masked_fill(~real[..., None, None], 0) for tensor in (q, k, v))
    reading, lengths = _extend_uneven(cache, k, v, real)
    return q, reading, cache.after(seen, lengths), place


def moved(tensor: Tensor, index: Tensor) -> Tensor:
    """(B, T, H, D) with its tokens in the order of `index` (B, T)."""
    return tensor.gather(1, index[..., None, None].expand(-1, -1, *tensor.shape[2:]))


def _writable(state: State, tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether the cache may be overwritten: no gradient passes through it, nor is it saved for another's."""
    held = (state["k"], state["v"])
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (*tensors, *held)):
        return False
    if any(tensor.requires_grad for tensor in held):
        return False
    # Dynamo cannot ask the rest
    return torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not any(t.is_inference() for t in held)


class _Cache:
    """The slots of one layer while a step writes and reads them."""

    def __init__(self, retention: Retention, state: State, writable: bool):
        self.retention, self.writable, self.state = retention, writable, state
        self.k, self.v, self.seen, self.lengths = state["k"], state["v"], state["seen"], state["lengths"]
        self.slots = self.k.shape[1]
        self.ring = max(1, self.slots - retention.first)

    def after(self, seen: int, lengths: Tensor | None) -> State:
        return {**self.state, "k": self.k, "v": self.v, "seen": seen, "lengths": lengths}

    def read(self, like: Tensor, start: int, stop: int) -> Reading:
        """Keys and values of a range of slots, in the dtype of the new ones."""
        k, v = self.k.narrow(1, start, stop - start), self.v.narrow(1, start, stop - start)
        return {"k": k, "v": v} if k.dtype == like.dtype else {"k": k.to(like.dtype), "v": v.to(like.dtype)}

    def slot(self, position: int) -> int:
        first = self.retention.first
        return position if position < first else first + (position - first) % self.ring

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The positions from `start` to `stop`, as runs (start, stop) of positions whose slots follow one another."""
        while start < stop:
            turned = self.slots - self.slot(start)
            end = min(stop, start + turned)
            yield start, end
            start = end

    def held(self, n: int | Tensor, empty: int | Tensor) -> Tensor:
        """The position (N,), or (B, N) for n (B, 1), that each slot holds after n tokens; `empty` for one that does not
        hold any."""
        slot = torch.arange(self.slots, device=self.k.device)
        turned = slot + (n - 1 - slot) // self.ring * self.ring
        position = torch.where(slot < self.retention.first, slot, turned)
        return torch.where(slot < n, position, empty)

    def write(self, position: int, k: Tensor, v: Tensor) -> None:
        """Put tokens (B, T, K, ·) that begin at `position` into slots that follow one another."""
        start = self.slot(position)
        self.k, self.v = self._written(self.k, start, k), self._written(self.v, start, v)

    def _written(self, slots: Tensor, start: int, new: Tensor) -> Tensor:
        length = new.shape[1]
        if not self.writable:
            return slots.slice_scatter(new.to(slots.dtype), 1, start, start + length)
        slots.narrow(1, start, length).copy_(new)
        return slots


# --- all sequences of one length --------------------------------------------------------------------------------------


def _extend_even(cache: _Cache, k: Tensor, v: Tensor, distances: bool) -> Reading:
    T, seen, retention = k.shape[1], cache.seen, cache.retention
    after = seen + T
    if T == 1 and retention.recent is not None:
        cache.write(seen, k, v)  # over a key that this query does not see
        return _one_query(cache, k, distances)
    if retention.recent is None or after <= cache.slots:
        cache.write(seen, k, v)
        # every slot holds the key of its own number, so the operator's own alignment is right
        return {"k": k, "v": v} if seen == 0 else cache.read(k, 0, after)
    reading = _several_queries(cache, k, v)
    kept = max(seen, retention.first, after - cache.ring)
    for start, stop in (*cache.runs(seen, min(after, retention.first)), *cache.runs(kept, after)):
        cache.write(start, k[:, start - seen : stop - seen], v[:, start - seen : stop - seen])
    return reading


def _one_query(cache: _Cache, like: Tensor, distances: bool) -> Reading:
    """The newest token's view of a ring that holds it already.

    It sees the first keys and its recent ones. Where those lie in one piece of slots, and their order does not matter,
    the operator finds under its own alignment that all are seen. The number of keys is computed without a branch, so
    that a compiled step is not compiled again where a ring begins to turn.
    """
    retention, position, B = cache.retention, cache.seen, like.shape[0]
    if retention.block_size == retention.recent and not distances and position >= retention.first:
        return cache.read(like, 0, retention.first + position % retention.block_size + 1)
    stop = min(position + 1, cache.slots)
    reading = cache.read(like, 0, stop)
    if retention.block_size == 1 and not distances:
        return reading
    positions = cache.held(position + 1, empty=0)[:stop]
    reading["q_positions"] = torch.full((B, 1), position, device=like.device)
    reading["kv_positions"] = positions.expand(B, -1).contiguous()
    return reading


def _several_queries(cache: _Cache, k: Tensor, v: Tensor) -> Reading:
    """The view of T new tokens of which some have no slot left: the keys held that they may see, in order, and theirs.

    Without a gap behind the first keys the positions are those of a sequence that begins at a block: no pattern that
    forgets can tell them apart.
    """
    (B, T, _, _), seen, retention = k.shape, cache.seen, cache.retention
    if seen == 0:
        return {"k": k, "v": v}
    start = max(retention.start(seen), min(seen, retention.first))
    runs = [(0, min(seen, retention.first)), *cache.runs(start, seen)]
    parts = [cache.read(k, cache.slot(a), cache.slot(a) + b - a) for a, b in runs if a < b]
    joined = _joined(*parts, {"k": k, "v": v})
    if retention.first == 0 or start <= retention.first:
        return joined
    positions = torch.cat([torch.arange(a, b, device=k.device) for a, b in (*runs, (seen, seen + T))])
    return {
        **joined,
        "q_positions": positions[-T:].expand(B, -1).contiguous(),
        "kv_positions": positions.expand(B, -1).contiguous(),
    }


def _joined(*parts: Reading) -> Reading:
    return {name: torch.cat([part[name] for part in parts], 1) for name in ("k", "v")}  # type: ignore[misc]


# --- sequences of unequal lengths -------------------------------------------------------------------------------------


def _extend_uneven(cache: _Cache, k: Tensor, v: Tensor, real: Tensor | None) -> tuple[Reading, Tensor]:
    """The reading, and the lengths (B,) after it. `real` (B, T) bool: real tokens come first, padding holds 0."""
    (B, T, _, _), seen = k.shape, cache.seen
    lengths = torch.full((B,), seen, device=k.device) if cache.lengths is None else cache.lengths
    before = lengths[:, None]
    places = before + torch.arange(T, device=k.device)
    n = before + (T if real is None else real.sum(1, keepdim=True))
    # padding sees nothing, and is at a position that nothing sees
    queries = places if real is None else torch.where(real, places, -1)
    old, held = cache.read(k, 0, cache.slots), cache.held(n, empty=n)
    if T == 1:
        _write_one(cache, before, k, v, real)
    else:
        _write_some(cache, before, n, held, k, v)
    if seen == 0:
        return {"k": k, "v": v, "attention_mask": real}, n[:, 0]
    if T == 1 or seen + T <= cache.slots:
        upper = min(seen + T, cache.slots)
        positions = {"q_positions": queries, "kv_positions": held[:, :upper].contiguous()}
        return {**cache.read(k, 0, upper), **positions}, n[:, 0]
    news = queries if real is None else torch.where(real, queries, n)
    positions = {"q_positions": queries, "kv_positions": torch.cat([cache.held(before, empty=n), news], 1)}
    return {**_joined(old, {"k": k, "v": v}), **positions}, n[:, 0]


def _write_one(cache: _Cache, before: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> None:
    """One token of each sequence to its own slot; where it is padding nothing changes."""
    first = cache.retention.first
    slot = torch.where(before < first, before, first + (before - first) % cache.ring)

    def written(slots: Tensor, new: Tensor) -> Tensor:
        index = slot[..., None, None].expand(-1, 1, *slots.shape[2:])
        new = new.to(slots.dtype)
        if real is not None:
            new = torch.where(real[..., None, None], new, moved(slots, slot))
        return slots.scatter_(1, index, new) if cache.writable else slots.scatter(1, index, new)

    cache.k, cache.v = written(cache.k, k), written(cache.v, v)


def _write_some(cache: _Cache, before: Tensor, n: Tensor, held: Tensor, k: Tensor, v: Tensor) -> None:
    """Every slot gets the token whose position it is to hold (B, N), where that is a new one."""
    fresh = ((held >= before) & (held < n))[..., None, None]
    rank = (held - before).clamp(0, k.shape[1] - 1)
    cache.k = torch.where(fresh, moved(k, rank).to(cache.k.dtype), cache.k)
    cache.v = torch.where(fresh, moved(v, rank).to(cache.v.dtype), cache.v)
