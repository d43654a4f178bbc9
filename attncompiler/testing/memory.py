"""Peak memory of a computation: counted by what torch's operations return, or by a GPU's allocator."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class PeakMemory(TorchDispatchMode):
    """A context that counts the bytes of storages made inside it: `peak` is the most that lived at once.

    It sees what operations return, not what they use inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        for argument in tree_iter((args, kwargs)):
            if isinstance(argument, torch.Tensor):
                self._known.add(argument.untyped_storage())
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known.add(storage)
        weakref.finalize(storage, self._freed, size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _freed(self, size: int) -> None:
        self.live -= size


class AllocatedMemory:
    """A context that asks the allocator of torch's current CUDA device: `peak` is the most bytes that lived at once,
    beside those that did before; what kernels use inside is among them, what they leave cached as free is not."""

    def __init__(self) -> None:
        self.peak = 0
        self._before = 0

    def __enter__(self) -> Self:
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_: object) -> None:
        self.peak = torch.cuda.max_memory_allocated() - self._before
