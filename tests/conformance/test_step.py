"""One token of every sequence: one launch, which gives what the reference gives in fp64, in any layout."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from attncompiler.blocks.launching.launcher import Launcher
from attncompiler.mechanisms.base import discover, load_entry
from attncompiler.mechanisms.case import Case
from attncompiler.mechanisms.linear_attention.op import LinearAttentionOptions
from attncompiler.mechanisms.mamba.op import MambaOptions
from attncompiler.mechanisms.mamba2.op import Mamba2Options
from attncompiler.testing.conformance import Trial, evaluate, kernel_call, prepared

B = 3
Drawn = tuple[dict[str, Tensor], Any]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def linear(T: int, which: int) -> Drawn:
    H, R, V = [(2, 20, 12), (3, 16, 16), (1, 1, 1), (2, 70, 130), (2, 4, 200)][which % 5]
    tensors = {"q": normal(B, T, H, R), "k": normal(B, T, H, R), "v": normal(B, T, H, V)}
    if which > 0:
        tensors |= {"initial_s": normal(B, H, R, V), "initial_z": normal(B, H, R).abs(), "initial_m": normal(B, H)}
    if which > 1:
        tensors["log_decay"] = -normal(B, T, H).abs() if which % 2 else -normal(H).abs().expand(B, T, H)
    feature_map, normalize = [("elu", True), ("relu", True), ("identity", False), ("elu", False)][which % 4]
    scale, causal = 0.3 if which % 2 else 1.0, "log_decay" in tensors
    return tensors, LinearAttentionOptions(
        feature_map=feature_map, normalize=normalize, scale=scale, causal=causal, eps=1e-2
    )


def mamba(T: int, which: int) -> Drawn:
    E, G, N = [(10, 1, 3), (12, 2, 16), (300, 1, 12), (6, 3, 1), (8, 2, 256)][which % 5]
    tensors = {"u": normal(B, T, E), "dt": normal(B, T, E), "a": -normal(E, N).abs()}
    tensors |= {"b": normal(B, T, G, N), "c": normal(B, T, G, N)}
    if which > 0:
        tensors["initial_state"] = normal(B, E, N)
    if which > 1:
        tensors |= {"d": normal(E), "dt_bias": normal(E), "z": normal(B, T, E)}
    return tensors, MambaOptions(dt_softplus=which != 3)


def mamba2(T: int, which: int) -> Drawn:
    H, G, P, N = [(2, 1, 20, 12), (4, 2, 16, 16), (2, 2, 1, 1), (4, 1, 70, 130), (3, 3, 4, 200)][which % 5]
    tensors = {"x": normal(B, T, H, P), "dt": normal(B, T, H), "a": -normal(H).abs()}
    tensors |= {"b": normal(B, T, G, N), "c": normal(B, T, G, N)}
    if which > 0:
        tensors["initial_state"] = normal(B, H, P, N)
    if which > 1:
        tensors |= {"d": normal(H) if which % 2 else normal(H, P), "dt_bias": normal(H), "z": normal(B, T, H, P)}
    limit = (0.1, 0.8) if which % 2 else (0.0, float("inf"))
    return tensors, Mamba2Options(dt_softplus=which != 3, dt_limit=limit)


DRAWS: dict[str, Callable[[int, int], Drawn]] = {"linear_attention": linear, "mamba": mamba, "mamba2": mamba2}
STATES = {
    "linear_attention": {"initial_s": "final_s", "initial_z": "final_z", "initial_m": "final_m"},
    "mamba": {"initial_state": "final_state"},
    "mamba2": {"initial_state": "final_state"},
}


def drawn(name: str, T: int, which: int, dtype: torch.dtype, device: str) -> Case:
    torch.manual_seed(which)
    tensors, options = DRAWS[name](T, which)
    return prepared(Case(load_entry(discover()[name].operator), tensors, options, causal=True), dtype, device)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were launched, in order."""
    found: list[str] = []
    launch = Launcher.__call__

    def counted(self: Launcher, *arguments: Any, **options: Any) -> None:
        found.append(self.kernel.__name__)
        launch(self, *arguments, **options)

    monkeypatch.setattr(Launcher, "__call__", counted)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("name", DRAWS)
