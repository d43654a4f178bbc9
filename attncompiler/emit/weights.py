"""First weights: drawn per parameter name from the spec's seed, so they are the same on every device and from meta."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from attncompiler.errors import UsageError, fail

STANDARD_DEVIATION = 0.02
"""of linear and embedding weights, HF's `initializer_range`"""


def seed_of(seed: int, name: str) -> int:
    """The generator seed of one parameter: a 63-bit hash of the spec's seed and the parameter's name."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little") >> 1


def initial_value(module: nn.Module, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """The fp32 CPU value of `module`'s own parameter `name`: by the module's scheme, else normal and zero biases."""
    scheme: Callable[[str, torch.Generator], Tensor | None] | None = getattr(module, "initial_value", None)
    if scheme is not None and (value := scheme(name, generator)) is not None:
        return value
    if name == "bias":
        return torch.zeros(shape)
    if isinstance(module, (nn.Linear, nn.Embedding)):
        return torch.empty(shape).normal_(0, STANDARD_DEVIATION, generator=generator)
    raise TypeError(f"{type(module).__name__} does not say how its parameter {name} starts")


def own_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Every parameter and persistent buffer once: its first full name, the module that owns it, its name there."""
    seen: set[int] = set()
    for full_name, module, name, tensor in named_tensors(model):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield full_name, module, name, tensor


def named_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """As `own_tensors`, ties under each of their names."""
    for prefix, module in model.named_modules():
        buffers = [(n, b) for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set]
        for name, tensor in [*module._parameters.items(), *buffers]:
            if tensor is not None:
                yield (f"{prefix}.{name}" if prefix else name), module, name, tensor


def described(model: nn.Module) -> dict[str, str]:
    """Every full name of a parameter or persistent buffer, and its shape, or the first name that it is tied to.

    A dtype or layout is told where it does not convert to the floats of another model.
    """
    result: dict[str, str] = {}
    firsts: dict[int, str] = {}
    for full_name, _, _, tensor in named_tensors(model):
        if (first := firsts.setdefault(id(tensor), full_name)) != full_name:
            result[full_name] = f"tied to {first}"
            continue
        dense = tensor.layout == torch.strided
        kind = tensor.dtype if dense else tensor.layout
        plain = dense and tensor.is_floating_point() and tensor.itemsize > 1
        result[full_name] = f"{tuple(tensor.shape)}" + ("" if plain else f" of {str(kind).removeprefix('torch.')}")
    return result


def materialise(model: nn.Module, seed: int | None, device: torch.device) -> None:
    """Move a model on meta to `device`, ties kept; draw its weights, or leave them empty with `seed=None`.

    Raises UsageError (E604) when the device has no room for them.
    """
    try:
        _fill(model, seed, device)
    except (RuntimeError, MemoryError) as error:
        # torch's allocators raise plain RuntimeErrors; anything else of theirs is not ours to rename
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "alloc" not in str(error):
            raise
        count = sum(tensor.numel() * tensor.element_size() for _, _, _, tensor in own_tensors(model))
        raise fail(
            UsageError,
            "E604",
            f"{device} has no room for the weights: they take {count / 2**30:.1f} GiB",
            remedy="build on meta, and load where there is room",
        ) from None


def _fill(model: nn.Module, seed: int | None, device: torch.device) -> None:
    replaced: dict[int, Tensor] = {}
    with torch.no_grad():
        for full_name, module, name, tensor in list(own_tensors(model)):
            if seed is None:
                value = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            else:
                generator = torch.Generator().manual_seed(seed_of(seed, full_name))
                value = initial_value(module, name, tensor.shape, generator).to(device, tensor.dtype)
                if value.shape != tensor.shape:
                    raise ValueError(f"{full_name} starts as {tuple(value.shape)}, but is {tuple(tensor.shape)}")
            is_parameter = isinstance(tensor, nn.Parameter)
            replaced[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if is_parameter else value
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            table.update({name: replaced[id(tensor)] for name, tensor in table.items() if id(tensor) in replaced})


def tie(first: nn.Module, second: nn.Module) -> None:
    """Make every parameter of `second` the parameter of `first` that has its name."""
    for name, parameter in list(first.named_parameters()):
        *path, last = name.split(".")
        owner = second.get_submodule(".".join(path))
        setattr(owner, last, parameter)


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups for an optimizer: weight decay for matrices; none for norms, biases, A_log, dt_bias and D.

    Embeddings decay, as in nanoGPT and HF's Trainer. Each parameter is in one group, ties once.
    """
    undecayed = ("bias", "A_log", "dt_bias", "D")
    decay: list[Tensor] = []
    rest: list[Tensor] = []
    for full_name, _, name, tensor in own_tensors(model):
        if isinstance(tensor, nn.Parameter):
            is_norm = full_name.rpartition(".")[0].rpartition(".")[2].endswith(("norm", "layernorm"))
            (rest if name in undecayed or tensor.dim() < 2 or is_norm else decay).append(tensor)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
