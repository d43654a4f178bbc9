"""The blocks that Triton compiles: the torch form's function within the budget, whatever the tiles and strides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

pytest.importorskip("triton")

from attncompiler.blocks import convolution, gpu, norm
from attncompiler.blocks.convolution import CausalConv1d, causal_conv1d
from attncompiler.blocks.gpu import Device, takes_triton
from attncompiler.blocks.launching import probe
from attncompiler.blocks.norm import GatedRMSNorm, rms_norm
from attncompiler.blocks.streaming import convolution as streaming
from attncompiler.blocks.streaming import norm as streaming_norm
from attncompiler.testing.budget import judge, oracle
from attncompiler.testing.poison import poisoned

Results = dict[str, Tensor]
Force = Callable[[bool], None]


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Force:
    """Has Triton's form run, or torch's."""

    def to(triton: bool) -> None:
        monkeypatch.setattr(convolution, "streams", lambda *_: triton)
        monkeypatch.setattr(norm, "_streams", lambda *_: triton)

    return to


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def dtype(request: pytest.FixtureRequest, device: str) -> torch.dtype:
    if device == "cpu" and request.param == "bfloat16":
        pytest.skip("the interpreter does not compute it right")
    return getattr(torch, request.param)


def drawn(*shape: int, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def differentiated(call: Callable[..., Tensor], given: Mapping[str, Tensor | None], grad: Tensor) -> Results:
    """The output, and the gradients of all floating inputs that are there."""
    leaves = {
        name: tensor.detach().requires_grad_() if tensor is not None and tensor.is_floating_point() else tensor
        for name, tensor in given.items()
    }
    wanted = [name for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad]
    out = call(**leaves)
    grads = torch.autograd.grad(out, [leaves[name] for name in wanted], grad.to(out.dtype))
    return {"out": out.detach()} | {f"grad {name}": each for name, each in zip(wanted, grads, strict=True)}


def to_double(given: Mapping[str, Tensor | None]) -> dict[str, Any]:
    return {n: t.double() if t is not None and t.is_floating_point() else t for n, t in given.items()}


def check(
    call: Callable[..., Tensor], given: Mapping[str, Tensor | None], grad: Tensor, force: Force, dtype: torch.dtype
) -> None:
    """Triton's form is within the budget, which the torch form in fp64 and in the same dtype say."""
    force(False)
    exact = {name: each.cpu() for name, each in differentiated(call, to_double(given), grad.double()).items()}
    low = differentiated(call, given, grad)
    force(True)
    with poisoned():
        found = differentiated(call, given, grad)
    for name, each in found.items():
        assert each.dtype == low[name].dtype, name
        assert each.shape == low[name].shape, name
    errors = {name: (each.double().cpu() - exact[name]).abs() for name, each in low.items()}
    inputs = {name: each for name, each in given.items() if each is not None}
    verdicts = judge(found, oracle(exact, errors, inputs, dtype))
    assert all(verdict.ok for verdict in verdicts), "\n".join(map(str, verdicts))


# --- the causal convolution -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Convolution:
    """What the convolution is given."""

    T: int
    E: int = 19
    W: int = 4
    B: int = 2
    bias: bool = True
    runs: bool = False
    real: bool = False
    before: bool = False
    parameters: torch.dtype | None = None
    """where they have another dtype than the tokens"""

    def given(self, dtype: torch.dtype, device: str) -> dict[str, Tensor | None]:
        B, T, E, W = self.B, self.T, self.E, self.W
        like: dict[str, Any] = {"dtype": dtype, "device": device}
        held: dict[str, Any] = {"dtype": self.parameters or dtype, "device": device}
        runs = (drawn(B, T, seed=5, **like) > 0.7).long()
        runs[:, :1] = 0
        return {
            "x": drawn(B, T, 2 * E + 3, seed=1, **like)[..., 2 : E + 2],  # as layers do, which split a projection
            "weight": drawn(E, 1, W, seed=2, **held),
            "bias": drawn(E, seed=3, **held) if self.bias else None,
            "runs": runs.cumsum(1) if self.runs else None,
            "real": drawn(B, T, seed=6, **like) < 0.8 if self.real else None,
            "before": drawn(B, E, W - 1, seed=4, **like) if self.before else None,
        }

    def grad(self, dtype: torch.dtype, device: str) -> Tensor:
        """Its gradient's, as that of a part of a wider tensor."""
        return drawn(self.B, self.T, self.E + 5, seed=7, dtype=dtype, device=device)[..., : self.E]


