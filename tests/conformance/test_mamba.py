"""Mamba's own laws: the recurrence, groups, resets and pauses of the state, HF's mixer, first weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hf_layers import assert_same, widened
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attncompiler.errors import InputError
from attncompiler.mechanisms.mamba.layer import MambaMixer
from attncompiler.mechanisms.mamba.mechanism import MambaPolicy, relations
from attncompiler.mechanisms.mamba.op import selective_scan
from attncompiler.runtime.context import Chain, MixerContext

KERNELS = ["chunkwise", "eager"]
SEEDS = st.integers(0, 2**20)


def tensors(seed: int, T: int, B: int = 2, E: int = 6, N: int = 3, groups: int | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shared = (B, T, N) if groups is None else (B, T, groups, N)
    return {
        "u": drawn(B, T, E),
        "dt": drawn(B, T, E),
        "A": -drawn(E, N).exp(),
        "B": drawn(*shared),
        "C": drawn(*shared),
        "D": drawn(E),
        "z": drawn(B, T, E),
        "dt_bias": drawn(E),
    }


def scan(given: dict[str, Tensor], **options: Any) -> Any:
    return selective_scan(**given, **options)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("ids", [None, [[0, 0, 1, 1, 1, 1]]], ids=["one", "packed"])
def test_both_states_are_differentiable(name: str, ids: list[list[int]] | None) -> None:
    """By finite differences, in and out, with groups of B and C, and a second segment that the first is lost to."""
    given = tensors(0, 6, B=1, groups=2)
    state = torch.ones(1, 6, 3, dtype=torch.float64)
    segments = None if ids is None else torch.tensor(ids)

    def both(state: Tensor, *leaves: Tensor) -> tuple[Tensor, Tensor]:
        again = dict(zip(given, leaves, strict=True))
        return scan(again, initial_state=state, return_state=True, segment_ids=segments, kernel=name)

    leaves = [x.requires_grad_() for x in (state, *given.values())]
    assert torch.autograd.gradcheck(both, leaves)
    _, last = both(*leaves)
    (grad,) = torch.autograd.grad(last.sum(), state)
    assert grad.any() == (ids is None)


def number_by_number(given: dict[str, Tensor], b: int, e: int) -> list[float]:
    """Algorithm 2 of the paper for one channel of one sequence, in Python's numbers."""
    x = {name: tensor.tolist() for name, tensor in given.items()}
    state, out = [0.0] * len(x["A"][e]), []
    for t in range(given["u"].shape[1]):
        delta = math.log1p(math.exp(x["dt"][b][t][e] + x["dt_bias"][e]))
        u, z = x["u"][b][t][e], x["z"][b][t][e]
        state = [
            math.exp(delta * a) * h + delta * write * u
            for a, h, write in zip(x["A"][e], state, x["B"][b][t], strict=True)
        ]
        y = sum(h * read for h, read in zip(state, x["C"][b][t], strict=True)) + x["D"][e] * u
        out.append(y * z / (1 + math.exp(-z)))
    return out


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=15)
@given(seed=SEEDS, T=st.integers(1, 80), b=st.integers(0, 1), e=st.integers(0, 5))
def test_each_channel_is_the_papers_recurrence(name: str, seed: int, T: int, b: int, e: int) -> None:
    given = tensors(seed, T)
    expected = torch.tensor(number_by_number(given, b, e), dtype=torch.float64)
    torch.testing.assert_close(scan(given, kernel=name)[b, :, e], expected)


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=15)
@given(seed=SEEDS, T=st.integers(1, 70))
def test_groups_are_the_channels_that_share_b_and_c(name: str, seed: int, T: int) -> None:
    given = {key: x.requires_grad_() for key, x in tensors(seed, T, groups=2).items()}
    whole = scan(given, kernel=name)
    parts = []
    for g in range(2):
        own = {key: x[..., 3 * g : 3 * g + 3] for key, x in given.items() if key in ("u", "dt", "D", "z", "dt_bias")}
        own |= {"A": given["A"][3 * g : 3 * g + 3], "B": given["B"][:, :, g], "C": given["C"][:, :, g]}
        parts.append(scan(own, kernel=name))
    apart = torch.cat(parts, -1)
    torch.testing.assert_close(whole, apart)
    grads = [torch.autograd.grad(out.square().sum(), list(given.values())) for out in (whole, apart)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=20)
@given(seed=SEEDS, T=st.integers(1, 40), data=st.data())
def test_padding_anywhere_is_as_if_it_were_not_there(name: str, seed: int, T: int, data: st.DataObject) -> None:
    """With segments too, whatever ids the padding has: only real tokens can end a segment."""
    real = torch.tensor(data.draw(st.lists(st.booleans(), min_size=T, max_size=T)))
    ids = torch.tensor(sorted(data.draw(st.lists(st.integers(0, 2), min_size=T, max_size=T))))
    given = tensors(seed, T, B=1)
    state = torch.ones(1, 6, 3, dtype=torch.float64)
    noisy = torch.where(real, ids, 7)[None]
    out, last = scan(
        given, initial_state=state, segment_ids=noisy, attention_mask=real[None], return_state=True, kernel=name
    )
    assert (out[:, ~real] == 0).all()
    if real.any():
        kept = {key: x[:, real] if x.dim() > 2 else x for key, x in given.items()}
        expected = scan(kept, initial_state=state, segment_ids=ids[real][None], return_state=True, kernel=name)
        torch.testing.assert_close((out[:, real], last), expected)
    else:
        assert torch.equal(last, state)


