"""Weights as safetensors: stored as they are, ties once, and read back in place."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from attncompiler.artifact import layout
from attncompiler.artifact.manifest import DType, Weights, damaged
from attncompiler.emit import CompiledModel
from attncompiler.emit.weights import described, initial_value, own_tensors, seed_of
from attncompiler.errors import ArtifactError, Diagnostic, fail

SHARD_BYTES = 5 * 10**9
"""of weights in one file at most, where a single tensor is not larger"""
FLOATS = {"F64", "F32", "F16", "BF16"}
INTEGERS = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SHOWN = 8
"""keys that a message lists"""


def refuse_others(model: CompiledModel) -> None:
    """Raises ArtifactError (E306) unless the model's weights have the names, shapes, ties and kinds of its emission.

    Nothing else could be loaded again from its spec.
    """
    own, expected = described(model), model.emitted_with
    faults = {
        "its spec does not have": sorted(own.keys() - expected.keys()),
        "are missing": sorted(expected.keys() - own.keys()),
        "are not as its spec has them": [
            f"{name} {own[name]} instead of {expected[name]}"
            for name in sorted(own.keys() & expected.keys())
            if own[name] != expected[name]
        ],
    }
    found = [
        Diagnostic("E306", f"the model cannot be saved: {len(names)} weights {what}: {listed(names)}")
        for what, names in faults.items()
        if names
    ]
    if found:
        raise ArtifactError(found)


def origin(model: nn.Module, seed: int) -> Weights:
    """Whether weights are as the seed gives them, by drawing them again; one that differs makes them trained.

    Raises ArtifactError (E306) for weights that this process does not hold whole.
    """
    own = list(own_tensors(model))
    sharded = [name for name, _, _, tensor in own if hasattr(tensor, "full_tensor")]
    absent = [name for name, _, _, tensor in own if tensor.is_meta]
    if sharded or 0 < len(absent) < len(own):
        which, what = (sharded, "are sharded over processes") if sharded else (absent, "have no storage")
        raise fail(ArtifactError, "E306", f"weights that {what} cannot be stored: {listed(which)}")
    if absent:
        return "none"
    return "initial" if all(_is_initial(seed, *each) for each in own) else "trained"


def _is_initial(seed: int, full_name: str, module: nn.Module, name: str, tensor: Tensor) -> bool:
    generator = torch.Generator().manual_seed(seed_of(seed, full_name))
    value = initial_value(module, name, tensor.shape, generator)
    return torch.equal(value.to(tensor.device, tensor.dtype), tensor.detach())


def dtype_of(model: nn.Module, default: DType) -> DType:
    """The dtype of the floating-point weights; those kept in fp32 do not count where others are in another."""
    found = {tensor.dtype for _, _, _, tensor in own_tensors(model) if tensor.is_floating_point()}
    found = found - {torch.float32} or found
    names: list[DType] = [name for name in get_args(DType) if getattr(torch, name) in found]
    return names[0] if len(names) == 1 else default


def store(model: nn.Module, folder: Path, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Write the weights into one file, or into several of at most `shard_bytes` with HF's index. Raises OSError.

    The files that hold weights, in order.
    """
    shards = list(_shards({name: tensor for name, _, _, tensor in own_tensors(model)}, shard_bytes))
    homes: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = layout.shard(number, len(shards))
        homes |= dict.fromkeys(shard, file)
        try:
            save_file(_on_cpu(shard), folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
    if len(shards) > 1:
        total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(homes.items()))}
        (folder / layout.INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [folder / layout.shard(number, len(shards)) for number in range(1, len(shards) + 1)]


def _shards(tensors: Mapping[str, Tensor], limit: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor contiguous, in storage of its own: safetensors stores no views of one another."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        result[name] = value.clone() if storage in seen else value
        seen.add(storage)
    return result


def fill(model: nn.Module, files: Sequence[Path]) -> None:
    """Copy stored weights into the model's own, in its dtypes, tensor by tensor, so that memory never holds both.

    Raises ArtifactError: E302 for a file that is not safetensors, E306 when names, shapes or kinds of dtype differ from
    the model's, before anything is copied.
    """
    own = {name: tensor for name, _, _, tensor in own_tensors(model)}
    with ExitStack() as stack, torch.no_grad():
        opened = [stack.enter_context(_open(file)) for file in files]
        found = [(key, file) for file in opened for key in file.keys()]  # noqa: SIM118 (not a mapping)
        _compare(own, {key: file.get_slice(key) for key, file in found})
        for key, file in found:
            own[key].copy_(file.get_tensor(key))


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except SafetensorError as error:
        raise damaged(file, str(error)) from None
    except (OSError, RuntimeError) as error:  # torch's own where the file has gone since it was verified
        raise fail(ArtifactError, "E301", f"{file} cannot be read: {error}") from None


def _compare(own: Mapping[str, Tensor], stored: Mapping[str, Any]) -> None:
    common = own.keys() & stored.keys()
    shapes = [
        f"{name} {tuple(stored[name].get_shape())} instead of {tuple(own[name].shape)}"
        for name in sorted(common)
        if tuple(stored[name].get_shape()) != tuple(own[name].shape)
    ]
    dtypes = [
        f"{name} {stored[name].get_dtype()} for {str(own[name].dtype).removeprefix('torch.')}"
        for name in sorted(common)
        if not _fits(stored[name].get_dtype(), own[name].dtype)
    ]
    faults = {
        "weights are missing": sorted(own.keys() - stored.keys()),
        "weights are stored that the spec does not have": sorted(stored.keys() - own.keys()),
        "weights are stored in other shapes": shapes,
        "weights are stored in dtypes that do not convert": dtypes,
    }
    found = [Diagnostic("E306", f"{len(names)} {what}: {listed(names)}") for what, names in faults.items() if names]
    if found:
        raise ArtifactError(found)


def _fits(stored: str, wanted: torch.dtype) -> bool:
    return stored in FLOATS if wanted.is_floating_point else INTEGERS.get(stored) == wanted


def listed(names: Sequence[str]) -> str:
    """Names as a sentence shows them, the first few."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
