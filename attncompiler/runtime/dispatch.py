"""The walk along a chain: the first kernel that serves the call runs; every refusal and failure is recorded.

This is the one place in the package where a kernel's failure is caught.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attncompiler.blocks.autocast import no_autocast
from attncompiler.errors import InputError, KernelError, fail
from attncompiler.measured import Order, entries, walked
from attncompiler.mechanisms.base import (
    Direction,
    Kernel,
    Mechanism,
    Refusal,
    Request,
    auto_order,
    discover,
    load_entry,
    refusals,
)
from attncompiler.runtime import registry
from attncompiler.runtime.implementation import Implementation, Tensors
from attncompiler.targets.detect import Environment, detect_environment, detect_target
from attncompiler.targets.target import Target

if TYPE_CHECKING:
    from attncompiler.runtime.operator import Operator


class KernelFallbackWarning(UserWarning):
    """A kernel that was planned to run failed, and the next of its chain ran instead."""


@cache
def _machine(device: torch.device) -> tuple[Target, Environment]:
    with torch.cuda.device(device if device.type == "cuda" else -1):  # what is detected is torch's current one
        return detect_target(device.type), detect_environment()


MOST_DECIDED = 4096

Decision = tuple[str, Kernel | None, tuple[Refusal, ...]]
"""a kernel's name, the kernel unless it is not built, and why it does not serve"""
Reason = tuple[str, str | tuple[Refusal, ...]]
"""a kernel's name, and why it did not serve, in words or as what will be put into words"""
_decided: dict[Any, tuple[Decision, ...]] = {}


def _decisions(
    operator: Operator,
    chosen: tuple[str, ...],
    inputs: Tensors,
    options: Any,
    device: torch.device,
    direction: Direction,
) -> tuple[Decision, ...]:
    """What is to be said of each kernel that a call may run on, best first: those `chosen`, or by the mechanism's own
    order. Calls alike in all but values are asked about once: to ask takes longer than to launch a kernel."""
    mechanism = discover()[operator.name]
    alike = tuple((name, tensor.shape, tensor.dtype) for name, tensor in inputs.items())
    key = mechanism, device, chosen, direction, options, alike
    found = _decided.get(key)
    if found is None:
        if len(_decided) >= MOST_DECIDED:
            _decided.clear()
        found = _decided[key] = tuple(_decide(mechanism, operator, chosen, inputs, options, device, direction))
    return found


def _decide(
    mechanism: Mechanism,
    operator: Operator,
    chosen: tuple[str, ...],
    inputs: Tensors,
    options: Any,
    device: torch.device,
    direction: Direction,
) -> Iterator[Decision]:
    request, (target, environment) = operator.request(inputs, options), _machine(device)

    @cache
    def decided(name: str) -> Decision:
        kernel = mechanism.kernel(name)
        return name, kernel, () if kernel is None else refusals(kernel, request, target, environment, direction)

    if chosen:
        yield from map(decided, chosen)
        return
    order = _order(mechanism, request, inputs, options, device, lambda name: _serves(decided(name)))
    yield from map(decided, walked(order.kernels, order.backward, direction))


def _serves(decision: Decision) -> bool:
    _, kernel, refused = decision
    return kernel is not None and not refused


def _order(
    mechanism: Mechanism,
    request: Request,
    inputs: Tensors,
    options: Any,
    device: torch.device,
    serves: Callable[[str], bool],
) -> Order:
    """Of a call that nobody chose kernels for: by what was measured on this machine, or the mechanism's own."""
    known = entries(_machine(device)[0], here=True)
    if mechanism.bucket is None or not known:
        return Order(mechanism.order(device.type, request.features))
    shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
    bucket = partial(mechanism.bucket, shapes, options, request.dtype or "")
    return auto_order(mechanism, device.type, request.features, known, bucket, serves)


def chain(operator: Operator, inputs: Tensors, options: Any, direction: Direction = "forward") -> tuple[str, ...]:
    """The kernels that would serve a call of the operator without a site, the one that is tried first at the head."""
    device = inputs[operator.inputs[0]].device
    decisions = _decisions(operator, options.kernel, inputs, options, device, direction)
    return tuple(decision[0] for decision in decisions if _serves(decision))


def _walk(
    operator: Operator,
    handle: int,
    inputs: Tensors,
    options: Any,
    direction: Direction,
    call: Callable[[Implementation], dict[str, Tensor] | None],
) -> dict[str, Tensor]:
    device = inputs[operator.inputs[0]].device
    site = registry.find(handle)
    reasons: list[Reason] = []
    chosen = options.kernel if site is None else walked(site.chain.kernels, site.chain.backward, direction)
    for name, kernel, refused in _decisions(operator, chosen, inputs, options, device, direction):
        if kernel is None:
            reasons.append((name, "not built in this version"))
            continue
        if refused:
            reasons.append((name, refused))
            if site is not None:
                site.refused(name, direction, refused)
            continue
        results = _attempt(kernel, site, direction, device.type, call, reasons)
        if results is not None:
            return results
    raise fail(
        KernelError,
        "E501",
        f"no kernel could run {operator.name} ({direction}) on {device.type}: "
        + " | ".join(f"{name}: {_words(reason)}" for name, reason in reasons),
        remedy="leave out what is refused, or allow more kernels",
    )


def _words(reason: str | tuple[Refusal, ...]) -> str:
    return reason if isinstance(reason, str) else "; ".join(map(str, reason))


def _attempt(
    kernel: Kernel,
    site: registry.Record | None,
    direction: str,
    device: str,
    call: Callable[[Implementation], dict[str, Tensor] | None],
    reasons: list[Reason],
) -> dict[str, Tensor] | None:
    """The kernel's results, or None when it has no such direction or failed and the chain may go on."""
    cause: str | None = None
    try:
        with no_autocast(device):  # the door has cast; a kernel's fp32 accumulators stay fp32
            results = call(load_entry(kernel.entry))
    except InputError:
        raise  # the caller's fault, which no other kernel mends
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
        reasons.append((kernel.name, f"failed with {cause}"))
        if site is None or site.chain.on_failure == "raise":
            raise
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
    if cause is not None:
        # outside the handler, whose traceback holds what the failed kernel had allocated
        assert site is not None
        site.failed(kernel.name, direction, cause)
        if out_of_memory:
            torch.cuda.empty_cache()
        warnings.warn(
            f"{site.chain.label}: {kernel.name} ({direction}) failed with {cause}; the next kernel of the chain runs",
            KernelFallbackWarning,
            stacklevel=2,
        )
        return None
    if results is None:
        reasons.append((kernel.name, f"has no {direction}"))
    elif site is not None:
        site.ran(kernel.name, direction)
    return results


def forward(operator: Operator, handle: int, inputs: Tensors, options: Any) -> dict[str, Tensor]:
    """Run the operator's forward on the first kernel of the site's chain (or of the options) that serves it.

    Raises KernelError (E501) with every reason when none does.
    """

    def call(implementation: Implementation) -> dict[str, Tensor] | None:
        return implementation.forward(inputs, options) if implementation.forward else None

    return _walk(operator, handle, inputs, options, "forward", call)


def backward(
    operator: Operator, handle: int, grads: Tensors, inputs: Tensors, outputs: Tensors, options: Any
) -> dict[str, Tensor]:
    """Run the operator's backward likewise; the kernel may be another than the one that ran forward."""

    def call(implementation: Implementation) -> dict[str, Tensor] | None:
        return implementation.backward(grads, inputs, outputs, options) if implementation.backward else None

    return _walk(operator, handle, inputs, options, "backward", call)
