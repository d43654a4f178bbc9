"""The laws of sequence operators, each as programs that reach the results of one call by other roads.

A law holds for a kernel when every program's results and gradients are within the error budget of the one call's
truth. The laws speak of operators only through what they declare: inputs, axes along the sequence, states.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from attncompiler.mechanisms.case import Case
from attncompiler.testing.conformance import Call, Program, whole

Statement = tuple[Case, tuple[Program, ...]]
"""A call, and programs that must all give its results."""


# --- the laws: what each says of a case, or None where it says nothing; any number `place` picks where to cut ------


def causality(case: Case, place: int) -> Statement | None:
    """Nothing in a causal call depends on a later token."""
    if not case.causal or length(case) == 1:
        return None
    return case, (future_changed(_cut(case, place)),)


def segments(case: Case, place: int) -> Statement | None:
    """Packed segments are as separate calls."""
    if length(case) == 1:
        return None
    cuts = sorted({_cut(case, place), _cut(case, place // 1000)})
    return packed(case, cuts), (whole, in_parts(cuts))


def padding(case: Case, place: int) -> Statement | None:
    """Padding on either side, or on both, is as none."""
    before, after = 1 + place % 20, 1 + place // 20 % 20
    return case, (within_padding(before, after), within_padding(before, 0), within_padding(0, after))


def rows(case: Case, batched: Collection[str]) -> Statement | None:
    """Each sequence of a batch is as alone; `batched` names the inputs that have a batch axis, the first."""
    return (case, (whole, by_row(batched))) if batch(case) > 1 else None


def splitting(case: Case, place: int) -> Statement | None:
    """A causal call may be cut in two where the state is passed on."""
    if not case.causal or length(case) == 1:
        return None
    return case, (split(_cut(case, place)),)


def chunk_size(case: Case) -> Statement | None:
    """The option chunk_size is of speed alone."""
    return case, tuple(with_options(chunk_size=size) for size in (1, 3, 16, 256))


def grouped_heads(case: Case) -> Statement | None:
    """Grouped heads are as heads repeated."""
    grouped = case.tensors["q"].shape[2] != case.tensors["k"].shape[2]
    return (case, (whole, heads_repeated)) if grouped else None


def layout(case: Case) -> Statement | None:
    """Inputs need not be contiguous: slices of a fused projection are not."""
    return case, (with_gaps,)


# --- cases and programs -------------------------------------------------------------------------------------------


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
        parts = [call(bare.slice(start, stop)) for start, stop in pairwise(bounds)]
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


def future_changed(start: int) -> Program:
    """The outputs before token `start` from a call in which every token from there on is another, the rest as it is.

    Of a causal call nothing moves, and later tokens have no gradient from earlier outputs.
    """

    def program(call: Call, case: Case) -> dict[str, Tensor]:
        def change(tensor: Tensor, axis: int) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            kept, later = tensor.narrow(axis, 0, start), tensor.narrow(axis, start, tensor.shape[axis] - start)
            return torch.cat([kept, 1.5 * later.flip(axis)], axis)

        plain, changed, axes = call(case), call(case.map(change)), case.operator.sequence
        rest = length(case) - start

        def join(name: str) -> Tensor:
            before, after = changed[name].narrow(axes[name], 0, start), plain[name].narrow(axes[name], start, rest)
            return torch.cat([before, after], axes[name])

        return {name: join(name) if name in axes else output for name, output in plain.items()}

    return program


def with_options(**changes: Any) -> Program:
    """The call with options changed that must not matter, such as chunk_size."""

    def program(call: Call, case: Case) -> dict[str, Tensor]:
        return call(replace(case, options=case.options.model_copy(update=changes)))

    return program


def with_gaps(call: Call, case: Case) -> dict[str, Tensor]:
    """The call on inputs of which every second element in memory belongs to something else."""
    return call(case.given(**{name: torch.stack([t, t], -1)[..., 0] for name, t in case.tensors.items() if t.dim()}))


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


def _cut(case: Case, place: int) -> int:
    """A token that is not the first."""
    return 1 + place % (length(case) - 1)


def _device(case: Case) -> torch.device:
    return case.tensors[case.operator.inputs[0]].device
