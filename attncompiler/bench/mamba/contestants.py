"""Our kernels of Mamba and Mamba-2, each through the function that users call, or in the layer of emitted modules."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attncompiler import ops
from attncompiler.bench.grid import linear_time, ours
from attncompiler.bench.grid.contestants import AUTO, Call, Contestant
from attncompiler.bench.mamba.inputs import Inputs
from attncompiler.bench.mamba.rows import Mixer, Row
from attncompiler.mechanisms.base import Direction, load_entry
from attncompiler.runtime.context import Chain, MixerContext

EAGER_TOKENS = 256
"""the longest sequence that the references are timed at: their backward of each step is as long as it"""
EPS = 1e-5
"""of a mixer's norms"""


def members(device_type: str, row: Row) -> tuple[Contestant, ...]:
    """A contestant for each kernel of the row's chain that is built, in its mechanism's order."""
    return ours.members(row.mechanism, device_type, {}, member, peers=("mamba_ssm",))


def member(name: str) -> Contestant:
    """Our kernel of that name, or with `AUTO` the one our operator chooses. A step also gives the state after it."""
    return linear_time.member(name, _prepare, EAGER_TOKENS)


def _prepare(inputs: Any, kernel: str) -> Call:
    if isinstance(inputs.row, Mixer):
        return _mixer(inputs, inputs.row, kernel)
    row, given = inputs.row, dict(inputs.tensors)
    first, function = ("u", ops.selective_scan) if row.mechanism == "mamba" else ("x", ops.ssd)
    arguments = [given.pop(name) for name in (first, "dt", "a", "b", "c", "d")]
    run = partial(function, *arguments, **given, kernel=kernel)
    if not row.step:
        return Call(run, inputs.leaves)
    return Call(lambda: run(return_state=True)[0], inputs.leaves)


def _mixer(inputs: Inputs, row: Mixer, kernel: str) -> Call:
    """The layer that an emitted module has, whose site runs that kernel."""
    kernels = planned(inputs) if kernel == AUTO else (kernel,)
    backward = planned(inputs, "backward")[0] if kernel == AUTO else None
    mechanism = ours.mechanism(row.mechanism)
    context = MixerContext(row.M, 0, 1, row.T, EPS, Chain(row.id, kernels, "raise", backward))
    with torch.device("meta"):
        layer = load_entry(mechanism.layer)(mechanism.policy.model_validate(row.fields), context)
    hidden, *parameters = taken(inputs, layer)
    return Call(lambda: layer(hidden)[0], (hidden, *parameters))


def taken(inputs: Inputs, layer: nn.Module) -> tuple[Tensor, ...]:
    """The hidden states and the layer's parameters, which become the row's, of the same memory, in the row's order."""
    weights = dict(inputs.tensors)
    hidden = weights.pop("hidden")
    layer.load_state_dict(weights, assign=True)
    return hidden, *(layer.requires_grad_(inputs.row.backward).get_parameter(name) for name in weights)


def planned(inputs: Inputs, direction: Direction = "forward") -> tuple[str, ...]:
    """The kernels that `kernel="auto"` would try for this row, the first of which it runs."""
    tensors = dict(inputs.tensors)
    if isinstance(inputs.row, Mixer):
        operands = inputs.row.inner.operands
        one = torch.zeros((), dtype=inputs.dtype, device=inputs.device)  # plans ask for no values
        tensors = {
            name: (one.float() if name in operands.wide else one).expand(shape)
            for name, shape in operands.given.items()
        }
    return ours.planned(inputs.row.mechanism, tensors, {}, direction)
