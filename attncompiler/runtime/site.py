"""The site: the one opaque leaf of a mixer's graph. It runs a chain of kernels and keeps the record of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from attncompiler.runtime import registry
from attncompiler.runtime.context import Chain
from attncompiler.runtime.operator import OperatorOptions, options_text


class Site(nn.Module):
    """Base of every mechanism's site. A copy, or a loaded one, is a site of its own with a fresh record.

    A subclass has a `forward` that takes the layer's tensors and the decode state, and calls the mechanism's operator
    with `self.options` and `self.handle`.
    """

    def __init__(self, mechanism: str, options: OperatorOptions, chain: Chain):
        super().__init__()
        self.mechanism = mechanism
        self.options = options_text(options)
        self._adopt(registry.Record(chain))

    def _adopt(self, record: registry.Record) -> None:
        self.record = record
        # a plain attribute, not a buffer: it stays on the CPU when the model moves, and never enters a state dict
        self.handle = torch.tensor(registry.register(record), dtype=torch.int64, device="cpu")

    @property
    def chain(self) -> Chain:
        return self.record.chain

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["record"] = self.chain
        del state["handle"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        chain = state.pop("record")
        super().__setstate__(state)
        self._adopt(registry.Record(chain))

    def extra_repr(self) -> str:
        backward = f", backward by {self.chain.backward}" if self.chain.backward else ""
        return f"{self.mechanism}: {' → '.join(self.chain.kernels)}{backward}"
