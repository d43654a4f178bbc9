"""What can be said of fla's and mamba-ssm's kernels without a GPU: refusals, chains, and what they are asked for.

Where the libraries are called stand functions of torch that compute what they are documented to, token by token, and
hold their arguments to what the libraries take.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from attncompiler import spec as specs
from attncompiler import targets
from attncompiler.mechanisms.base import Kernel, Mechanism, discover, load_entry, refusals, version_numbers
from attncompiler.mechanisms.case import Case
from attncompiler.mechanisms.linear_attention.op import OPERATOR as LINEAR
from attncompiler.mechanisms.linear_attention.op import LinearAttentionOptions, linear_attention
from attncompiler.mechanisms.mamba.op import OPERATOR as SCAN
from attncompiler.mechanisms.mamba.op import MambaOptions
from attncompiler.mechanisms.mamba2.mechanism import library_chunk
from attncompiler.mechanisms.mamba2.op import OPERATOR as DUALITY
from attncompiler.mechanisms.mamba2.op import Mamba2Options
from attncompiler.planning import plan
from attncompiler.runtime import dispatch
from attncompiler.runtime.implementation import Implementation, recording
from attncompiler.targets.detect import Environment
from attncompiler.testing.conformance import Trial, cotangents, prepared
from attncompiler.testing.poison import poisoned

FLA, MAMBA, MAMBA2 = ("linear_attention", "fla"), ("mamba", "mamba_ssm"), ("mamba2", "mamba_ssm")
INSTALLED = {"fla": "0.6.0", "mamba_ssm": "2.3.0", "selective_scan_cuda": "2.3.0", "triton": "3.7.1"}


def environment(**packages: str | None) -> Environment:
    """One where everything is installed but what is None here."""
    found = {name: version for name, version in {**INSTALLED, **packages}.items() if version is not None}
    return Environment(found, "3.12", "Linux x86_64")


def parts(which: tuple[str, str]) -> tuple[Mechanism, Kernel]:
    mechanism = discover()[which[0]]
    kernel = mechanism.kernel(which[1])
    assert kernel is not None
    return mechanism, kernel


# --- what stands for fla ----------------------------------------------------------------------------------------------


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor]:
    """fla's; the chunk's sums of decays are what it exponentiates differences of."""
    (B, T, H, K), V = q.shape, v.shape[-1]
    assert q.dtype == k.dtype == v.dtype
    assert K % 2 == V % 2 == 0, "fla refuses the gradient of v"
    assert output_final_state
    assert g_gamma is None
    assert scale is not None
    assert initial_state is None or (initial_state.dtype, initial_state.shape) == (torch.float32, (B, H, K, V))
    state = torch.zeros(B, H, K, V) if initial_state is None else initial_state
    if g is not None:
        assert (g.dtype, g.shape) == (torch.float32, (B, T, H))
        sums = torch.cat([F.pad(each.cumsum(1), (0, 0, 1, 0)) for each in g.split(64, 1)], 1)
        assert sums.isfinite().all(), "differences of infinities are no number"
        assert sums.abs().max() < 2**13, "differences of larger sums are less exact than bf16"
    out = []
    for t in range(T):
        state = state if g is None else g[:, t, :, None, None].exp() * state
        state = state + k[:, t, :, :, None].float() * v[:, t, :, None].float()
        out.append((q[:, t, :, None].float() @ state).squeeze(-2))
    return (scale * torch.stack(out, 1)).to(q.dtype), state


# --- what stands for mamba-ssm ----------------------------------------------------------------------------------------


def stepped(dt: Tensor, bias: Tensor | None, softplus: bool, limit: tuple[float, float] | None) -> Tensor:
    delta = dt.float() if bias is None else dt.float() + bias
    delta = F.softplus(delta, threshold=40) if softplus else delta
    return delta if limit is None else delta.clamp(*limit)


def scanned(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, bias: Any, soft: bool
) -> list[Tensor]:
    """u (B, E, T), A (E, N), B and C (B, G, N, T) → out, [decay, state] (B, E, 1, 2 · N), and what is gated."""
    E, N = A.shape
    step = stepped(delta, None if bias is None else bias[:, None], soft, None)
    groups = [each.float().repeat_interleave(E // each.shape[1], 1) for each in (B, C)]
    state, out = torch.zeros(u.shape[0], E, N), []
    for t in range(u.shape[2]):
        written = (step[..., t] * u[..., t].float())[..., None] * groups[0][..., t]
        state = (step[..., t, None] * A).exp() * state + written
        out.append((state * groups[1][..., t]).sum(-1))
    read = torch.stack(out, 2)
    read = read if D is None else read + D[:, None] * u.float()
    kept = torch.stack([torch.full_like(state, math.nan), state], -1).flatten(2)[:, :, None]
    gated = [] if z is None else [(read * F.silu(z.float())).to(u.dtype)]
    return [read.to(u.dtype), kept, *gated]


class SelectiveScanCuda(ModuleType):
    """Its extension in CUDA."""

    @staticmethod
    def fwd(*given: Any) -> list[Tensor]:
        u, delta, A, B, C, D, z, bias, _ = given
        for each in (u, delta, B, C, z):
            assert each is None or (each.dtype == u.dtype and each.is_contiguous())
        for each in (A, D, bias):
            assert each is None or each.dtype == torch.float32
        with torch.no_grad():
            return scanned(*given)

    @staticmethod
    def bwd(*given: Any) -> list[Tensor | None]:
        (u, _, A, _, _, _, z, _), (above, kept, read, dz, softplus, again) = given[:8], given[8:]
        assert (above.dtype, above.shape) == (u.dtype, u.shape)
        assert above.is_contiguous()
        assert kept.shape == (*u.shape[:2], 1, 2 * A.shape[1])
        assert (read is None) == (z is None)
        assert dz is None
        assert not again
        leaves = {
            name: each.detach().requires_grad_()
            for name, each in zip(("u", "delta", "A", "B", "C", "D", "z", "bias"), given, strict=False)
            if each is not None
        }
        with recording():
            asked = [leaves.get(name) for name in ("u", "delta", "A", "B", "C", "D", "z", "bias")]
            out, _, *gated = scanned(*asked, softplus)  # type: ignore[arg-type]
            found = dict(
                zip(leaves, torch.autograd.grad(gated[0] if gated else out, leaves.values(), above), strict=True)
            )
        order = ("u", "delta", "A", "B", "C", "D", "bias", *(["z"] if z is not None else []))
        return [found.get(name) for name in order]


def dual(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> tuple[Tensor, Tensor | None, None, None, None, Tensor]:
    """mamba-ssm's passes; out, what is gated, the final state at its place."""
    H = x.shape[2]
    assert chunk_size in (64, 128, 256)
    assert all(each.is_contiguous() for each in (x, dt, B, C))
    assert all(each.dtype == x.dtype for each in (dt, B, C))
    step = stepped(dt, dt_bias, dt_softplus, dt_limit)
    wide = [each.float().repeat_interleave(H // each.shape[2], 2) for each in (B, C)]
    state = torch.zeros(*x.shape[::2], x.shape[3], B.shape[3]) if initial_states is None else initial_states.float()
    out, before = [], torch.zeros(x.shape[0], dtype=torch.int32)
    for t in range(x.shape[1]):
        decay = (step[:, t] * A).exp()
        if seq_idx is not None:
            assert seq_idx.dtype == torch.int32
            decay = torch.where((seq_idx[:, t] == before)[:, None], decay, 0)
            before = seq_idx[:, t]
        written = (step[:, t, :, None] * x[:, t].float())[..., None] * wide[0][:, t, :, None]
        state = decay[..., None, None] * state + written
        out.append((state * wide[1][:, t, :, None]).sum(-1))
    read = torch.stack(out, 1)
    read = read if D is None else read + D.reshape(H, -1) * x.float()
    gated = read if z is None else read * F.silu(z.float())
    return gated.to(x.dtype), None if z is None else read.to(x.dtype), None, None, None, state


def dual_backward(
    above: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    out: Tensor,
    chunk_size: int,
    dfinal_states: Tensor | None = None,
    **named: Any,
) -> tuple[Tensor | None, ...]:
    """mamba-ssm's. It gives the initial state's gradient in x's dtype."""
    tensors = {"x": x, "dt": dt, "A": A, "B": B, "C": C} | {
        name: named[name] for name in ("D", "z", "dt_bias", "initial_states") if named[name] is not None
    }
    assert (above.shape, above.dtype) == (out.shape, out.dtype) == (x.shape, x.dtype)
    leaves = {name: each.detach().requires_grad_() for name, each in tensors.items()}
    with recording():
        again, read, _, _, _, final = dual(chunk_size=chunk_size, **{**named, **leaves})
        if read is not None:
            assert torch.equal(out, read), "what was gated, not what came of it"
        results, grads = [again], [above]
        if dfinal_states is not None:
            results, grads = [again, final], [above, dfinal_states]
        found = dict(zip(leaves, torch.autograd.grad(results, leaves.values(), grads, allow_unused=True), strict=True))
    if "initial_states" in found and found["initial_states"] is not None:
        found["initial_states"] = found["initial_states"].to(x.dtype)
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")
    return tuple(
        torch.zeros_like(leaves[name]) if name in leaves and found[name] is None else found.get(name) for name in names
    )


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Any,
    z: Tensor | None,
    dt_bias: Any,
    dt_softplus: bool,
) -> Tensor:
    """mamba-ssm's: the state (B, H, P, N) in place."""
    assert D is not None
    assert dt_bias is not None, "it reads its strides"
    if min(A.shape[1:]) > 1 and A.stride()[1:] == (0, 0):
        assert dt.stride(-1) == dt_bias.stride(-1) == 0, "one for all of a head's channels"
    assert dt.shape == x.shape == (x.shape[0], *D.shape)
    B, C = (each.float().repeat_interleave(x.shape[1] // each.shape[1], 1)[:, :, None] for each in (B, C))
    step = stepped(dt, dt_bias, dt_softplus, None)
    state.copy_((step[..., None] * A).exp() * state + (step * x.float())[..., None] * B)
    out = (state * C).sum(-1) + D * x.float()
    return (out if z is None else out * F.silu(z.float())).to(x.dtype)


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stand-ins where the libraries would be imported from; `asked` counts calls of fla's."""
    counted = SimpleNamespace(asked=0)

    def counting(*given: Any, **named: Any) -> tuple[Tensor, Tensor]:
        counted.asked += 1
        return chunk_simple_gla(*given, **named)

    contents: dict[str, dict[str, Any]] = {
        "fla.ops.simple_gla": {"chunk_simple_gla": counting},
        "mamba_ssm.ops.triton.ssd_combined": {
            "_mamba_chunk_scan_combined_fwd": dual,
            "_mamba_chunk_scan_combined_bwd": dual_backward,
        },
        "mamba_ssm.ops.triton.selective_state_update": {"selective_state_update": selective_state_update},
    }
    for path, functions in contents.items():
        names = path.split(".")
        for depth in range(1, len(names) + 1):
            monkeypatch.setitem(sys.modules, ".".join(names[:depth]), ModuleType(".".join(names[:depth])))
        vars(sys.modules[path]).update(functions)
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", SelectiveScanCuda("selective_scan_cuda"))
    return counted


# --- the functions ----------------------------------------------------------------------------------------------------


INPUTS = {"segment_ids": "segments", "attention_mask": "padding", "initial_state": "initial_state"}
"""input → the feature that a call with it asks for"""


def nearer(which: tuple[str, str], case: Case) -> Case:
    """The case without what the kernel never offers, so that most of what is drawn is served."""
    offered = parts(which)[1].needs.features
    left_out = {name: None for name, feature in INPUTS.items() if name in case.tensors and feature not in offered}
    case = case.given(**left_out)
    if "causal" not in type(case.options).model_fields:
        return case
    return replace(case, options=case.options.model_copy(update={"causal": True}), causal=True)


def served(which: tuple[str, str], case: Case) -> bool:
    """Whether the kernel takes a call like this on an H100, in a dtype that it takes."""
    _, kernel = parts(which)
    request = replace(case.operator.request(case.tensors, case.options), dtype=None)
    return not refusals(kernel, request, targets.get("h100"), environment(), "backward")


def runs(kernel: Kernel) -> Callable[[Case, Any], dict[str, Tensor]]:
    """Both directions of a kernel, as its operator runs them."""
    implementation: Implementation = load_entry(kernel.entry)
    assert implementation.forward is not None
    assert implementation.backward is not None
    forward, backward = implementation.forward, implementation.backward

    def run(case: Case, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad(), poisoned():
            outputs = forward(case.tensors, case.options)
            found = backward(grads, case.tensors, outputs, case.options)
        return outputs | {f"grad {name}": grad for name, grad in found.items()}

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", [FLA, MAMBA, MAMBA2], ids="-".join)
def test_both_directions_are_within_the_budget(
    which: tuple[str, str], dtype: torch.dtype, libraries: Any, for_cases: Any
) -> None:
    """In fp32 the stand-ins lose nothing that would hide a factor, an axis or a state of the wrong sign."""
    mechanism, kernel = parts(which)
    calls: list[set[str]] = []

    def check(case: Case, all_of_them: bool) -> None:
        case = nearer(which, case)
        if not served(which, case):
            return
        only = None if all_of_them else case.operator.differentiable_outputs[:1]
        case = prepared(case, dtype)
        verdicts = Trial(mechanism, case, dtype, only).verdicts(runs(kernel))
        assert all(verdict.ok for verdict in verdicts), "\n".join(map(str, verdicts))
        calls.append(set(case.tensors))

    cases = load_entry(mechanism.cases)
    for_cases(check, st.one_of(cases.draw(), cases.extras()), st.booleans(), share=8)
    assert len(calls) > 3
    assert len(set(map(frozenset, calls))) > 1, "with and without what may be left out"


@pytest.mark.parametrize("which", [FLA, MAMBA, MAMBA2], ids="-".join)
def test_they_are_pure_and_give_what_is_promised(which: tuple[str, str], libraries: Any, for_cases: Any) -> None:
    mechanism, kernel = parts(which)
    implementation: Implementation = load_entry(kernel.entry)

    def storages(tensors: Any) -> set[int]:
        return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}

    def check(case: Case) -> None:
        case = nearer(which, case)
        if not served(which, case):
            return
        case = prepared(case, torch.bfloat16)
        grads = cotangents(case)
        given = [*case.tensors.values(), *grads.values()]
        before = [tensor.clone() for tensor in given]
        assert implementation.forward is not None
        assert implementation.backward is not None
        with torch.no_grad():
            outputs = implementation.forward(case.tensors, case.options)
            found = implementation.backward(grads, case.tensors, outputs, case.options)
        assert all(map(torch.equal, before, given))
        assert not storages(given) & storages(outputs.values())
        assert not storages([*given, *outputs.values()]) & storages(found.values())
        promised = case.operator.fake(case.tensors, case.options)
        assert {name: (each.shape, each.dtype) for name, each in outputs.items()} == {
            name: (each.shape, each.dtype) for name, each in promised.items()
        }
        assert {name: (each.shape, each.dtype) for name, each in found.items()} == {
            name: (case.tensors[name].shape, case.tensors[name].dtype)
            for name in case.operator.differentiable
            if name in case.tensors
        }

    cases = load_entry(mechanism.cases)
    for_cases(check, st.one_of(cases.draw(), cases.extras()), share=5)


def test_a_decay_that_leaves_nothing_is_a_reset(libraries: Any) -> None:
    """As fla would not have it: it subtracts sums of decays. What is between two resets is exact beside them."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 64, 1, 8, generator=generator) for _ in range(3))
    decay = torch.full((1, 64, 1), -0.01)
    for at, value in ((20, -math.inf), (40, -1e30), (50, -1e4)):
        decay[:, at] = value
    run: Implementation = load_entry(parts(FLA)[1].entry)
    assert run.forward is not None
    options = LinearAttentionOptions()
    found = run.forward({"q": q, "k": k, "v": v, "log_decay": decay}, options)["out"]
    for start, end in pairwise((0, 20, 40, 50, 64)):
        rows = slice(start, end)
        cut = {"q": q[:, rows], "k": k[:, rows], "v": v[:, rows], "log_decay": decay[:, rows].clamp(min=-0.01)}
        torch.testing.assert_close(found[:, rows], run.forward(cut, options)["out"])


def test_one_token_of_mamba2_is_an_update_of_its_state(libraries: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """But where a limit of the time steps, or steps without softplus, ask for more than that does."""
    kernel: Implementation = load_entry(parts(MAMBA2)[1].entry)
    assert kernel.forward is not None
    asked: list[str] = []
    for path, name in (("ssd_combined", "_mamba_chunk_scan_combined_fwd"), ("selective_state_update",) * 2):
        module = sys.modules[f"mamba_ssm.ops.triton.{path}"]
        whole = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _it=whole, _of=path, **k: (asked.append(_of), _it(*a, **k))[1])
    inputs = mamba2_inputs(T=1)
    for options, expected in (
        (Mamba2Options(), "selective_state_update"),
        (Mamba2Options(dt_limit=(0.0, 1.0)), "ssd_combined"),
        (Mamba2Options(dt_softplus=False), "ssd_combined"),
    ):
        kernel.forward(inputs, options)
        assert asked.pop() == expected
    kernel.forward(mamba2_inputs(T=2), Mamba2Options())
    assert asked == ["ssd_combined"]


@pytest.mark.parametrize("which", [MAMBA, MAMBA2], ids="-".join)
def test_one_token_behind_a_state_is_the_references(which: tuple[str, str], libraries: Any, for_cases: Any) -> None:
    """Mamba's scan begins with nothing, and its update of a state has no backward: that goes to the next of a chain."""
    mechanism, kernel = parts(which)
    implementation: Implementation = load_entry(kernel.entry)
    calls = []

    def check(case: Case, seed: int) -> None:
        case = nearer(which, case).map(lambda tensor, axis: tensor.narrow(axis, 0, 1).contiguous())
        case = case.given(segment_ids=None)
        shape = case.operator.fake(case.tensors, case.options)["final_state"].shape
        generator = torch.Generator().manual_seed(seed)
        case = case.given(initial_state=torch.randn(shape, generator=generator, dtype=torch.float64))
        case = prepared(case, torch.float32)
        request = replace(case.operator.request(case.tensors, case.options), dtype=None)
        refused = refusals(kernel, request, targets.get("h100"), environment(), "backward")
        assert [str(each) for each in refused] == (
            ["mamba_ssm does not offer initial_state backward: its update of a state has none"]
            if which == MAMBA
            else []
        )
        assert refusals(kernel, request, targets.get("h100"), environment()) == ()
        assert implementation.forward is not None
        before = case.tensors["initial_state"].clone()
        found = implementation.forward(case.tensors, case.options)
        assert torch.equal(before, case.tensors["initial_state"])
        exact = load_entry(mechanism.reference)(prepared(case, torch.float64).tensors, case.options)
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, exact[name].float(), rtol=1e-4, atol=1e-4)
        calls.append(case)

    for_cases(check, load_entry(mechanism.cases).draw(), st.integers(0, 99), share=5)
    assert calls


# --- refusals ---------------------------------------------------------------------------------------------------------


def linear_inputs(T: int = 8, D: int = 64, dtype: torch.dtype = torch.bfloat16, **others: Tensor) -> dict[str, Tensor]:
    return {name: torch.zeros(2, T, 2, D, dtype=dtype, device="meta") for name in "qkv"} | others


def mamba_inputs(T: int = 8, N: int = 16, dtype: torch.dtype = torch.bfloat16, **others: Tensor) -> dict[str, Tensor]:
    steps = {name: torch.zeros(2, T, 4, dtype=dtype) for name in ("u", "dt")}
    groups = {name: torch.zeros(2, T, 1, N, dtype=dtype) for name in ("b", "c")}
    return steps | groups | {"a": torch.zeros(4, N)} | others


def mamba2_inputs(
    T: int = 8, N: int = 16, P: int = 8, B: int = 2, dtype: torch.dtype = torch.bfloat16, **others: Tensor
) -> dict[str, Tensor]:
    device = "meta" if T > 2**16 else "cpu"
    x, dt = torch.zeros(B, T, 4, P, dtype=dtype, device=device), torch.zeros(B, T, 4, dtype=dtype, device=device)
    groups = {name: torch.zeros(B, T, 1, N, dtype=dtype, device=device) for name in ("b", "c")}
    return {"x": x, "dt": dt, **groups, "a": torch.zeros(4)} | others


KINDS: dict[str, tuple[Any, Callable[..., dict[str, Tensor]], type[Any]]] = {
    "linear_attention": (LINEAR, linear_inputs, LinearAttentionOptions),
    "mamba": (SCAN, mamba_inputs, MambaOptions),
    "mamba2": (DUALITY, mamba2_inputs, Mamba2Options),
}


def reasons(
    which: tuple[str, str],
    inputs: dict[str, Any] | None = None,
    target: str = "h100",
    installed: Environment | None = None,
    direction: Any = "forward",
    **options: Any,
) -> list[str]:
    """What a kernel says against a call on that target, where everything is installed."""
    operator, make, kind = KINDS[which[0]]
    request = operator.request(make(**(inputs or {})), kind(**options))
    found = refusals(parts(which)[1], request, targets.get(target), installed or environment(), direction)
    return [str(reason) for reason in found]


SEGMENTS = {"segment_ids": torch.zeros(2, 8, dtype=torch.int64)}
PADDING = {"attention_mask": torch.ones(2, 8, dtype=torch.bool)}
DECAY = {"log_decay": torch.zeros(2, 8, 2)}
REFUSED: list[tuple[tuple[str, str], dict[str, Any], dict[str, Any], str]] = [
    (FLA, {"projection": torch.zeros(9, 64)}, {"feature_map": "favor"}, "favor (only elu, identity, relu): it has no"),
    (FLA, {}, {"causal": False}, "fla does not offer bidirectional: it is causal"),
    (FLA, SEGMENTS, {}, "segments: they need a host read of their lengths"),
    (FLA, PADDING, {}, "padding: it has no mask"),
    (FLA, {}, {"deterministic": True}, "deterministic: its tiles are timed anew in every process"),
    (FLA, {"D": 264}, {}, "width = 264 (at most 256)"),
    (FLA, {"dtype": torch.float16}, {}, "fla does not take float16"),
    (FLA, {"dtype": torch.float32}, {}, "fla does not take float32"),
    (MAMBA, SEGMENTS, {}, "mamba_ssm does not offer segments: its scan has no boundaries"),
    (MAMBA, PADDING, {}, "padding: it has no mask"),
    (MAMBA, {"initial_state": torch.zeros(2, 4, 16)}, {}, "(only before one token): its scan begins with nothing"),
    (MAMBA, {}, {"deterministic": True}, "deterministic: its gradients of A, B and C are added up in any order"),
    (MAMBA, {"N": 257}, {}, "width = 257 (at most 256)"),
    (MAMBA, {"dtype": torch.float32}, {}, "mamba_ssm does not take float32"),
    (MAMBA2, PADDING, {}, "padding: it has no mask"),
    (MAMBA2, {}, {"deterministic": True}, "deterministic: its gradients of A, D and the time steps are added up"),
    (MAMBA2, {"P": 264}, {}, "width = 264 (at most 256)"),
    (MAMBA2, {"dtype": torch.float16}, {}, "mamba_ssm does not take float16"),
    (MAMBA2, {"T": 2**26}, {}, "elements = 8589934592 (at most 2.14748e+09): it counts a tensor's elements in 32 bits"),
]


@pytest.mark.parametrize(("which", "tensors", "options", "said"), REFUSED, ids=lambda value: str(value)[:40])
def test_each_refusal_is_a_sentence(
    which: tuple[str, str], tensors: dict[str, Any], options: dict[str, Any], said: str
) -> None:
    found = reasons(which, tensors, **options)
    assert any(said in reason for reason in found), found


def test_what_they_serve_in_both_directions() -> None:
    state = {"initial_s": torch.zeros(2, 2, 64, 64), "initial_z": torch.zeros(2, 2, 64), "initial_m": torch.zeros(2, 2)}
    for feature_map in ("elu", "relu", "identity"):
        asked = {"feature_map": feature_map, "normalize": feature_map != "identity"}
        assert reasons(FLA, {**DECAY, **state}, direction="backward", **asked) == []
    assert reasons(MAMBA, {"z": torch.zeros(2, 8, 4), "dtype": torch.float16}, direction="backward") == []
    options = {"dt_limit": (0.1, 1.0), "chunk_size": 256}
    more = {**SEGMENTS, "z": torch.zeros(2, 8, 4, 8), "d": torch.zeros(4, 8), "initial_state": torch.zeros(2, 4, 8, 16)}
    assert reasons(MAMBA2, more, direction="backward", **options) == []
    assert reasons(MAMBA2, {"T": 2**23}) == []
    for which in (FLA, MAMBA, MAMBA2):
        assert f"{which[1]} needs compute capability 8.0 or later" in reasons(which, target="t4")
        assert f"{which[1]} needs nvidia hardware, mi300x is amd" in reasons(which, target="mi300x")
        assert f"{which[1]} runs on cuda only" in reasons(which, target="cpu")


@pytest.mark.parametrize(
    ("which", "package", "command"),
    [
        (FLA, "fla", "pip install flash-linear-attention"),
        (MAMBA, "selective_scan_cuda", "MAMBA_KEEP_CUDA_BUILD=TRUE pip install mamba-ssm --no-build-isolation"),
        (MAMBA2, "mamba_ssm", "pip install mamba-ssm --no-build-isolation"),
    ],
    ids=str,
)
def test_a_missing_package_is_named_with_its_command(which: tuple[str, str], package: str, command: str) -> None:
    assert reasons(which, installed=environment(**{package: None})) == [f"{package} is not installed: {command}"]


WRONG = "fla does not offer the call backward with triton {}: on Hopper its gradients are wrong"


@pytest.mark.parametrize(
    ("triton", "wrong"),
    [("3.3.1", False), ("3.4.0", True), ("3.6.0+git12ab", True), ("3.7.0", True), ("3.7.1", False), ("4.0", False)],
)
@pytest.mark.parametrize("asked", ["decay", "no decay"])
def test_flas_backward_is_refused_where_it_is_wrong(triton: str, wrong: bool, asked: str) -> None:
    """By the versions of triton, on Hopper, with decays or without, in the backward alone."""
    installed, given = environment(triton=triton), DECAY if asked == "decay" else None
    found = reasons(FLA, given, installed=installed, direction="backward")
    assert bool(found) == wrong
    assert not wrong or found[0].startswith(WRONG.format(triton))
    assert reasons(FLA, given, installed=installed) == []
    assert reasons(FLA, given, "a100-80", installed, "backward") == []


def test_versions_that_were_not_read_are_refused() -> None:
    said = "does not offer the call with"
    [old] = reasons(FLA, installed=environment(fla="0.5.2"))
    assert old == f"fla {said} fla 0.5.2: only 0.6.0 and later were read; early ones have heads before tokens"
    [older] = reasons(MAMBA2, installed=environment(mamba_ssm="1.2.0"))
    assert older == f"mamba_ssm {said} mamba_ssm 1.2.0: state space duality came with 2.0"


def test_version_numbers() -> None:
    assert [version_numbers(each) for each in ("3.7.1", "3.7", "4.0.0b36", "3.6.0+git1.2", "2.3.0.post1", "x")] == [
        (3, 7, 1),
        (3, 7, 0),
        (4, 0, 0),
        (3, 6, 0),
        (2, 3, 0),
        (0, 0, 0),
    ]


def test_chunks_are_those_that_the_library_has() -> None:
    assert [library_chunk(size) for size in (1, 7, 64, 100, 128, 255, 256, 4096)] == [
        64,
        64,
        64,
        64,
        128,
        128,
        256,
        256,
    ]


# --- chains -----------------------------------------------------------------------------------------------------------

SPEC = """
name: small
model: {{vocab_size: 64, hidden_size: 32, dtype: bfloat16, mlp: {{kind: gated, intermediate_size: 48}},
  head: {{kind: lm, tie_word_embeddings: true}}}}
policies: {{p: {}}}
layers: [{{policy: p}}]
targets: [h100]
"""
POLICIES = {
    FLA: "{kind: linear_attention, num_attention_heads: 2, decay: retention}",
    MAMBA: "{kind: mamba}",
    MAMBA2: "{kind: mamba2, head_dim: 8}",
}


@pytest.mark.parametrize("which", POLICIES, ids="-".join)
def test_a_plan_has_them_behind_triton_where_they_are_installed(which: tuple[str, str]) -> None:
    spec = specs.parse(SPEC.format(POLICIES[which]))
    _, kernel = parts(which)
    *_, package = kernel.needs.packages
    for installed in (None, environment(), environment(triton="3.6.0")):
        assert plan(spec, "h100", installed).layers[0].chain == ("triton", which[1], "chunkwise", "eager")
    layer = plan(spec, "h100", environment(**{package: None})).layers[0]
    assert layer.chain == ("triton", "chunkwise", "eager")
    assert f"{package} is not installed" in str(
        next(each for each in layer.refusals if each.kernel == which[1]).reasons[0]
    )


@pytest.mark.parametrize(("triton", "calls"), [("3.6.0", 1), ("3.7.1", 2)])
def test_a_backward_that_is_refused_goes_on_to_the_next_kernel(
    triton: str, calls: int, libraries: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward is fla's in both; where its backward is wrong, the next kernel's runs on what the forward gave."""
    machine = targets.get("h100"), environment(triton=triton)
    monkeypatch.setattr(dispatch, "_machine", lambda device: machine)
    monkeypatch.setattr(dispatch, "_decided", {})
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(1, 20, 2, 8, generator=generator).bfloat16().requires_grad_() for _ in range(3)]
    decay = (-torch.rand(1, 20, 2, generator=generator)).requires_grad_()
    leaves.append(decay)

    def grads(*kernels: str) -> list[Tensor]:
        out = linear_attention(*leaves[:3], log_decay=decay, kernel=kernels)
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    found = grads("fla", "chunkwise")
    assert libraries.asked == calls
    for each, expected in zip(found, grads("eager"), strict=True):
        torch.testing.assert_close(each, expected, rtol=0.05, atol=0.05)
