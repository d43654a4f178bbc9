"""The check at an operator's door: shapes by symbol, dtypes, devices, masks and kernel names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attncompiler.errors import InputError, fail
from attncompiler.mechanisms.base import discover

WHOLE = ("segment_ids", "kv_segment_ids", "q_positions", "kv_positions")
"""inputs of any operator that count"""


def check_shapes(tensors: Mapping[str, Tensor | None], layouts: Mapping[str, str]) -> dict[str, int]:
    """Sizes by symbol, from tensors and layouts such as "BTHD".

    Raises InputError (E401) naming what disagrees or is empty: no kernel is asked about a sequence without tokens.
    """
    sizes: dict[str, int] = {}
    first: dict[str, str] = {}
    for name, layout in layouts.items():
        tensor = tensors.get(name)
        if tensor is None:
            continue
        if tensor.dim() != len(layout):
            raise fail(InputError, "E401", f"{name} must be ({', '.join(layout)}), not {tuple(tensor.shape)}")
        for symbol, size in zip(layout, tensor.shape, strict=True):
            if size == 0:
                raise fail(InputError, "E401", f"{name} is empty: {symbol} = 0 in ({', '.join(layout)})")
            if symbol in sizes and sizes[symbol] != size:
                raise fail(
                    InputError,
                    "E401",
                    f"{name} has {symbol} = {size} in ({', '.join(layout)}), but {first[symbol]} has {sizes[symbol]}",
                )
            sizes.setdefault(symbol, size)
            first.setdefault(symbol, name)
    return sizes


def check_device(tensors: Mapping[str, Tensor | None]) -> None:
    """Raises InputError (E404) unless all tensors are on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise fail(InputError, "E404", f"all tensors must be on one device: {listed}")


def check_dtypes(
    tensors: Mapping[str, Tensor | None], low: Sequence[str], wide: Sequence[str] = ()
) -> dict[str, Tensor | None]:
    """The tensors, those named in `wide` raised to fp32 (fp64 where the others are fp64).

    Raises InputError (E402) unless those named in `low` are of one floating dtype, none in `wide` is wider, and those
    of `WHOLE` are whole numbers.
    """
    # no name is assigned inside the comprehension: that would be a cell, which Dynamo cannot read
    given = {name: tensor for name, tensor in tensors.items() if name in low and tensor is not None}
    found = {tensor.dtype for tensor in given.values()}
    if len(found) > 1 or not all(dtype.is_floating_point for dtype in found):
        listed = ", ".join(f"{name} {tensor.dtype}" for name, tensor in given.items())
        raise fail(InputError, "E402", f"{', '.join(given)} must be of one floating dtype: {listed}")
    dtype = found.pop()
    limit = torch.promote_types(dtype, torch.float32)
    raised = dict(tensors)
    for name in wide:
        tensor = tensors.get(name)
        if tensor is None:
            continue
        if not tensor.dtype.is_floating_point or torch.promote_types(tensor.dtype, limit) != limit:
            raise fail(
                InputError, "E402", f"{name} must be {limit} or narrower where {low[0]} is {dtype}, not {tensor.dtype}"
            )
        raised[name] = tensor.to(limit)
    for name in WHOLE:
        tensor = tensors.get(name)
        if tensor is None:
            continue
        if tensor.is_floating_point() or tensor.is_complex():
            raise fail(InputError, "E402", f"{name} must be whole numbers, not {tensor.dtype}")
        if name.endswith("positions"):
            raised[name] = tensor.long()  # their differences have a sign
    return raised


def number(name: str, value: object, *, above: float | None = None) -> float:
    """The value as a float. Raises InputError (E403) unless it is a finite number, and above `above` where given."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise fail(InputError, "E403", f"{name} must be a finite number, not {value!r}")
    if above is not None and not value > above:
        raise fail(InputError, "E403", f"{name} must be above {above:g}, not {value:g}")
    return float(value)


def whole(name: str, value: object, least: int) -> int:
    """The value itself. Raises InputError (E403) unless it is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise fail(InputError, "E403", f"{name} must be a whole number of at least {least}, not {value!r}")
    return value


def silenced(tensors: Mapping[str, Tensor], real: Tensor) -> dict[str, Tensor]:
    """The tensors (B, T, …) with 0 where `real` (B, T) is False: 0 times what padding may hold, NaN, is not 0."""
    return {
        name: tensor.masked_fill(~real.view(*real.shape, *[1] * (tensor.dim() - 2)), 0)
        for name, tensor in tensors.items()
    }


def boolean_mask(attention_mask: Tensor | None) -> Tensor | None:
    """The mask as booleans: True where it is non-zero."""
    if attention_mask is None or attention_mask.dtype == torch.bool:
        return attention_mask
    return attention_mask != 0


def kernel_names(mechanism: str, kernel: str | Sequence[str]) -> tuple[str, ...]:
    """The only kernels allowed; () for "auto". Raises InputError (E403) on a name the mechanism does not know."""
    if kernel == "auto":
        return ()
    if not isinstance(kernel, Sequence):
        raise fail(InputError, "E403", f"kernel must be 'auto', a name or a list of names, not {kernel!r}")
    names = (kernel,) if isinstance(kernel, str) else tuple(kernel)
    known = discover()[mechanism].names
    for name in names:
        if name not in known:
            raise fail(InputError, "E403", f"unknown kernel {name!r} for {mechanism}; known: {', '.join(known)}")
    if not names:
        raise fail(InputError, "E403", "the list of kernels is empty")
    return names
