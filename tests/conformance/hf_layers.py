"""One of our layers beside the same layer of transformers, with the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class widened(TorchFunctionMode):
    """A context in which code that turns to fp32, as HF's does whatever its inputs, turns to fp64."""

    def __enter__(self) -> widened:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_default_dtype(self.before)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        def wide(argument: Any) -> Any:
            return torch.float64 if argument is torch.float32 else argument

        func = Tensor.double if func is Tensor.float else func
        return func(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


def assert_same(
    modules: tuple[nn.Module, nn.Module],
    hidden: tuple[Tensor, Tensor],
    outs: tuple[Tensor, Tensor],
    mask: Tensor | None,
) -> None:
    """Of real tokens: what comes out, and the gradients of the input and of every weight. Pairs are ours and theirs.

    hidden and outs (B, T, M), mask (B, T) or None. In fp64, so that nothing but a difference shows.
    """
    assert outs[0].dtype == outs[1].dtype == torch.float64
    ours, theirs = (out if mask is None else out * mask[..., None] for out in outs)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    found, expected = map(_gradients, modules, hidden, (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def _gradients(module: nn.Module, hidden: Tensor, out: Tensor) -> dict[str, Tensor]:
    tensors = {"hidden": hidden, **dict(module.named_parameters())}
    return dict(zip(tensors, torch.autograd.grad(out.square().sum(), list(tensors.values())), strict=True))
