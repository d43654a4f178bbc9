"""Mamba-2's own laws: the recurrence, Mamba as its limit, limits of time steps, resets, HF's mixer, first weights."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_layers import assert_same, widened
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attncompiler.blocks.norm import GatedRMSNorm, rms_norm
from attncompiler.errors import InputError
from attncompiler.mechanisms.case import Case
from attncompiler.mechanisms.mamba2.layer import Mamba2Mixer
from attncompiler.mechanisms.mamba2.mechanism import MECHANISM, Mamba2Policy, relations
from attncompiler.mechanisms.mamba2.op import OPERATOR, Mamba2Options, ssd
from attncompiler.ops import selective_scan
from attncompiler.runtime.context import Chain, MixerContext
from attncompiler.testing.conformance import conforms, kernel_call, prepared

KERNELS = ["chunkwise", "eager"]
SEEDS = st.integers(0, 2**20)


def tensors(seed: int, T: int, B: int = 2, H: int = 4, P: int = 3, G: int = 2, N: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "x": drawn(B, T, H, P),
        "dt": drawn(B, T, H),
        "A": -drawn(H).exp(),
        "B": drawn(B, T, G, N),
        "C": drawn(B, T, G, N),
        "D": drawn(H),
        "z": drawn(B, T, H, P),
        "dt_bias": drawn(H),
    }


def run(given: dict[str, Tensor], **options: Any) -> Any:
    return ssd(**given, **options)


def quadratic(given: dict[str, Tensor], low: float, high: float) -> Tensor:
    """The dual form, equation 16 of the paper: (L ∘ C Bᵀ) (Δ·x), every pair of tokens, skip and gate."""
    B, C = (given[name].repeat_interleave(2, 2) for name in ("B", "C"))
    delta = F.softplus(given["dt"] + given["dt_bias"]).clamp(low, high)
    total = (delta * given["A"]).cumsum(1)
    decay = (total[:, :, None] - total[:, None]).exp()
    seen = torch.ones(decay.shape[1:3]).tril()[:, :, None]
    weights = torch.einsum("bthn,bshn->btsh", C, B) * torch.where(seen > 0, decay, 0)
    out = torch.einsum("btsh,bsh,bshp->bthp", weights, delta, given["x"])
    return (out + given["D"][:, None] * given["x"]) * F.silu(given["z"])


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=20)
@given(
    seed=SEEDS,
    T=st.integers(1, 150),
    chunk=st.sampled_from([1, 5, 16, 64]),
    limit=st.sampled_from([(0.0, math.inf), (0.1, 0.8)]),
)
def test_the_whole_sequence_is_the_dual_form(
    name: str, seed: int, T: int, chunk: int, limit: tuple[float, float]
) -> None:
    given = tensors(seed, T)
    out = run(given, dt_limit=limit, chunk_size=chunk, kernel=name)
    torch.testing.assert_close(out, quadratic(given, *limit))


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=15)
@given(seed=SEEDS, T=st.integers(1, 80))
def test_mamba_with_one_decay_a_head_is_mamba2(name: str, seed: int, T: int) -> None:
    """Outputs, final state and gradients of the two mechanisms agree where they mean the same."""
    given = {key: x.requires_grad_() for key, x in tensors(seed, T).items()}
    state = torch.ones(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    leaves = [*given.values(), state]
    own = run(given, initial_state=state, return_state=True, kernel=name)

    def per_channel(x: Tensor) -> Tensor:
        return x.repeat_interleave(3, -1)

    wide = {"u": given["x"].flatten(2), "z": given["z"].flatten(2), "B": given["B"], "C": given["C"]}
    wide |= {key: per_channel(given[key]) for key in ("dt", "D", "dt_bias")}
    wide["A"] = per_channel(given["A"])[:, None].expand(-1, 5)
    out, last = selective_scan(**wide, initial_state=state.flatten(1, 2), return_state=True)
    other = out.unflatten(2, (4, 3)), last.unflatten(1, (4, 3))
    torch.testing.assert_close(own, other)
    grads = [torch.autograd.grad(sum(x.sin().sum() for x in both), leaves) for both in (own, other)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("ids", [None, [[0, 0, 1, 1, 1, 1]]], ids=["one", "packed"])
def test_both_states_are_differentiable(name: str, ids: list[list[int]] | None) -> None:
    """By finite differences, in and out, with groups, limits, and a second segment that the first state is lost to."""
    given = tensors(0, 6, B=1)
    state = torch.ones(1, 4, 3, 5, dtype=torch.float64)
    options: dict[str, Any] = {"segment_ids": None if ids is None else torch.tensor(ids), "dt_limit": (0.05, 3.0)}

    def both(state: Tensor, *leaves: Tensor) -> tuple[Tensor, Tensor]:
        again = dict(zip(given, leaves, strict=True))
        return run(again, initial_state=state, return_state=True, chunk_size=4, kernel=name, **options)

    leaves = [x.requires_grad_() for x in (state, *given.values())]
    assert torch.autograd.gradcheck(both, leaves)
    _, last = both(*leaves)
    (grad,) = torch.autograd.grad(last.sum(), state)
    assert grad.any() == (ids is None)


@pytest.mark.parametrize("name", KERNELS)
def test_a_skip_per_channel_is_the_same_for_all_when_equal(name: str) -> None:
    given = tensors(0, 9)
    wide = {**given, "D": given["D"][:, None].expand(4, 3).contiguous()}
    torch.testing.assert_close(run(given, kernel=name), run(wide, kernel=name))


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=20)
@given(seed=SEEDS, T=st.integers(1, 40), chunk=st.sampled_from([3, 16]), data=st.data())
def test_padding_anywhere_is_as_if_it_were_not_there(
    name: str, seed: int, T: int, chunk: int, data: st.DataObject
) -> None:
    """With segments too, whatever ids the padding has: only real tokens can end a segment."""
    real = torch.tensor(data.draw(st.lists(st.booleans(), min_size=T, max_size=T)))
    ids = torch.tensor(sorted(data.draw(st.lists(st.integers(0, 2), min_size=T, max_size=T))))
    given = tensors(seed, T, B=1)
    state = torch.ones(1, 4, 3, 5, dtype=torch.float64)
    options: dict[str, Any] = {"initial_state": state, "return_state": True, "chunk_size": chunk, "kernel": name}
    options["dt_limit"] = (0.1, 2.0)
    out, last = run(given, segment_ids=torch.where(real, ids, 7)[None], attention_mask=real[None], **options)
    assert (out[:, ~real] == 0).all()
    if real.any():
        kept = {key: x[:, real] if x.dim() > 2 else x for key, x in given.items()}
        torch.testing.assert_close((out[:, real], last), run(kept, segment_ids=ids[real][None], **options))
    else:
        assert torch.equal(last, state)


@pytest.mark.parametrize("name", KERNELS)
def test_rubbish_in_padding_reaches_nothing(name: str) -> None:
    given = {key: x.float() for key, x in tensors(0, 9).items()}
    mask = torch.ones(2, 9)
    mask[:, 6:] = 0
    for key in ("x", "dt", "B", "C", "z"):
        given[key][:, 6:] = torch.inf
    given = {key: x.requires_grad_() for key, x in given.items()}
    out, state = run(given, attention_mask=mask, return_state=True, kernel=name)
    grads = torch.autograd.grad(out.sum() + state.sum(), list(given.values()))
    for key, grad in zip(given, grads, strict=True):
        assert grad.isfinite().all(), key
        if grad.dim() > 2:
            assert (grad[:, 6:] == 0).all(), key


@pytest.mark.parametrize("name", KERNELS)
def test_decays_that_end_everything_overflow_nowhere(name: str) -> None:
    given = {key: x.float() for key, x in tensors(0, 50).items()}
    given["dt"], given["A"] = given["dt"] * 100, given["A"] * 100
    given = {key: x.requires_grad_() for key, x in given.items()}
    out = run(given, kernel=name)
    grads = torch.autograd.grad(out.sum(), list(given.values()))
    assert all(x.isfinite().all() for x in (out, *grads))


@pytest.mark.parametrize(("N", "P", "more"), [(20, 40, True), (36, 6, False)])
def test_a_state_may_be_several_blocks_of_numbers(N: int, P: int, more: bool, device: str) -> None:
    """On the GPU's kernels, each block with programs of its own: more blocks of P than of N, and fewer."""
    pytest.importorskip("triton")
    given = tensors(3, 40, B=1, H=2, P=P, G=1, N=N)
    case = {{"A": "a", "B": "b", "C": "c", "D": "d"}.get(name, name): tensor for name, tensor in given.items()}
    if more:
        case["segment_ids"] = torch.arange(40)[None] // 23
        case["attention_mask"] = torch.arange(40)[None] != 30
        case["initial_state"] = torch.ones(1, 2, P, N, dtype=torch.float64)
    ready = prepared(Case(OPERATOR, case, Mamba2Options(), causal=True), torch.float32, device)
    verdicts = conforms(MECHANISM, kernel_call("triton"), ready, torch.float32)
    assert all(verdict.ok for verdict in verdicts), "\n".join(map(str, verdicts))


