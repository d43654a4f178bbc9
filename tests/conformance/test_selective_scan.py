"""The Triton scan's own laws: where tokens and channels are cut does not matter, and nothing leaks or is swallowed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from attncompiler.blocks.gpu import Device
from attncompiler.mechanisms.mamba.op import selective_scan
from attncompiler.mechanisms.mamba.recurrence import kernel
from attncompiler.mechanisms.mamba.recurrence.kernel import (
    REVERSED,
    SWEPT,
    Groups,
    backward_groups,
    blocks_together,
    forward_groups,
    layout_for,
)

HOPPER = Device(232448, 132, (9, 0))
NAMES = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")


def drawn(T: int, *, B: int = 1, E: int = 6, N: int = 3, G: int = 1, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "u": normal(B, T, E),
        "dt": normal(B, T, E),
        "A": -normal(E, N).exp(),
        "B": normal(B, T, G, N),
        "C": normal(B, T, G, N),
        "D": normal(E),
        "z": normal(B, T, E),
        "dt_bias": normal(E),
        "initial_state": normal(B, E, N),
    }


def results(given: dict[str, Tensor], device: str, name: str, wide: bool = False, **options: Any) -> dict[str, Tensor]:
    """Outputs, and the gradients of a sum of them that weighs each number differently."""
    leaves = {key: (x.double() if wide else x).to(device).detach().requires_grad_() for key, x in given.items()}
    options = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in options.items()}
    out, state = selective_scan(**leaves, return_state=True, kernel=name, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).to(x) for x in (out, state)]
    grads = torch.autograd.grad((out * weights[0]).sum() + (state * weights[1]).sum(), list(leaves.values()))
    return {"out": out, "state": state} | dict(zip(leaves, grads, strict=True))


def agree(given: dict[str, Tensor], device: str, tolerance: float = 3e-5, **options: Any) -> None:
    """Every result as the same scan in fp64 has it, in parts of the largest number of each."""
    found = results(given, device, "triton", **options)
    expected = results(given, device, "eager", wide=True, **options)
    for name, x in expected.items():
        error = (found[name].double() - x).abs().max() / (1 + x.abs().max())
        assert error < tolerance, (name, float(error))


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize(("T", "tokens", "chunk", "many"), [(1, 2, 2, 1), (7, 2, 2, 1), (23, 8, 8, 3), (27, 12, 4, 2)])
def test_where_tokens_and_channels_are_cut_does_not_matter(
    device: str, monkeypatch: pytest.MonkeyPatch, T: int, tokens: int, chunk: int, many: int, segments: bool
) -> None:
    """Groups of a few tokens, one after the other; several blocks of channels in a program, and a last one of fewer."""
    monkeypatch.setattr(kernel, "ROWS", 2)
    monkeypatch.setattr(kernel, "blocks_together", lambda *_: many)
    for name in ("forward_groups", "backward_groups"):
        monkeypatch.setattr(kernel, name, lambda *_: Groups(-(-T // tokens), tokens, chunk))
    ids = (torch.arange(T)[None] >= torch.tensor([[T // 3], [T // 2]])).sum(0)
    agree(drawn(T, E=10, G=2), device, segment_ids=ids[None] if segments else None)


@pytest.mark.parametrize("N", [1, 2, 5, 12, 16, 20, 33, 100, 256])
def test_states_of_any_size(device: str, N: int) -> None:
    agree(drawn(5, E=3, N=N), device)


@pytest.mark.parametrize("options", [{}, {"dt_softplus": False}])
@pytest.mark.parametrize("absent", [(), ("D",), ("z",), ("D", "z", "dt_bias", "initial_state")])
def test_what_is_absent_is_not_missed(device: str, options: dict[str, Any], absent: tuple[str, ...]) -> None:
    inputs = drawn(19, B=2)
    if options:
        inputs["dt"], inputs["dt_bias"] = inputs["dt"].abs(), inputs["dt_bias"].abs()
    agree({name: x for name, x in inputs.items() if name not in absent}, device, **options)


def test_decays_of_0_and_of_1_have_gradients(device: str) -> None:
    """A of 0 keeps a state for ever, steps of 0 too, and large ones leave nothing of it."""
    inputs = drawn(40, E=8)
    inputs["A"][:2] = 0
    inputs["A"][2:4] = -1e4
    inputs["dt"][:, ::3] = -1e4
    inputs["dt"][:, 1::5] = 300
    agree(inputs, device)


def test_small_steps_keep_their_digits(device: str) -> None:
    """Where 1 + exp x is 1 in fp32, log(1 + exp x) is still exp x."""
    dt = torch.linspace(-80, 80, 81).view(1, 1, -1)
    ones = torch.ones(81, 1)
    inputs = {"u": torch.ones_like(dt), "dt": dt, "A": -ones, "B": torch.ones(1, 1, 1), "C": torch.ones(1, 1, 1)}
    state = results(inputs, device, "triton")["state"].double().cpu().flatten()
    expected = torch.nn.functional.softplus(dt.double(), threshold=100).flatten()
    # the exponent itself is a number of fp32
    bound = 4e-7 + dt.flatten().clamp(max=0).abs() * 1.2e-7
    assert ((state / expected - 1).abs() <= bound).all()


def with_grad(x: Tensor, device: str) -> Tensor:
    return x.to(device).requires_grad_()


def documents(device: str, T: int = 40, at: int = 22) -> Tensor:
    return (torch.arange(T, device=device) >= at).long()[None]


def test_a_document_of_large_gradients_leaves_no_trace_in_the_next_or_the_one_before(device: str) -> None:
    ids = documents(device)
    for document in (0, 1):
        leaves = {name: with_grad(x, device) for name, x in drawn(40).items()}
        out = selective_scan(**leaves, segment_ids=ids, kernel="triton")
        assert isinstance(out, Tensor)
        weight = torch.where(ids == document, 1e6, 0.0)[..., None].expand_as(out)
        per_token = {name: leaves[name] for name in ("u", "dt", "B", "C", "z")}
        for name, grad in zip(per_token, torch.autograd.grad(out, list(per_token.values()), weight), strict=True):
            grad = grad.flatten(2)
            assert float(grad[ids == document].abs().max()) > 1, name
            assert float(grad[ids != document].abs().max()) == 0, name


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
@pytest.mark.parametrize("name", ["u", "dt", "B", "C", "z"])
@pytest.mark.parametrize(("token", "where"), [(3, "before"), (30, "behind")])
def test_what_another_document_has_need_not_be_a_number(device: str, name: str, token: int, where: str) -> None:
    """Not even across groups of tokens, nor in the gradients of the tokens themselves."""
    inputs, ids = drawn(40), documents(device)
    inputs[name][:, token] = float("nan")
    leaves = {key: with_grad(x, device) for key, x in inputs.items()}
    out = selective_scan(**leaves, segment_ids=ids, kernel="triton")
    assert isinstance(out, Tensor)
    other = (ids != ids[0, token])[0]
    assert bool(out[:, other].isfinite().all())
    assert bool(out[:, token].isnan().any())
    per_token = [leaves[key] for key in ("u", "dt", "B", "C", "z")]
    for grad in torch.autograd.grad(out.sum(), per_token):
        assert bool(grad[:, other].isfinite().all())


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
@pytest.mark.parametrize("name", NAMES)
def test_nan_is_not_swallowed(device: str, name: str) -> None:
    inputs = drawn(40)
    (inputs[name][:, 17] if inputs[name].shape[1:2] == (40,) else inputs[name])[...] = float("nan")
    out = selective_scan(**{key: x.to(device) for key, x in inputs.items()}, kernel="triton")
    assert isinstance(out, Tensor)
    assert bool(out[:, 17].isnan().all())
    if inputs[name].shape[1:2] == (40,):
        assert bool(out[:, :17].isfinite().all())


def test_rubbish_in_padding_reaches_nothing(device: str) -> None:
    inputs = drawn(21)
    mask = (torch.arange(21) % 4 != 1)[None]
    for name in ("u", "dt", "B", "C", "z"):
        inputs[name][~mask] = float("inf")
    leaves = {name: with_grad(x, device) for name, x in inputs.items()}
    out, state = selective_scan(**leaves, return_state=True, attention_mask=mask.to(device), kernel="triton")
    for grad in (out, *torch.autograd.grad(out.sum() + state.sum(), list(leaves.values()))):
        assert bool(grad.isfinite().all())
        if grad.shape[1:2] == (21,):
            assert not bool(grad[~mask.to(device)].any())


@pytest.mark.slow
def test_many_groups_of_a_long_sequence(device: str) -> None:
    agree(drawn(700, E=5, N=16), device, tolerance=1e-4)


@given(N=st.integers(1, 256), side=st.sampled_from([SWEPT, REVERSED]))
def test_a_warp_has_every_number_once(N: int, side: int) -> None:
    layout = layout_for(HOPPER, N, side)
    assert N <= layout.NO * layout.NI * layout.LN < max(2 * N, 2)
    assert layout.LN * layout.LC == 32
    assert layout.held <= 32 * 16


@given(programs=st.integers(1, 10**5), T=st.integers(1, 2**21), multiprocessors=st.integers(1, 200))
def test_groups_hold_every_token_once(programs: int, T: int, multiprocessors: int) -> None:
    device = Device(2**17, multiprocessors, (9, 0))
    for groups in (forward_groups(device, programs, T), backward_groups(device, programs, T)):
        assert (groups.count - 1) * groups.tokens < T <= groups.count * groups.tokens
        assert groups.tokens % groups.chunk == 0
        assert groups.chunk % kernel.ROWS == 0


@pytest.mark.parametrize(("B", "T", "E"), [(8, 2048, 4096), (1, 131072, 2048), (1, 16384, 4096), (1, 2048, 768)])
def test_programs_fill_a_device_once(B: int, T: int, E: int) -> None:
    """A second round of few programs takes as long as the first."""
    blocks = B * E // layout_for(HOPPER, 16, REVERSED).channels
    programs = blocks * forward_groups(HOPPER, blocks, T).count
    assert 0.7 * kernel.ENOUGH <= programs / HOPPER.multiprocessors <= kernel.WANTED
    slots = B * -(-blocks // B // blocks_together(HOPPER, blocks, T))
    programs = slots * backward_groups(HOPPER, slots, T).count
    assert 0.7 * kernel.RESIDENT <= programs / HOPPER.multiprocessors <= kernel.RESIDENT
