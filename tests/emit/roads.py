"""One result of a tiny model by two roads, held to the error budget.

The truth is what the plain road gives in fp64, and what may be lost is what the same road loses in fp32. The other
road is judged in fp64, where a fault has nowhere to hide, and its outputs in fp32 too, where it must round no worse.
Outputs and gradients are judged apart, as a loss's gradients are far smaller than its logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache

import torch
from tiny import gradients, spec
from torch import Tensor

from attncompiler.emit import CompiledModel
from attncompiler.pipeline import build
from attncompiler.testing.budget import Verdict, judge, oracle
from attncompiler.testing.capture import enlivened

Results = dict[str, Tensor]
Road = Callable[[CompiledModel], Results]


@cache
def pair(*policies: str, form: str = "") -> tuple[CompiledModel, CompiledModel]:
    """The same model in fp64 and in fp32, of one layer for each policy, with weights under which every part shows."""
    written = spec(*policies, layers=1, model=form)
    wide, single = (build(written, device="cpu", dtype=dtype) for dtype in (torch.float64, torch.float32))
    enlivened(single, 0)
    wide.load_state_dict(single.state_dict())
    return wide, single


def assert_same(models: tuple[CompiledModel, CompiledModel], road: Road, plain: Road) -> None:
    """The road gives what the plain one gives: `out`, and gradients under every other name."""
    exact, low = (as_doubles(plain(model)) for model in models)
    results, rounded = (as_doubles(road(model)) for model in models)
    assert results.keys() == rounded.keys() == exact.keys()
    outputs = exact.keys() & {"out"}
    over = [f"fp64: {each}" for each in over_budget(results, exact, low, outputs)]
    over += [f"fp64: {each}" for each in over_budget(results, exact, low, exact.keys() - outputs)]
    over += [f"fp32: {each}" for each in over_budget(rounded, exact, low, outputs)]
    assert not over, "\n".join(over)


def over_budget(got: Results, exact: Results, low: Results, names: Iterable[str]) -> list[Verdict]:
    """What of the named results is further from the exact ones than the low ones allow."""
    some = sorted(names)
    lost = {name: (low[name] - exact[name]).abs() for name in some}
    truth = oracle({name: exact[name] for name in some}, lost, {}, torch.float32)
    return [verdict for verdict in judge({name: got[name] for name in some}, truth) if not verdict.ok]


def as_doubles(results: Mapping[str, Tensor]) -> Results:
    return {name: tensor.detach().double() for name, tensor in results.items()}


def grads_of(model: CompiledModel, loss: Tensor) -> Results:
    """The gradient of every parameter that the loss depends on."""
    loss.backward()
    return gradients(model)


def stepped(model: CompiledModel, x: Tensor, pieces: list[int], masks: Tensor | None = None) -> Tensor:
    """The logits of steps over pieces of these sizes of x (B, T); masks (B, T) is non-zero for real tokens."""
    state, found, given = model.init_state(x.shape[0], x.shape[1] + 5), [], [None] * len(pieces)
    for piece, mask in zip(x.split(pieces, 1), given if masks is None else masks.split(pieces, 1), strict=True):
        logits, state = model.step(piece, state, mask)
        found.append(logits)
    return torch.cat(found, 1)
