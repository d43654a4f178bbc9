"""What a spec's model is run on, drawn as a few numbers from which the tensors are made."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

import torch
from hypothesis import strategies as st
from torch import Tensor

from attncompiler.planning.planner import too_long
from attncompiler.spec.model import ModelSpec

LENGTHS = (70, 1, 2, 3, 5, 8, 17, 31, 40, 64, 65, 129, 200, 530)
"""Tokens: some more than any chunk, block or tile of the kernels for the CPU, so that one more begins. Shrinks to those
between 1 and the first."""
IGNORED = -100


@dataclass(frozen=True)
class Inputs:
    """A batch for the model of `spec`: B sequences of T tokens, padding included.

    `padding` is how many tokens of each sequence are padding, on `side`; every sequence has a real one. Segments begin
    at `cuts`. Tokens, embeddings and labels are drawn from `seed`.
    """

    spec: ModelSpec = field(repr=False, compare=False)
    batch: int = 1
    length: int = 1
    seed: int = 0
    side: Literal["left", "right"] = "right"
    padding: tuple[int, ...] = ()
    cuts: tuple[int, ...] = ()

    def forward(self, *, device: str = "cpu", dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Arguments of the model: input_ids or inputs_embeds (in `dtype`, default the spec's), and what goes with them.

        attention_mask (B, T) where there is padding, segment_ids (B, T) where there are cuts, token_type_ids (B, T)
        where the model has token types.
        """
        model, generator = self.spec.model, self._generator()
        shape = (self.batch, self.length)
        given: dict[str, Tensor] = {}
        if model.input == "embeds":
            embeds = torch.randn(*shape, model.hidden_size, generator=generator)
            given["inputs_embeds"] = embeds.to(dtype or getattr(torch, model.dtype))
        else:
            given["input_ids"] = torch.randint(model.vocab_size or 1, shape, generator=generator)
        if model.embedding.token_types:
            given["token_type_ids"] = torch.randint(model.embedding.token_types, shape, generator=generator)
        if self.padding:
            given["attention_mask"] = self.real().long()
        if self.cuts:
            given["segment_ids"] = self.segments()
        return {name: tensor.to(device) for name, tensor in given.items()}

    def loss(self, *, device: str = "cpu", dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Arguments of the model's loss: those of `forward` and labels, those of padding and some more ignored."""
        head, generator = self.spec.model.head, self._generator(1)
        if head.kind == "none":
            raise ValueError("a model without a head has no loss")
        if head.kind == "classifier":
            labels = torch.randint(head.num_labels, (self.batch,), generator=generator)
        else:
            shape = (self.batch, self.length)
            labels = torch.randint(self.spec.model.vocab_size or 1, shape, generator=generator)
            ignored = torch.rand(shape, generator=generator) < 0.1
            labels = labels.masked_fill(ignored | ~self.real(), IGNORED)
        return {**self.forward(device=device, dtype=dtype), "labels": labels.to(device)}

    def real(self) -> Tensor:
        """Which tokens are real (B, T)."""
        index = torch.arange(self.length)
        counts = torch.tensor(self.padding or (0,) * self.batch)[:, None]
        return index >= counts if self.side == "left" else index < self.length - counts

    def segments(self) -> Tensor:
        """Which segment each token is of (B, T), numbered from 0."""
        begun = torch.arange(self.length)[:, None] >= torch.tensor(self.cuts)
        return begun.sum(1).expand(self.batch, -1).contiguous()

    def plain(self) -> dict[str, Any]:
        """The numbers alone, those that are not defaults; `Inputs(spec, **numbers)` is this again."""
        numbers = {each.name: (getattr(self, each.name), each.default) for each in fields(self) if each.compare}
        return {name: value for name, (value, default) in numbers.items() if value != default}

    @classmethod
    def of(cls, spec: ModelSpec, numbers: dict[str, Any]) -> Self:
        """The inputs of which `numbers` are the plain ones, lists or tuples. Raises TypeError for others."""
        own: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in numbers.items()}
        return cls(spec, **own)

    def _generator(self, more: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(2 * self.seed + more)


@st.composite
def inputs_for(draw: st.DrawFn, spec: ModelSpec) -> Inputs:
    """Batches that the model of `spec` takes: of 1 to 70 tokens or some lengths above, padded on either side or not,
    packed or not."""
    longest = spec.model.max_position_embeddings if too_long(spec, max(LENGTHS)) is not None else max(LENGTHS)
    length = draw(st.integers(1, min(longest, LENGTHS[0])) | st.sampled_from([n for n in LENGTHS if n <= longest]))
    batch = draw(st.integers(1, 3))
    padding: tuple[int, ...] = ()
    if draw(st.integers(0, 2)) == 2:
        padding = tuple(draw(st.lists(st.integers(0, length - 1), min_size=batch, max_size=batch)))
    cuts: tuple[int, ...] = ()
    if length > 1 and draw(st.integers(0, 2)) == 2:
        cuts = tuple(sorted(draw(st.lists(st.integers(1, length - 1), min_size=1, max_size=3, unique=True))))
    side: Literal["left", "right"] = draw(st.sampled_from(["right", "left"])) if padding else "right"
    return Inputs(spec, batch, length, draw(st.integers(0, 2**20)), side, padding, cuts)