@pytest.mark.parametrize("name", KERNELS)
def test_rubbish_in_padding_reaches_nothing(name: str) -> None:
    given = {key: x.float() for key, x in tensors(0, 9).items()}
    mask = torch.ones(2, 9)
    mask[:, 6:] = 0
    for key in ("u", "dt", "B", "C", "z"):
        given[key][:, 6:] = torch.inf
    given = {key: x.requires_grad_() for key, x in given.items()}
    out, state = scan(given, attention_mask=mask, return_state=True, kernel=name)
    grads = torch.autograd.grad(out.sum() + state.sum(), list(given.values()))
    for key, grad in zip(given, grads, strict=True):
        assert grad.isfinite().all(), key
        if grad.dim() > 2:
            assert (grad[:, 6:] == 0).all(), key


@pytest.mark.parametrize("name", KERNELS)
def test_decays_that_end_everything_overflow_nowhere(name: str) -> None:
    given = {key: x.float() for key, x in tensors(0, 50).items()}
    given["dt"] = given["dt"] * 100
    given["A"] = given["A"] * 100
    given = {key: x.requires_grad_() for key, x in given.items()}
    out = scan(given, kernel=name)
    grads = torch.autograd.grad(out.sum(), list(given.values()))
    assert all(x.isfinite().all() for x in (out, *grads))


def test_parameters_are_taken_in_lower_precision_and_never_in_higher() -> None:
    given = {key: x.float() for key, x in tensors(0, 5).items()}
    low = {**given, "D": given["D"].bfloat16()}
    assert torch.equal(scan(low), scan({**given, "D": given["D"].bfloat16().float()}))
    with pytest.raises(InputError, match=r"E402 d must be torch\.float32 or narrower"):
        scan({**given, "D": given["D"].double()})


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"dt": torch.zeros(1, 4, 5)}, "E401"),
        ({"B": torch.zeros(1, 4, 4, 3)}, "E401"),
        ({"C": torch.zeros(1, 4, 2)}, "E401"),
        ({"initial_state": torch.zeros(1, 6, 4)}, "E401"),
        ({"z": torch.zeros(1, 4, 6, dtype=torch.bfloat16)}, "E402"),
        ({"u": torch.zeros(1, 4, 6, dtype=torch.int64)}, "E402"),
        ({"kernel": "fastest"}, "E403"),
    ],
)
def test_bad_arguments_are_refused_by_code(changed: dict[str, Any], code: str) -> None:
    given = {key: x.float() for key, x in tensors(0, 4, B=1).items()}
    with pytest.raises(InputError) as caught:
        selective_scan(**{**given, **changed})
    assert caught.value.diagnostics[0].code == code


def mixer(**options: Any) -> MambaMixer:
    context = MixerContext(
        hidden_size=16,
        layer_index=0,
        num_layers=4,
        max_position_embeddings=64,
        norm_eps=1e-5,
        chain=Chain("layer", ("chunkwise", "eager")),
    )
    made = MambaMixer(MambaPolicy(kind="mamba", **options), context)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in made.modules():
            for name, parameter in module.named_parameters(recurse=False):
                value = module.initial_value(name, generator) if hasattr(module, "initial_value") else None
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4 if value is None else value)
    return made


@pytest.mark.parametrize(
    "options", [{}, {"use_bias": True, "use_conv_bias": False, "conv_kernel": 3, "time_step_rank": 5}]
)
def test_the_layer_is_hfs_mixer(options: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba.modeling_mamba import MambaMixer as HFMixer

    ours = mixer(state_size=4, **options).double()
    theirs = HFMixer(transformers.MambaConfig(hidden_size=16, state_size=4, **options), layer_idx=0).double()
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


def test_jambas_norms_are_where_hf_has_them() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.jamba.modeling_jamba import JambaMambaMixer

    ours = mixer(state_size=4, dt_bc_norm=True).double()
    config = transformers.JambaConfig(
        hidden_size=16, mamba_d_state=4, mamba_dt_rank=1, use_mamba_kernels=False, rms_norm_eps=1e-5
    )
    theirs = JambaMambaMixer(config, layer_idx=0).double()
    theirs.load_state_dict(ours.state_dict())
    hidden = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    with widened():
        expected = theirs(hidden)
    assert_same((ours, theirs), (hidden, hidden), (ours(hidden)[0], expected), None)


def test_first_weights_are_the_published_ones() -> None:
    made = mixer(state_size=4, time_step_floor=0.02)
    torch.testing.assert_close(made.A_log.exp(), torch.arange(1.0, 5.0).expand(32, 4))
    assert (made.D == 1).all()
    steps = nn.functional.softplus(made.dt_proj.bias)
    assert 0.0199 <= steps.min() <= steps.max() <= 0.1001
    assert made.dt_proj.weight.abs().max() <= 1
    constant = mixer(time_step_init_scheme="constant", time_step_scale=2.0, time_step_rank=4)
    assert (constant.dt_proj.weight == 1).all()
    plain, scaled = mixer(rescale_prenorm_residual=False), mixer()
    assert plain.out_proj.initial_value("weight", torch.Generator()) is None
    assert scaled.out_proj.initial_value("weight", torch.Generator()).abs().max() <= 32**-0.5 / 2


def test_a_range_of_time_steps_must_not_be_empty() -> None:
    (fault,) = relations(MambaPolicy(kind="mamba", time_step_min=0.2), None)
    assert (fault.path, fault.code) == (("time_step_min",), "E105")
    assert not list(relations(MambaPolicy(kind="mamba"), None))
    with pytest.raises(ValueError, match="time_step_rank"):
        MambaPolicy(kind="mamba", time_step_rank=0)