CONVOLUTIONS = [
    Convolution(T=1, before=True),
    Convolution(T=2, before=True, runs=True),
    Convolution(T=8, E=16),
    Convolution(T=9, W=1, B=1),
    Convolution(T=9, W=1, before=True, runs=True, B=1),
    Convolution(T=13, W=2, bias=False),
    Convolution(T=17, runs=True),
    Convolution(T=17, W=3, real=True),
    Convolution(T=23, runs=True, real=True, before=True),
    Convolution(T=11, W=6, runs=True, before=True, B=1),
    Convolution(T=10, parameters=torch.float32),
]


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_the_convolution_is_within_the_budget(case: Convolution, dtype: torch.dtype, device: str, force: Force) -> None:
    check(causal_conv1d, case.given(dtype, device), case.grad(dtype, device), force, dtype)


@pytest.mark.parametrize("tiles", [(1, 1, 32), (8, 1, 32), (2, 16, 32), (4, 4, 64)])
def test_the_convolution_is_the_same_whatever_the_tiles(
    tiles: tuple[int, int, int], device: str, force: Force, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Convolution(T=21, runs=True, real=True, before=True, B=1)
    monkeypatch.setattr(streaming, "tiles_for", lambda *_: streaming.Tiles(*tiles))
    check(causal_conv1d, case.given(torch.float32, device), case.grad(torch.float32, device), force, torch.float32)


def test_a_convolution_of_nothing_is_nothing(device: str, force: Force) -> None:
    for case in (Convolution(T=0), Convolution(T=0, before=True, runs=True), Convolution(T=3, B=0)):
        check(causal_conv1d, case.given(torch.float32, device), case.grad(torch.float32, device), force, torch.float32)


def test_the_convolutions_gradients_are_the_same_every_time(device: str, force: Force) -> None:
    force(True)
    case = Convolution(T=13, B=1)
    given, grad = case.given(torch.float32, device), case.grad(torch.float32, device)
    first, again = (differentiated(causal_conv1d, given, grad) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_convolution_takes_a_gradient_that_is_one_number(device: str, force: Force) -> None:
    case = Convolution(T=9, E=16)
    grad = torch.ones((), device=device).expand(2, 9, 16)
    check(causal_conv1d, case.given(torch.float32, device), grad, force, torch.float32)


def module(device: str) -> CausalConv1d:
    conv = CausalConv1d(8, 4, True).to(device)
    with torch.no_grad():
        for number, parameter in enumerate(conv.parameters()):
            parameter.copy_(drawn(*parameter.shape, seed=number, dtype=torch.float32, device=device))
    return conv


@pytest.mark.parametrize("padded", [False, True])
def test_steps_are_one_call(padded: bool, device: str, force: Force) -> None:
    """Of one token and of several, over the start of a document, and with padding between tokens."""
    conv = module(device)
    x = drawn(2, 9, 8, seed=4, dtype=torch.float32, device=device)
    ids = torch.tensor([[0] * 5 + [1] * 4, [0] * 9], device=device)
    force(False)
    whole, _ = conv(x, None, ids)
    force(True)
    state = torch.zeros(2, 8, 3, device=device)
    for start, stop in ((0, 1), (1, 3), (3, 4), (4, 9)):
        given, mask, segments = x[:, start:stop], None, ids[:, start:stop]
        if padded:
            hole = torch.full_like(given[:, :1], 9.0)
            given = torch.cat([hole, given], 1)
            mask = torch.ones(given.shape[:2], device=device)
            mask[:, 0] = 0
            segments = torch.cat([segments[:, :1], segments], 1)
        y, state = conv(given, mask, segments, {"conv": state})
        torch.testing.assert_close(y[:, int(padded) :], whole[:, start:stop])
    torch.testing.assert_close(state, x[:, 6:].mT)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_convolution_compiles_in_one_graph(backend: str, device: str, force: Force) -> None:
    force(True)
    conv = module(device)
    x = drawn(2, 9, 8, seed=4, dtype=torch.float32, device=device).requires_grad_()
    mask = torch.ones(2, 9, device=device)
    mask[1, 6:] = 0
    ids = torch.tensor([[0] * 5 + [1] * 4, [0] * 9], device=device)
    results = []
    for run in (conv, torch.compile(conv, backend=backend, fullgraph=True)):
        y, _ = run(x, mask, ids)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *conv.parameters()])])
    torch.testing.assert_close(*results)


