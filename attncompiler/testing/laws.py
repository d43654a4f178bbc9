"""The laws of sequence operators, as programs that reach the results of one call by another road.

A law holds when the program's results and gradients are within the error budget of the one call's truth. Each speaks
of operators only through what they declare: their inputs, their axes along the sequence, their states.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from attncompiler.mechanisms.case import Case
from attncompiler.testing.conformance import Call, Program


def length(case: Case) -> int:
    """T: the tokens of the case's first input."""
    first = case.operator.inputs[0]
    return case.tensors[first].shape[case.operator.sequence[first]]


def batch(case: Case) -> int:
    """B: the sequences of the case's first input."""
    return case.tensors[case.operator.inputs[0]].shape[0]


def packed(case: Case, cuts: Sequence[int]) -> Case:
    """The case with segments that begin at `cuts`, numbered from 3 down: ids need not rise."""
    begun = torch.arange(length(case))[:, None] >= torch.tensor(cuts)
    ids = 3 - begun.sum(1).expand(batch(case), -1)
    return case.given(segment_ids=ids.contiguous().to(_device(case)))


def in_parts(cuts: Sequence[int]) -> Program:
    """Segments, each in a call of its own: what a packed call must equal."""

    def program(call: Call, case: Case) -> dict[str, Tensor]:
        bare = case.given(segment_ids=None)
        bounds = sorted({0, *cuts, length(case)})
        parts = [call(bare.slice(start, stop)) for start, stop in zip(bounds, bounds[1:], strict=False)]
        return joined(case, parts)

    return program


def split(cut: int) -> Program:
    """The first tokens, then the rest from the state they leave. `cut` is neither 0 nor the length."""

    def program(call: Call, case: Case) -> dict[str, Tensor]:
        first = call(case.slice(0, cut))
        initial = {initial_of(name): state for name, state in first.items() if name.startswith("final_")}
        return joined(case, [first, call(case.slice(cut, length(case)).given(**initial))])

    return program


def initial_of(output: str) -> str:
    """The input that takes up what the output "final_<state>" leaves."""
    return output.replace("final_", "initial_", 1)


def padded(case: Case, before: int, after: int, filling: float = 7.0) -> Case:
    """The case with tokens of padding around it, masked, and full of what must not matter."""

    def pad(tensor: Tensor, axis: int) -> Tensor:
        def block(size: int) -> Tensor:
            shape = (*tensor.shape[:axis], size, *tensor.shape[axis + 1 :])
            return tensor.new_full(shape, filling if tensor.is_floating_point() else 1)

        return torch.cat([block(before), tensor, block(after)], axis)

    mask = torch.ones(batch(case), length(case), dtype=torch.bool, device=_device(case))
    mask = torch.nn.functional.pad(mask, (before, after), value=False)
    return case.given(attention_mask=None).map(pad).given(attention_mask=mask)


def within_padding(before: int, after: int) -> Program:
    """The call on the padded case, read where its tokens are real."""

    def program(call: Call, case: Case) -> dict[str, Tensor]:
        outputs, axes = call(padded(case, before, after)), case.operator.sequence
        return {
            name: output.narrow(axes[name], before, length(case)) if name in axes else output
            for name, output in outputs.items()
        }

    return program


def by_row(batched: Collection[str]) -> Program:
    """Each sequence of the batch in a call of its own; `batched` names the inputs that have a batch axis, the first."""

    def program(call: Call, case: Case) -> dict[str, Tensor]:
        rows = []
        for b in range(batch(case)):
            alone = {name: tensor[b : b + 1] for name, tensor in case.tensors.items() if name in batched}
            rows.append(call(case.given(**alone)))
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    return program


def later_changed(start: int) -> Program:
    """The call with every token from `start` on replaced by another: a causal call's outputs before it stay."""

    def program(call: Call, case: Case) -> dict[str, Tensor]:
        def change(tensor: Tensor, axis: int) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            kept, later = tensor.narrow(axis, 0, start), tensor.narrow(axis, start, tensor.shape[axis] - start)
            return torch.cat([kept, 2.0 - later.flip(axis)], axis)

        return call(case.map(change))

    return program


def before(start: int, case: Case, results: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs along the sequence, up to token `start`."""
    axes, outputs = case.operator.sequence, case.operator.outputs
    return {
        name: tensor.narrow(axes[name], 0, start)
        for name, tensor in results.items()
        if name in outputs and name in axes
    }


def with_options(**changes: Any) -> Program:
    """The call with options changed that must not matter, such as chunk_size."""

    def program(call: Call, case: Case) -> dict[str, Tensor]:
        options = type(case.options).model_validate(case.options.model_dump() | changes)
        return call(Case(case.operator, case.tensors, options, case.causal))

    return program


def heads_repeated(call: Call, case: Case) -> dict[str, Tensor]:
    """Grouped heads as multi-head attention: each head of k and v once for every query head that reads it."""
    group = case.tensors["q"].shape[2] // case.tensors["k"].shape[2]
    return call(case.given(**{name: case.tensors[name].repeat_interleave(group, 2) for name in ("k", "v")}))


def joined(case: Case, parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The outputs of calls on successive tokens as those of one call: states are the last one's."""
    axes = case.operator.sequence
    return {
        name: torch.cat([part[name] for part in parts], axes[name]) if name in axes else parts[-1][name]
        for name in case.operator.outputs
    }


def _device(case: Case) -> torch.device:
    return case.tensors[case.operator.inputs[0]].device