def test_a_step_is_one_launch_within_the_budget(
    name: str, which: int, dtype: torch.dtype, device: str, launched: list[str]
) -> None:
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter does not compute bf16 right")
    case = drawn(name, 1, which, dtype, device)
    if which > 2:
        case = case.given(attention_mask=torch.tensor([[True], [False], [True]], device=device))
        case = case.given(segment_ids=torch.tensor([[1], [0], [7]], device=device))
    kernel_call("triton")(case)
    assert launched == ["step_kernel"]
    mechanism, call = discover()[name], kernel_call("triton")
    gradients = None if (which, dtype) == (4, torch.float32) else ()  # they take the interpreter seconds
    verdicts = Trial(mechanism, case, dtype, gradients).verdicts(partial(evaluate, call))
    assert all(verdict.ok for verdict in verdicts), "\n".join(map(str, verdicts))


@pytest.mark.parametrize("name", DRAWS)
def test_steps_are_one_call_of_all_tokens(name: str, device: str, launched: list[str]) -> None:
    T, call = 5, kernel_call("triton")
    case = drawn(name, T, 4, torch.float32, device)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 0, 1, 0, 0]], dtype=torch.bool, device=device)
    case = case.given(attention_mask=mask)
    whole = call(case)
    assert "step_kernel" not in launched
    sequence, found, states = case.operator.sequence, [], {}
    for t in range(T):
        each = {key: x[:, t : t + 1] if key in sequence else x for key, x in case.tensors.items()} | states
        found.append(call(case.given(**each)))
        states = {initial: found[-1][final] for initial, final in STATES[name].items()}
    assert launched.count("step_kernel") == T
    for key, x in whole.items():
        steps = torch.cat([each[key] for each in found], 1) if key in sequence else found[-1][key]
        torch.testing.assert_close(steps, x, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", DRAWS)
def test_any_layout_is_read_as_it_lies_and_nothing_is_written_to_it(name: str, device: str) -> None:
    case = drawn(name, 1, 4, torch.float32, device)
    call = kernel_call("triton")
    expected = call(case)
    for wider in (False, True):
        # last axis first in memory, or as a part of what is wider
        moved = {key: x.mT.contiguous().mT if x.dim() > 1 else x for key, x in case.tensors.items()}
        if wider:
            moved = {key: torch.cat([x, x], -1)[..., : x.shape[-1]] for key, x in case.tensors.items()}
        kept = {key: x.clone() for key, x in moved.items()}
        found = call(case.given(**moved))
        assert all(torch.equal(found[key], x) for key, x in expected.items())
        assert all(torch.equal(moved[key], x) for key, x in kept.items())
        places = [x.untyped_storage().data_ptr() for x in (*found.values(), *moved.values())]
        assert len(set(places)) == len(places)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
@pytest.mark.parametrize("name", DRAWS)
def test_padding_leaves_a_state_as_it_is_whatever_it_holds(name: str, device: str) -> None:
    """And no more of another token than that token's own NaN is seen."""
    case = drawn(name, 1, 4, torch.float32, device)
    given = {key: x.clone() for key, x in case.tensors.items()}
    for key in case.operator.low_precision:
        given[key][1:] = float("nan")
    given[next(iter(STATES[name]))][1, 0] = float("inf")
    mask = torch.tensor([[True], [False], [True]], device=device)
    found = kernel_call("triton")(case.given(**given, attention_mask=mask))
    assert not bool(found["out"][1].any())
    grown = given["initial_m"].exp()[1] if name == "linear_attention" else None
    for initial, final in STATES[name].items():
        before = given[initial][1]
        if grown is not None:
            before = before * grown.view(-1, *(1,) * (before.dim() - 1)) if initial != "initial_m" else 0 * before
        torch.testing.assert_close(found[final][1], before, atol=1e-6, rtol=1e-6)
        assert bool(found[final][0].isfinite().all())
    assert bool(found["out"][0].isfinite().all())
    assert bool(found["out"][2].isnan().all())
