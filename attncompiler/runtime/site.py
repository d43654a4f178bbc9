"""The site: the one opaque leaf of a mixer's graph. It runs a chain of kernels and keeps the record of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from attncompiler.runtime import registry
from attncompiler.runtime.operator import OperatorOptions, options_text


class Site(nn.Module):
    """Base of every mechanism's site. A copy, or a loaded one, is a site of its own with a fresh record.

    A subclass has a `forward` that takes the layer's tensors and the decode state, and calls the mechanism's operator
    with `self.options` and `self.handle`.
    """

    def __init__(
        self,
        mechanism: str,
        chain: Iterable[str],
        options: OperatorOptions,
        *,
        label: str,
        on_failure: str = "next",
        backward: str | None = None,
    ):
        super().__init__()
        self.mechanism = mechanism
        self.label = label
        self.options = options_text(options)
        self._adopt(registry.Record(label, chain, on_failure, backward))

    def _adopt(self, record: registry.Record) -> None:
        self.record = record
        # a plain attribute, not a buffer: it stays on the CPU when the model moves, and never enters a state dict
        self.handle = torch.tensor(registry.register(record), dtype=torch.int64, device="cpu")

    @property
    def chain(self) -> tuple[str, ...]:
        return self.record.chain

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        record = self.record
        state["record"] = (record.label, record.chain, record.on_failure, record.backward)
        del state["handle"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        record = state.pop("record")
        super().__setstate__(state)
        self._adopt(registry.Record(*record))

    def extra_repr(self) -> str:
        backward = f", backward by {self.record.backward}" if self.record.backward else ""
        return f"{self.mechanism}: {' → '.join(self.chain)}{backward}"