def test_one_strong_decay_does_not_blur_the_weak_ones_behind_it() -> None:
    """Running sums of −10⁵ would leave differences of 0.01 with no digits in fp32."""
    given = {key: x.float() for key, x in tensors(0, 30).items()}
    given["dt"] = torch.full_like(given["dt"], 0.01)
    given["dt"][:, 10] = 1e5
    given["A"] = -torch.ones(4)
    del given["dt_bias"]
    found = run(given, dt_softplus=False, kernel="chunkwise").double()
    exact = run({key: x.double() for key, x in given.items()}, dt_softplus=False, kernel="eager")
    torch.testing.assert_close(found[:, 11:], exact[:, 11:], rtol=1e-4, atol=1e-4 * exact.abs().max().item())


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"dt": torch.zeros(1, 4, 3)}, "E401"),
        ({"B": torch.zeros(1, 4, 3, 5), "C": torch.zeros(1, 4, 3, 5)}, "E401"),
        ({"D": torch.zeros(4, 2)}, "E401"),
        ({"initial_state": torch.zeros(1, 4, 3, 4)}, "E401"),
        ({"z": torch.zeros(1, 4, 4, 3, dtype=torch.bfloat16)}, "E402"),
        ({"dt_bias": torch.zeros(4, dtype=torch.float64)}, "E402"),
        ({"dt_limit": (1.0, 0.5)}, "E403"),
        ({"dt_limit": 3}, "E403"),
        ({"dt_limit": (0.0, math.nan)}, "E403"),
        ({"chunk_size": 0}, "E403"),
        ({"chunk_size": 2.7}, "E403"),
        ({"kernel": "fastest"}, "E403"),
    ],
)
def test_bad_arguments_are_refused_by_code(changed: dict[str, Any], code: str) -> None:
    given = {key: x.float() for key, x in tensors(0, 4, B=1).items()}
    with pytest.raises(InputError) as caught:
        ssd(**{**given, **changed})
    assert caught.value.diagnostics[0].code == code


