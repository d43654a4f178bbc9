"""A strided pattern of small blocks in two parts, neither of which meets keys that it does not see.

Where blocks are smaller than a tile, every tile holds a pair at a multiple of the stride, and none is skipped. But the
far keys of block I are in its class, the blocks J ≡ I mod stride: with the blocks ordered by class, as sequences of
their own, they are all of them up to some distance. What is near is a band. Both parts are attention of their own, of
one softmax: joined through their lse going forward, and in the backward sums of gradients under the joint lse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attncompiler.mechanisms.attention.op import AttentionOptions
from attncompiler.mechanisms.attention.pattern import Causal, LocalGlobal, Pattern, SlidingWindow, Strided
from attncompiler.runtime.implementation import Tensors

SMALL_BLOCK = 32
"""Blocks of fewer tokens are split: larger ones fill a tile well enough."""
SHORT = 64
"""Sequences of up to so many tokens are one tile, and are not split."""
Forward = Callable[[Tensors, AttentionOptions], dict[str, Tensor]]
Backward = Callable[[Tensors, Tensors, Tensors, AttentionOptions], dict[str, Tensor]]


def splits(inputs: Tensors, options: AttentionOptions) -> bool:
    """Whether a call is worth the split, and its positions and indices mean nothing but the order of its tokens."""
    pattern, T = options.pattern, inputs["q"].shape[1]
    plain = inputs.keys() <= {"q", "k", "v", "sinks"} and inputs["k"].shape[1] == T and not options.dropout
    if not plain or not isinstance(pattern, Strided) or not pattern.causal or pattern.stride == 1:
        return False
    return pattern.block_size < SMALL_BLOCK and T > SHORT


def forward(attend: Forward, inputs: Tensors, options: AttentionOptions, *, widen: bool = True) -> dict[str, Tensor]:
    """As `attend`, which is called once for each part.

    With `widen` in fp32 or better, so that nothing is rounded between the parts; else each part comes in the dtype of
    the inputs, as matrix units want them.
    """
    wide = _wide(inputs) if widen else dict(inputs)
    parts = _Classes.of(wide["q"], options.pattern)
    near = attend(wide, parts.band(options))
    out, lse = near["out"], near["lse"]
    if parts.some:
        far = attend(parts.call(wide), parts.far(options))
        far_out = parts.joined(far["out"], parts.lag, 0.0)
        far_lse = parts.joined(far["lse"].mT, parts.lag, -torch.inf).mT
        lse = torch.logaddexp(near["lse"], far_lse)
        shares = [(part - lse).exp().mT[..., None] for part in (near["lse"], far_lse)]
        out = out * shares[0] + far_out * shares[1]
    return {"out": out.to(inputs["q"].dtype), "lse": lse.contiguous()}


def backward(
    attend: Backward,
    grads: Tensors,
    inputs: Tensors,
    outputs: Tensors,
    options: AttentionOptions,
    *,
    widen: bool = True,
) -> dict[str, Tensor]:
    """As `attend`, likewise."""
    wide = _wide(inputs) if widen else dict(inputs)
    above = {"out": grads["out"].to(wide["q"].dtype)}
    results = {"out": outputs["out"].to(wide["q"].dtype), "lse": outputs["lse"]}
    parts = _Classes.of(wide["q"], options.pattern)
    found = attend(above, wide, results, parts.band(options))
    if parts.some:
        later = [parts.split(each)[:, parts.lag :] for each in (above["out"], results["out"], results["lse"].mT)]
        far_results = {"out": later[1].contiguous(), "lse": later[2].mT.contiguous()}
        far = attend({"out": later[0]}, parts.call(wide), far_results, parts.far(options))
        found["q"] = found["q"] + parts.joined(far["q"], parts.lag, 0.0)
        for name in ("k", "v"):
            found[name] = found[name] + parts.joined(far[name], 0, 0.0)
    return {name: grad.to(inputs[name].dtype) for name, grad in found.items()}


def _wide(inputs: Tensors) -> dict[str, Tensor]:
    return {name: tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for name, tensor in inputs.items()}


@dataclass(frozen=True, slots=True)
class _Classes:
    """The classes of a sequence of `length` tokens: M blocks each, the last perhaps not there or not whole."""

    pattern: Strided
    length: int
    blocks: int
    """M"""
    lag: int
    """in tokens of a class: a query's far keys end so many before it, less its place in its block"""

    @classmethod
    def of(cls, q: Tensor, pattern: object) -> _Classes:
        assert isinstance(pattern, Strided)
        blocks = -(-q.shape[1] // (pattern.stride * pattern.block_size))
        return cls(pattern, q.shape[1], blocks, -(-pattern.window // pattern.stride) * pattern.block_size)

    @property
    def some(self) -> bool:
        """Whether any query has far keys."""
        return self.blocks * self.pattern.block_size > self.lag

    def band(self, options: AttentionOptions) -> AttentionOptions:
        near: Pattern = LocalGlobal(block_size=self.pattern.block_size, local_blocks=self.pattern.window)
        if self.pattern.block_size == 1:
            near = SlidingWindow(window=self.pattern.window)
        return options.model_copy(update={"pattern": near})

    def far(self, options: AttentionOptions) -> AttentionOptions:
        return options.model_copy(update={"pattern": Causal()})

    def split(self, tensor: Tensor) -> Tensor:
        """(B, T, …) → (B·stride, M·block_size, …): the sequences of the classes, 0 behind the last token."""
        s, b = self.pattern.stride, self.pattern.block_size
        missing = self.blocks * s * b - self.length
        if missing:
            tensor = torch.cat([tensor, tensor.new_zeros(len(tensor), missing, *tensor.shape[2:])], 1)
        return tensor.unflatten(1, (self.blocks, s, b)).transpose(1, 2).flatten(2, 3).flatten(0, 1)

    def joined(self, tensor: Tensor, before: int, empty: float) -> Tensor:
        """Of sequences (B·stride, ·, …) that begin `before` tokens into a class: (B, T, …), elsewhere `empty`."""
        s, b = self.pattern.stride, self.pattern.block_size
        whole = tensor.new_full((len(tensor), self.blocks * b, *tensor.shape[2:]), empty)
        whole[:, before : before + tensor.shape[1]] = tensor
        by_class = whole.unflatten(0, (-1, s)).unflatten(2, (self.blocks, b))
        return by_class.transpose(1, 2).flatten(1, 3)[:, : self.length]

    def call(self, inputs: Tensors) -> dict[str, Tensor]:
        """Queries from `lag` on and keys up to as many before the end, side by side: causal, of whole blocks."""
        count = self.blocks * self.pattern.block_size - self.lag
        q = self.split(inputs["q"])[:, self.lag :]
        k, v = (self.split(inputs[name])[:, :count] for name in ("k", "v"))
        if self.pattern.block_size == 1:
            return {"q": q, "k": k, "v": v}
        # a query sees the whole of the block beside its own
        place = (torch.arange(count, device=q.device) // self.pattern.block_size).expand(len(q), -1).contiguous()
        return {"q": q, "k": k, "v": v, "q_positions": place, "kv_positions": place}
