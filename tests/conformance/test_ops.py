"""The operators as functions: under torch.compile and autocast, by kernel name, and at the door."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from attncompiler import ops
from attncompiler.errors import InputError, KernelError
from attncompiler.mechanisms.base import discover
from attncompiler.testing.conformance import dtypes_of

B, T, H, D = 2, 12, 4, 8


def made(*shape: int, positive: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    values = torch.rand(shape, generator=generator) if positive else torch.randn(shape, generator=generator)
    return values.requires_grad_()


def attention_inputs() -> dict[str, Tensor]:
    return {"q": made(B, T, H, D), "k": made(B, T, 2, D), "v": made(B, T, 2, D)}


def linear_attention_inputs() -> dict[str, Tensor]:
    return {"q": made(B, T, H, D), "k": made(B, T, H, D), "v": made(B, T, H, D)}


def linformer_inputs() -> dict[str, Tensor]:
    return linear_attention_inputs() | {"key_projection": made(5, T), "value_projection": made(5, T)}


def selective_scan_inputs() -> dict[str, Tensor]:
    sizes = {"u": made(B, T, 6), "dt": made(B, T, 6), "A": made(6, 4, positive=True).neg().detach().requires_grad_()}
    return sizes | {"B": made(B, T, 4), "C": made(B, T, 4), "D": made(6)}


def ssd_inputs() -> dict[str, Tensor]:
    sizes = {"x": made(B, T, H, D), "dt": made(B, T, H), "A": made(H, positive=True).neg().detach().requires_grad_()}
    return sizes | {"B": made(B, T, 1, 4), "C": made(B, T, 1, 4), "D": made(H)}


CALLS: Mapping[str, Callable[[], dict[str, Tensor]]] = {
    "attention": attention_inputs,
    "linear_attention": linear_attention_inputs,
    "linformer": linformer_inputs,
    "selective_scan": selective_scan_inputs,
    "ssd": ssd_inputs,
}


@pytest.fixture(params=sorted(CALLS))
def call(request: pytest.FixtureRequest, device: str) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    tensors = {name: t.detach().to(device).requires_grad_() for name, t in CALLS[request.param]().items()}
    return getattr(ops, request.param), tensors


def results(function: Callable[..., Any], tensors: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """The output, and the gradient of every tensor."""
    out = function(**tensors, **options)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), list(tensors.values()))]


def kernels() -> list[tuple[str, str]]:
    return [
        (mechanism.function.partition(":")[2], kernel.name)
        for mechanism in discover().values()
        for kernel in mechanism.kernels
        if "float32" in dtypes_of(kernel, "cpu")
    ]


@pytest.mark.parametrize("filling", [math.nan, math.inf, -1e30])
@pytest.mark.parametrize(("name", "by"), kernels())
def test_what_padding_holds_does_not_matter(name: str, by: str, filling: float) -> None:
    """Not even what is no number, which 0 times anything does not silence: in no output and no gradient."""
    function, given = getattr(ops, name), CALLS[name]()
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, :3] = mask[1, 9:] = False
    found = []
    for held in (0.5, filling):
        tensors = {
            key: (t.detach().masked_fill(~mask.view(B, T, *[1] * (t.dim() - 2)), held) if t.shape[:2] == (B, T) else t)
            for key, t in given.items()
        }
        leaves = {key: t.detach().requires_grad_() for key, t in tensors.items()}
        found.append(results(function, leaves, attention_mask=mask, kernel=by))
    for clean, filled in zip(*found, strict=True):
        torch.testing.assert_close(clean, filled, rtol=0, atol=0)
    assert not found[1][0][~mask].any()


@pytest.mark.parametrize("name", sorted(CALLS))
def test_forward_mode_is_refused_and_not_zero(name: str) -> None:
    function, given = getattr(ops, name), {key: t.detach() for key, t in CALLS[name]().items()}
    first = next(iter(given))
    with pytest.raises(InputError, match=r"E403 .* no forward-mode derivative"):
        torch.func.jvp(lambda t: function(**{**given, first: t}), (given[first],), (given[first],))


def test_a_scale_that_is_not_positive_means_the_same_to_every_kernel() -> None:
    """torch's own causal mask is scaled with the scores."""
    given = attention_inputs()
    for scale in (-0.5, 0.0):
        exact = results(ops.attention, given, scale=scale, kernel="eager")
        for kernel in ("sdpa", "chunkwise", "auto"):
            for got, expected in zip(results(ops.attention, given, scale=scale, kernel=kernel), exact, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_positions_are_numbers_whatever_their_dtype() -> None:
    q = made(B, T, H, D)
    positions = torch.arange(T).expand(B, T)
    window = {"kind": "sliding_window", "window": 2, "causal": False}
    given = {"pattern": window, "q_positions": positions, "kv_positions": positions}
    exact = ops.attention(q, q, q, **given)
    for dtype in (torch.uint8, torch.int32):
        narrow = {**given, "q_positions": positions.to(dtype), "kv_positions": positions.to(dtype)}
        for kernel in ("sdpa", "chunkwise", "eager"):
            torch.testing.assert_close(ops.attention(q, q, q, kernel=kernel, **narrow), exact, rtol=1e-4, atol=1e-5)


def test_every_mechanism_is_a_public_function() -> None:
    assert sorted([*CALLS, "block_lists"]) == ops.__all__
    assert len(CALLS) == len(discover())


def test_gradients_reach_every_tensor(call: tuple[Callable[..., Any], dict[str, Tensor]]) -> None:
    function, tensors = call
    for grad in results(function, tensors):
        assert grad.isfinite().all()
        assert grad.any()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_into_one_graph(call: tuple[Callable[..., Any], dict[str, Tensor]], backend: str) -> None:
    function, tensors = call
    torch.compiler.reset()
    compiled = torch.compile(lambda **given: function(**given) * 2, fullgraph=True, backend=backend)
    eager = results(lambda **given: function(**given) * 2, tensors)
    for ours, theirs in zip(results(compiled, tensors), eager, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_eager_is_a_choice_and_agrees(call: tuple[Callable[..., Any], dict[str, Tensor]]) -> None:
    function, tensors = call
    chosen = results(function, tensors, kernel="eager")
    for ours, reference in zip(results(function, tensors), chosen, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)
    for ours, reference in zip(results(function, tensors, kernel=["eager"]), chosen, strict=True):
        assert torch.equal(ours, reference)


def test_an_unknown_kernel_is_an_error(call: tuple[Callable[..., Any], dict[str, Tensor]]) -> None:
    function, tensors = call
    with pytest.raises(InputError, match=r"E403 unknown kernel 'quick'.*eager"):
        function(**tensors, kernel="quick")
    with pytest.raises(InputError, match="E403"):
        function(**tensors, kernel=[])


def test_a_kernel_that_is_not_built_refuses_in_words(call: tuple[Callable[..., Any], dict[str, Tensor]]) -> None:
    function, tensors = call
    with pytest.raises(KernelError, match=r"E501 .*host: not built in this version"):
        function(**tensors, kernel="host")


def test_shapes_are_checked_at_the_door(call: tuple[Callable[..., Any], dict[str, Tensor]]) -> None:
    """An axis too many in any input, or one head or channel too many in the first, is an error with a code."""
    function, tensors = call
    for name, tensor in tensors.items():
        with pytest.raises(InputError, match="E401"):
            function(**tensors | {name: tensor[None]})
    first = next(iter(tensors))
    wider = torch.cat([tensors[first], tensors[first][:, :, :1]], 2)
    with pytest.raises(InputError, match="E401"):
        function(**tensors | {first: wider})


def test_dtypes_are_checked_at_the_door(call: tuple[Callable[..., Any], dict[str, Tensor]]) -> None:
    function, tensors = call
    first = next(iter(tensors))
    with pytest.raises(InputError, match="E402"):
        function(**tensors | {first: tensors[first].to(torch.int64)})


def test_what_is_empty_is_refused(call: tuple[Callable[..., Any], dict[str, Tensor]]) -> None:
    """torch's own kernel divides by the length, and takes the process with it."""
    function, given = call
    for start, stop in ((0, 0), (T, T)):
        cut = {name: t[:, start:stop] if t.dim() > 1 and t.shape[:2] == (B, T) else t for name, t in given.items()}
        with pytest.raises(InputError, match=r"E401 .* is empty: T = 0"):
            function(**cut)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"softcap": 0.0}, "E403 softcap must be above 0"),
        ({"scale": math.nan}, "E403 scale must be a finite number"),
        ({"scale": "a"}, "E403 scale must be a finite number"),
        ({"layer": 1.5}, "E403 layer must be a whole number"),
        ({"layer": -1}, "E403 layer must be a whole number"),
        ({"dropout": 1.0}, "E403 dropout must be at least 0 and below 1"),
        ({"dropout_seed": torch.tensor(1)}, "E403 dropout_seed needs dropout"),
        ({"kernel": None}, "E403 kernel must be"),
        ({"segment_ids": torch.zeros(B, T)}, "E402 segment_ids must be whole numbers"),
    ],
)
def test_arguments_that_would_mean_nothing_are_refused(arguments: dict[str, Any], message: str) -> None:
    q = made(B, T, H, D)
    with pytest.raises(InputError, match=message):
        ops.attention(q, q, q, **arguments)