def mixer(**options: Any) -> Mamba2Mixer:
    context = MixerContext(
        hidden_size=16,
        layer_index=0,
        num_layers=4,
        max_position_embeddings=64,
        norm_eps=1e-5,
        chain=Chain("layer", ("chunkwise", "eager")),
    )
    made = Mamba2Mixer(Mamba2Policy(kind="mamba2", head_dim=4, state_size=6, chunk_size=8, **options), context)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in made.modules():
            for name, parameter in module.named_parameters(recurse=False):
                value = module.initial_value(name, generator) if hasattr(module, "initial_value") else None
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4 if value is None else value)
    return made


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_groups": 2, "time_step_limit": (0.005, 0.05)},
        {"use_bias": True, "use_conv_bias": False, "conv_kernel": 3},
    ],
)
def test_the_layer_is_hfs_mixer(options: dict[str, Any]) -> None:
    # before 5.24 HF's norm ran over all groups at once, unlike mamba-ssm's
    transformers = pytest.importorskip("transformers", minversion="5.24" if "n_groups" in options else None)
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as HFMixer

    ours = mixer(**options).double()
    config = transformers.Mamba2Config(
        hidden_size=16, num_heads=8, head_dim=4, state_size=6, chunk_size=8, **{"n_groups": 1, **options}
    )
    theirs = HFMixer(config, layer_idx=0).double()
    theirs.load_state_dict(ours.state_dict())
    hidden = torch.randn(2, 21, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    left, right = torch.ones(2, 2, 21).unbind(0)
    left[1, :6], right[1, 15:] = 0, 0
    # HF lets the bias of in_proj through padding
    for attention_mask in (None,) if options.get("use_bias") else (None, left, right):
        out = ours(hidden, attention_mask=attention_mask)[0]
        with widened():
            expected = theirs(hidden, attention_mask=attention_mask)
        assert_same((ours, theirs), (hidden, hidden), (out, expected), attention_mask)


def test_without_the_norm_the_scan_gates_and_with_it_first_the_norm_does() -> None:
    hidden = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))
    scanned: dict[str, Tensor] = {}
    for label, options in {"bare": {"rms_norm": False}, "first": {"norm_before_gate": True}}.items():
        made = mixer(**options)
        made.out_proj.register_forward_pre_hook(lambda module, args, label=label: scanned.update({label: args[0]}))
        made(hidden)
    z = made.in_proj(hidden)[..., :32]
    ungated = scanned["bare"] / F.silu(z)
    torch.testing.assert_close(
        scanned["first"], rms_norm(ungated, made.norm.weight, made.norm.eps) * F.silu(z), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("before", [False, True])
def test_groups_of_the_gated_norm_are_norms_apart(before: bool) -> None:
    x, gate = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0)).unbind(0)
    whole = GatedRMSNorm(12, 1e-5, before, groups=3)
    with torch.no_grad():
        whole.weight.copy_(torch.linspace(0.5, 2, 12))
    for g in range(3):
        part = GatedRMSNorm(4, 1e-5, before)
        own = slice(4 * g, 4 * g + 4)
        with torch.no_grad():
            part.weight.copy_(whole.weight[own])
        torch.testing.assert_close(whole(x, gate)[:, own], part(x[:, own], gate[:, own]))


