"""What a training step of an emitted model takes: FLOPs by torch's counter, memory by its allocator and autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from attncompiler.emit import CompiledModel
from attncompiler.spec.model import ModelSpec


def batch_of(spec: ModelSpec, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels for `model.loss`."""
    model, generator = spec.model, torch.Generator().manual_seed(0)
    if model.input == "tokens":
        inputs = torch.randint(model.vocab_size or 1, (batch, length), generator=generator)
    else:
        inputs = torch.randn(batch, length, model.hidden_size, generator=generator, dtype=getattr(torch, model.dtype))
    labels = torch.zeros((batch, length) if model.head.kind == "lm" else (batch,), dtype=torch.int64)
    return inputs, labels


def flops(run: Callable[[], object]) -> int:
    """FLOPs of a call, by torch's counter."""
    counter = FlopCounterMode(display=False)
    with counter:
        run()
    return counter.get_total_flops()


def allocated_peak(run: Callable[[], object]) -> int:
    """The most bytes above what was live before that the CPU allocator had handed out at one moment of a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        run()
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


def training_peak(spec: ModelSpec, model: CompiledModel, batch: int, length: int) -> int:
    """Peak bytes of a step of forward, loss, backward and AdamW, when the optimizer's state exists already."""
    inputs, labels = batch_of(spec, batch, length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        model.loss(inputs, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    resting = sum(p.numel() * p.element_size() for p in model.parameters())
    resting += sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values())
    return resting + allocated_peak(step)


def saved_bytes(spec: ModelSpec, model: CompiledModel, batch: int, length: int) -> int:
    """Bytes of the distinct tensors that autograd keeps after a forward with its loss, parameters left out."""
    inputs, labels = batch_of(spec, batch, length)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.loss(inputs, labels)
    assert loss.requires_grad
    return sum(size for place, size in kept.items() if place not in own)