def test_the_convolution_is_made_again_by_a_checkpoint(device: str, force: Force) -> None:
    force(True)
    conv = module(device)
    x = drawn(2, 9, 8, seed=4, dtype=torch.float32, device=device).requires_grad_()
    kept = torch.autograd.grad(conv(x)[0].square().sum(), [x, *conv.parameters()])
    again = torch.utils.checkpoint.checkpoint(lambda x: conv(x)[0], x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again.square().sum(), [x, *conv.parameters()]), kept)


@pytest.mark.parametrize("triton", [False, True])
def test_the_convolution_is_an_operator_that_torch_can_trace(triton: bool, device: str, force: Force) -> None:
    force(triton)
    for case in (Convolution(T=5, E=3, before=True, runs=True, real=True), Convolution(T=4, E=3, bias=False)):
        given = case.given(torch.float32, device).values()
        torch.library.opcheck(
            causal_conv1d,
            tuple(t.requires_grad_() if t is not None and t.is_floating_point() else t for t in given),
        )


# --- norms ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Norm:
    """What a norm is given. Rows lie as heads of a projection do, or as parts of it."""

    shape: tuple[int, ...]
    groups: int = 1
    gate: bool = False
    first: bool = False
    heads: bool = False
    parameters: torch.dtype | None = None

    def given(self, dtype: torch.dtype, device: str) -> dict[str, Tensor | None]:
        *rows, width = self.shape
        like: dict[str, Any] = {"dtype": dtype, "device": device}
        x = drawn(*rows, width, seed=1, **like)
        if self.heads:
            B, T, H, D = self.shape
            x = drawn(B, T, (H + 2) * D, seed=1, **like)[..., D : (H + 1) * D].unflatten(-1, (H, D))
        wider = drawn(*rows, 2 * width + 8, seed=2, **like)[..., 8 : width + 8]
        weight = drawn(width, seed=3, dtype=self.parameters or dtype, device=device)
        return {"x": x, "weight": weight} | ({"gate": wider} if self.gate else {})

    def grad(self, dtype: torch.dtype, device: str) -> Tensor:
        *rows, width = self.shape
        return drawn(*rows, width + 3, seed=7, dtype=dtype, device=device)[..., :width]

    def __call__(self, x: Tensor, weight: Tensor, gate: Tensor | None = None) -> Tensor:
        if gate is None:
            return rms_norm(x, weight, 1e-5)
        module = GatedRMSNorm(x.shape[-1], 1e-5, self.first, self.groups)
        return torch.func.functional_call(module, {"weight": weight}, (x, gate))


NORMS = [
    Norm((2, 5, 24)),
    Norm((1, 8)),
    Norm((2, 7, 1)),
    Norm((2, 5, 3, 16), heads=True),
    Norm((2, 5, 24), gate=True),
    Norm((2, 5, 24), gate=True, first=True),
    Norm((2, 5, 24), gate=True, groups=3),
    Norm((1, 13, 40), gate=True, first=True, groups=2),
    Norm((2, 5, 24), parameters=torch.float32),
    Norm((2, 5, 24), gate=True, parameters=torch.float32),
    Norm((2, 0, 24)),
    Norm((2, 0, 24), gate=True),
]


@pytest.mark.parametrize("case", NORMS, ids=str)
def test_a_norm_is_within_the_budget(case: Norm, dtype: torch.dtype, device: str, force: Force) -> None:
    check(case, case.given(dtype, device), case.grad(dtype, device), force, dtype)


@pytest.mark.parametrize("tiles", [(1, 32, 1, 4), (8, 32, 2, 4), (2, 64, 15, 4)])
@pytest.mark.parametrize("case", [Norm((3, 5, 24)), Norm((3, 5, 48), gate=True, groups=2)], ids=str)
def test_a_norm_is_the_same_whatever_the_tiles(
    case: Norm, tiles: tuple[int, ...], device: str, force: Force, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming_norm, "tiles_for", lambda *_: streaming_norm.Tiles(*tiles))
    check(case, case.given(torch.float32, device), case.grad(torch.float32, device), force, torch.float32)


def test_rows_that_two_strides_do_not_say_are_copied(device: str, force: Force) -> None:
    x = drawn(4, 3, 2, 5, seed=1, dtype=torch.float32, device=device).permute(2, 1, 0, 3)
    assert streaming_norm.rows(x).ptr.is_contiguous()
    weight = drawn(5, seed=2, dtype=torch.float32, device=device)
    check(Norm(()), {"x": x, "weight": weight}, torch.ones((), device=device).expand(x.shape), force, torch.float32)
    for kept in (x[:, 0], x[:1], drawn(6, 5, seed=1, dtype=torch.float32, device=device)[::2]):
        assert streaming_norm.rows(kept).ptr is kept