def test_whole_numbers_are_refused_under_autocast_too() -> None:
    q = torch.ones(B, T, H, D, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(InputError, match="E402"):
        ops.attention(q, q, q)


def test_signatures_share_their_options(call: tuple[Callable[..., Any], dict[str, Tensor]]) -> None:
    function, _ = call
    parameters = inspect.signature(function).parameters
    assert parameters["kernel"].default == "auto"
    assert parameters["attention_mask"].default is None
    assert function.__doc__ is not None
    assert "Raises InputError" in function.__doc__


@pytest.mark.parametrize("name", ["attention", "linear_attention", "linformer"])
def test_autocast_lowers_attention(name: str, device: str) -> None:
    """In the caller's autocast the matrix products run in its dtype; gradients come back in the tensors' own."""
    function = getattr(ops, name)
    tensors = {key: t.detach().to(device).requires_grad_() for key, t in CALLS[name]().items()}
    with torch.autocast(device, dtype=torch.bfloat16):
        lowered = results(function, tensors)
    lower = {key: t.detach().to(torch.bfloat16).requires_grad_() for key, t in tensors.items()}
    assert lowered[0].dtype == torch.bfloat16
    for ours, expected in zip(lowered, results(function, lower), strict=True):
        assert torch.equal(ours.to(torch.bfloat16), expected)
    assert all(grad.dtype == torch.float32 for grad in lowered[1:])


@pytest.mark.parametrize("name", ["selective_scan", "ssd"])
def test_autocast_keeps_the_recurrence_in_fp32(name: str, device: str) -> None:
    """A, dt_bias and states lose too much in a low dtype: their gradients are those of fp32 tensors."""
    tensors = {key: t.detach().to(device).requires_grad_() for key, t in CALLS[name]().items()}
    with torch.autocast(device, dtype=torch.bfloat16):
        lowered = results(getattr(ops, name), tensors)
    assert all(grad.dtype == torch.float32 for grad in lowered[1:])
    for ours, exact in zip(lowered, results(getattr(ops, name), tensors), strict=True):
        torch.testing.assert_close(ours.float(), exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))