def test_first_weights_are_the_published_ones() -> None:
    made = mixer(time_step_floor=0.02)
    torch.testing.assert_close(made.A_log.exp(), torch.arange(1.0, 9.0))
    assert (made.D == 1).all()
    assert (made.norm.weight == 1).all()
    steps = F.softplus(made.dt_bias)
    assert 0.0199 <= steps.min() <= steps.max() <= 0.1001


@pytest.mark.parametrize(
    ("options", "path", "message"),
    [
        ({"head_dim": 24}, "head_dim", "expand 2 × hidden_size 250 = 500 is not divisible by head_dim 24"),
        ({"head_dim": 50, "num_heads": 8}, "num_heads", "10 heads of head_dim 50, not num_heads 8"),
        ({"head_dim": 50, "n_groups": 4}, "n_groups", "10 heads, which is not divisible by n_groups 4"),
        ({"head_dim": 50, "time_step_min": 0.2}, "time_step_min", "above"),
        ({"head_dim": 50, "time_step_limit": (0.2, 0.1)}, "time_step_limit", "not a range"),
        ({"head_dim": 50, "rms_norm": False, "norm_before_gate": True}, "norm_before_gate", "rms_norm is false"),
        ({"head_dim": 50}, None, ""),
    ],
)
def test_options_that_do_not_fit_are_named(options: dict[str, Any], path: str | None, message: str) -> None:
    policy = Mamba2Policy(kind="mamba2", **options)
    faults = list(relations(policy, SimpleNamespace(hidden_size=250)))
    assert [fault.path for fault in faults] == ([] if path is None else [(path,)])
    assert all(message in fault.message for fault in faults)
