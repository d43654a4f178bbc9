"""One torch.library operator per mechanism, all made here.

The operator takes its tensors as one list, all options as one descriptor string, and the handle of the site that
calls it as a 0-dim CPU tensor (a string or int handle would recompile for every layer). Its backward is an operator
of the same form. What is saved between the two is the inputs and the outputs, whatever kernel ran: so a backward may
run on another kernel than its forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from attncompiler.blocks.inference import undisturbed
from attncompiler.blocks.tangents import refuse_tangents
from attncompiler.mechanisms.base import Request, StrictModel, Value
from attncompiler.runtime import dispatch
from attncompiler.runtime.implementation import Tensors

NAMESPACE = "attncompiler"
NO_SITE = 0


def no_site() -> Tensor:
    """The handle of a call that belongs to no site, where torch's dispatcher must see one."""
    return torch.tensor(NO_SITE, dtype=torch.int64, device="cpu")


class OperatorOptions(StrictModel):
    """Options every operator has. A mechanism's op.py adds its own, each a plain value or a frozen model."""

    kernel: tuple[str, ...] = Field(default=(), strict=False)
    """the only kernels allowed, in order, for calls without a site; empty: the mechanism's own order"""
    deterministic: bool = False


@dataclass(frozen=True)
class Operator:
    """A mechanism's operator: names, options, shapes; `__call__` runs it through torch's dispatcher."""

    name: str
    inputs: tuple[str, ...]
    differentiable: tuple[str, ...]
    outputs: tuple[str, ...]
    differentiable_outputs: tuple[str, ...]
    sequence: Mapping[str, int]
    """inputs and outputs that run along the sequence → which axis; every input but these is the same for all tokens"""
    low_precision: tuple[str, ...]
    """floating inputs that come in the model's compute dtype; the other floating inputs are fp32 (fp64 in fp64)"""
    options: type[OperatorOptions]
    fake: Callable[[Tensors, Any], dict[str, Tensor]]
    """(inputs, options) → empty outputs of the right shape, dtype and (contiguous) strides"""
    features: Callable[[Tensors, Any], Mapping[str, Value]]
    """(inputs, options) → what this call asks of a kernel; reads shapes and dtypes, never values"""
    flops: Callable[[Mapping[str, tuple[int, ...]], Any], tuple[int, int]]
    """(shapes, options) → FLOPs forward and backward, for torch.utils.flop_counter"""
    logarithms: tuple[str, ...] = ()
    """outputs that are logarithms of sums over the sequence, which the other results are exponentials of"""

    def __call__(
        self, tensors: Mapping[str, Tensor | None], options: str, handle: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Run on the tensors that are present. `options` is `options_text(...)`, `handle` that of the site which calls,
        None where there is none; works under torch.compile."""
        pairs = [(name, tensors.get(name)) for name in self.inputs]
        given = {name: tensor for name, tensor in pairs if tensor is not None}
        refuse_tangents(self.name, given.values())
        descriptor = ",".join(given) + "|" + options
        if not undisturbed(given.values()):
            run = getattr(getattr(torch.ops, NAMESPACE), self.name)
            results = run(list(given.values()), descriptor, no_site() if handle is None else handle)
        elif torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given.values()):
            results = _Direct.apply(self, descriptor, handle, *given.values())
        else:
            return self.run(given, _parse(self.options, descriptor)[1], handle)
        return dict(zip(self.outputs, results, strict=True))

    def run(self, inputs: Tensors, options: OperatorOptions, handle: Tensor | None) -> dict[str, Tensor]:
        """Every output, from the chain of the site that has this handle; the operator's own body."""
        results = dispatch.forward(self, _number(handle), inputs, options)
        return {name: results[name].contiguous() for name in self.outputs}

    def run_backward(
        self, grads: Tensors, inputs: Tensors, outputs: Tensors, options: OperatorOptions, handle: Tensor | None
    ) -> list[Tensor]:
        """The gradient of every differentiable input that is there, from the same chain."""
        results = dispatch.backward(self, _number(handle), grads, inputs, outputs, options)
        return [results[name].contiguous() for name in self.differentiable if name in inputs]

    def request(self, inputs: Tensors, options: OperatorOptions) -> Request:
        asked = {**self.features(inputs, options), "deterministic": options.deterministic}
        return Request(self.name, asked, str(inputs[self.inputs[0]].dtype).removeprefix("torch."))


def _number(handle: Tensor | None) -> int:
    return NO_SITE if handle is None else int(handle)


@lru_cache(maxsize=4096)
def _parse(options: type[OperatorOptions], descriptor: str) -> tuple[tuple[str, ...], Any]:
    names, _, text = descriptor.partition("|")
    return tuple(names.split(",")), options.model_validate_json(text)


def options_text(options: OperatorOptions) -> str:
    """The options as the text an operator takes: JSON, without the fields that have their default."""
    fields = type(options).model_fields
    return options.model_dump_json(include={name for name in fields if getattr(options, name) != fields[name].default})


def define(operator: Operator) -> Operator:
    """Register `attncompiler::<name>` and `attncompiler::<name>_backward` with torch: fake, autograd, FLOPs."""

    def read(descriptor: str, tensors: list[Tensor]) -> tuple[dict[str, Tensor], Any]:
        names, options = _parse(operator.options, descriptor)
        return dict(zip(names, tensors, strict=True)), options

    def forward(inputs: list[Tensor], descriptor: str, handle: Tensor) -> list[Tensor]:
        named, options = read(descriptor, inputs)
        return list(operator.run(named, options, handle).values())

    def forward_fake(inputs: list[Tensor], descriptor: str, handle: Tensor) -> list[Tensor]:
        named, options = read(descriptor, inputs)
        results = operator.fake(named, options)
        return [results[name] for name in operator.outputs]

    def backward(
        grads: list[Tensor], inputs: list[Tensor], outputs: list[Tensor], descriptor: str, given: str, handle: Tensor
    ) -> list[Tensor]:
        named, options = read(descriptor, inputs)
        return operator.run_backward(
            dict(zip(given.split(","), grads, strict=True)),
            named,
            dict(zip(operator.outputs, outputs, strict=True)),
            options,
            handle,
        )

    def backward_fake(
        grads: list[Tensor], inputs: list[Tensor], outputs: list[Tensor], descriptor: str, given: str, handle: Tensor
    ) -> list[Tensor]:
        named, _ = read(descriptor, inputs)
        return [
            torch.empty_like(named[name], memory_format=torch.contiguous_format)
            for name in operator.differentiable
            if name in named
        ]

    qualified = f"{NAMESPACE}::{operator.name}"
    op = torch.library.custom_op(qualified, forward, mutates_args=())
    op.register_fake(forward_fake)
    op_backward = torch.library.custom_op(f"{qualified}_backward", backward, mutates_args=())
    op_backward.register_fake(backward_fake)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        tensors, descriptor, handle = inputs
        _save(ctx, operator, tensors, output, descriptor, handle)

    def autograd(ctx: Any, grads: list[Tensor | None]) -> tuple[list[Tensor | None], None, None]:
        return _gradients(ctx, operator, grads), None, None

    op.register_autograd(autograd, setup_context=setup_context)
    _register_flops(operator)
    return operator


def _save(
    ctx: Any,
    operator: Operator,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    descriptor: str,
    handle: Tensor | None,
) -> None:
    ctx.descriptor, ctx.count = descriptor, len(inputs)
    ctx.save_for_backward(*inputs, *outputs, handle)
    named = zip(operator.outputs, outputs, strict=True)
    ctx.mark_non_differentiable(*(tensor for name, tensor in named if name not in operator.differentiable_outputs))
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, operator: Operator, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradient of each input, None of one that has none, from what `_save` kept."""
    *saved, handle = ctx.saved_tensors
    inputs, outputs = saved[: ctx.count], saved[ctx.count :]
    names, options = _parse(operator.options, ctx.descriptor)
    present = {
        name: grad
        for name, grad in zip(operator.outputs, grads, strict=True)
        if grad is not None and name in operator.differentiable_outputs
    }
    if not present:
        return [None] * len(names)
    named = dict(zip(names, inputs, strict=True))
    if undisturbed([*present.values(), *saved]) and not torch.is_grad_enabled():
        kept = dict(zip(operator.outputs, outputs, strict=True))
        found = operator.run_backward(present, named, kept, options, handle)
    else:
        run = getattr(getattr(torch.ops, NAMESPACE), f"{operator.name}_backward")
        handle = no_site() if handle is None else handle
        found = run(list(present.values()), inputs, outputs, ctx.descriptor, ",".join(present), handle)
    by_name = dict(zip([name for name in operator.differentiable if name in named], found, strict=True))
    return [by_name.get(name) for name in names]


class _Direct(torch.autograd.Function):
    """The operator in a graph that only autograd records: torch's dispatcher costs more than launching a kernel."""

    @staticmethod
    def forward(
        ctx: Any, operator: Operator, descriptor: str, handle: Tensor | None, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        names, options = _parse(operator.options, descriptor)
        outputs = tuple(operator.run(dict(zip(names, inputs, strict=True)), options, handle).values())
        ctx.operator = operator
        _save(ctx, operator, inputs, outputs, descriptor, handle)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return None, None, None, *_gradients(ctx, ctx.operator, grads)


def _register_flops(operator: Operator) -> None:
    from torch.utils.flop_counter import register_flop_formula

    packet = getattr(torch.ops, NAMESPACE)

    def count(shapes: Any, descriptor: str, direction: int) -> int:
        names, options = _parse(operator.options, descriptor)
        return operator.flops({n: tuple(s) for n, s in zip(names, shapes, strict=True)}, options)[direction]

    @register_flop_formula(getattr(packet, operator.name))
    def _(inputs: Any, descriptor: str, handle: Any, *, out_shape: Any = None, **_: Any) -> int:
        return count(inputs, descriptor, 0)

    @register_flop_formula(getattr(packet, f"{operator.name}_backward"))
    def _(
        grads: Any,
        inputs: Any,
        outputs: Any,
        descriptor: str,
        given: str,
        handle: Any,
        *,
        out_shape: Any = None,
        **_: Any,
    ) -> int:
        return count(inputs, descriptor, 1)