@pytest.mark.parametrize("case", [Norm((3, 4)), Norm((2, 6), gate=True, groups=2)], ids=str)
def test_a_norm_has_second_derivatives(case: Norm, device: str, force: Force) -> None:
    """By the torch form: of Triton's own there are none."""
    results = []
    for triton in (False, True):
        force(triton)
        leaves = {name: each.requires_grad_() for name, each in case.given(torch.float32, device).items()}
        grads = torch.autograd.grad(case(**leaves).square().sum(), list(leaves.values()), create_graph=True)
        results.append(torch.autograd.grad(sum(each.square().sum() for each in grads), list(leaves.values())))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_a_norm_gives_gradients_where_they_are_wanted_alone(device: str, force: Force) -> None:
    force(True)
    x = drawn(3, 8, seed=1, dtype=torch.float32, device=device)
    weight = drawn(8, seed=2, dtype=torch.float32, device=device)
    assert not rms_norm(x, weight, 1e-5).requires_grad
    with torch.no_grad():
        assert not rms_norm(x, weight.requires_grad_(), 1e-5).requires_grad
    rms_norm(x, weight, 1e-5).sum().backward()
    assert weight.grad is not None
    out = torch.utils.checkpoint.checkpoint(lambda x: rms_norm(x, weight, 1e-5), x, use_reentrant=False)
    (again,) = torch.autograd.grad(out.sum(), weight)
    torch.testing.assert_close(again, weight.grad)


def test_what_looks_on_sees_torchs_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler, a tracer, a transform, tensors without values, and tangents."""
    monkeypatch.setattr(norm, "takes_triton", lambda *_: True)
    assert norm._streams(True, torch.ones(2, 2))
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(norm._streams(True, x))
        return x

    make_fx(look)(torch.ones(2, 2))
    torch.vmap(look)(torch.ones(2, 2))
    with FakeTensorMode():
        look(torch.ones(2, 2))
    look(torch.ones(2, 2, device="meta"))
    with forward_ad.dual_level():
        look(torch.ones(2, 2))
    assert seen == [False] * 5
    assert not norm._streams(False, torch.ones(2, 2))


def test_norms_compile_in_one_graph(device: str) -> None:
    case = Norm((2, 6), gate=True)
    given, grad = case.given(torch.float32, device), case.grad(torch.float32, device)
    module = GatedRMSNorm(6, 1e-5, groups=2).to(device)

    def call(x: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
        return rms_norm(x, weight, 1e-5) + module(x, gate)

    found = differentiated(torch.compile(call, backend="aot_eager", fullgraph=True), given, grad)
    torch.testing.assert_close(found, differentiated(call, given, grad), rtol=1e-5, atol=1e-5)


# --- where it runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "capability", "runs"),
    [("cuda", (7, 5), False), ("cuda", (8, 0), True), ("cuda", (12, 0), True), ("cpu", (8, 0), False)],
)
def test_triton_runs_on_gpus_that_are_recent_enough(
    kind: str, capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "device_of", lambda _: Device(0, 1, capability))
    monkeypatch.setattr(probe, "failure", lambda _: None)
    assert gpu._compiles.__wrapped__(torch.device(kind)) == runs


def test_where_triton_cannot_compile_torch_computes_and_says_why(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __getitem__(self, grid: object) -> object:
            raise RuntimeError("no C compiler")

    monkeypatch.setattr(gpu, "device_of", lambda _: Device(0, 1, (9, 0)))
    assert probe.failure(torch.device(device)) is None
    monkeypatch.setattr(probe, "one_kernel", Broken())
    why = probe.failure(torch.device(device))
    assert why == "RuntimeError: no C compiler"
    monkeypatch.setattr(probe, "failure", lambda _: why)
    with pytest.warns(RuntimeWarning, match="no C compiler"):
        assert not gpu._compiles.__wrapped__(torch.device("cuda"))


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_torch_runs_elsewhere(place: str) -> None:
    assert not takes_triton(torch.empty(1, device=place))


def test_torch_runs_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_compiles", lambda _: True)
    assert takes_triton(torch.empty(1), torch.empty(1, dtype=torch.bfloat16))
    assert not takes_triton(torch.empty(1, dtype=torch.float64))
    assert not takes_triton(torch.empty(1), torch.empty(1, dtype=torch.float64))
