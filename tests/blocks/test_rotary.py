"""Rotary: pairs and angles by their formula, frequencies and forms by transformers', lengths by each sequence."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from attncompiler.blocks.positions import sequence_lengths
from attncompiler.blocks.rotary import Rotary, attention_factor, frequencies, stretched
from attncompiler.mechanisms.rope import ROPE_OPTIONS, RopeParameters, rope_faults, rotary_width_faults

SINGLE = torch.float32
MAX = 96
"""max_position_embeddings of the models here"""
FAMILY: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 2.0, "original_max_position_embeddings": 8},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
"""options for each rope_type"""


def test_every_rope_type_is_among_these() -> None:
    assert FAMILY.keys() == ROPE_OPTIONS.keys()


def made(head_dim: int, rope_type: str = "default", **options: Any) -> Rotary:
    return Rotary(head_dim, RopeParameters(rope_type=rope_type, **FAMILY[rope_type], **options), MAX)


# --- pairs and angles -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("partial", [1.0, 0.5])
@pytest.mark.parametrize("rope_type", FAMILY)
def test_pairs_are_turned_by_position_times_frequency(rope_type: str, partial: float, interleaved: bool) -> None:
    """And stretched by yarn's factor; channels beyond the rotary part stay as they are."""
    D = 8
    rotary = made(D, rope_type, rope_theta=100.0, partial_rotary_factor=partial, interleaved=interleaved)
    q, k = torch.randn(1, 6, 2, D, dtype=torch.float64), torch.randn(1, 6, 1, D, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 7, 8, 30]])
    width = int(D * partial)
    original = rotary.rope.original_max_position_embeddings or MAX
    expected = [q.clone(), k.clone()]
    for x, out in zip((q, k), expected, strict=True):
        for t, position in enumerate(positions[0].tolist()):
            for pair, frequency in enumerate(frequencies(rotary.rope, width, original).tolist()):
                a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + width // 2)
                if rope_type == "dynamic":
                    frequency *= (2.0 * 31 / 8 - 1) ** (-2 * pair / (width - 2))
                angle, m = position * frequency, 0.1 * math.log(4) + 1 if rope_type == "yarn" else 1.0
                c, s = m * math.cos(angle), m * math.sin(angle)
                out[0, t, :, a] = x[0, t, :, a] * c - x[0, t, :, b] * s
                out[0, t, :, b] = x[0, t, :, b] * c + x[0, t, :, a] * s
    torch.testing.assert_close(list(rotary(q, k, positions)), expected)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rope_type", FAMILY)
def test_the_gradient_is_the_turn_back(rope_type: str, interleaved: bool) -> None:
    rotary = made(6, rope_type, interleaved=interleaved, partial_rotary_factor=0.7)
    q = torch.randn(1, 10, 2, 6, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 10, 1, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rotary, (q, k))
    assert torch.autograd.gradcheck(lambda a: rotary(a, k.detach())[0], (q,))


@pytest.mark.parametrize("rope_type", FAMILY)
def test_scores_depend_on_distance_alone(rope_type: str) -> None:
    """In a sequence of one length: at the far end of a million tokens too, to the rounding of fp32."""
    rotary, generator = made(16, rope_type), torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 1, 1, 16, generator=generator), torch.randn(1, 1, 1, 16, generator=generator)
    state = rotary.init_state(1, 2**20, torch.device("cpu"))
    scores = []
    for offset in (0, 5, 1000, 2**20 - 4):
        turned, _ = rotary(q, k, torch.tensor([[offset + 3]]), state)
        _, other = rotary(q, k, torch.tensor([[offset]]), state)
        scores.append((turned * other).sum())
    torch.testing.assert_close(scores[1:], scores[:1] * 3, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("rope_type", FAMILY)
def test_no_cast_copy_or_device_of_the_model_changes_a_turn(rope_type: str) -> None:
    """Made on meta in a half-precision default, cast and copied: it has nothing that these could touch."""
    expected, x = made(16, rope_type), torch.randn(2, 20, 3, 16)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            rotary = made(16, rope_type)
    finally:
        torch.set_default_dtype(torch.float32)
    assert not rotary.state_dict()
    assert not list(rotary.buffers())
    rotary = copy.deepcopy(rotary.to(torch.bfloat16).to_empty(device="cpu"))
    assert all(torch.equal(a, b) for a, b in zip(rotary(x, x), expected(x, x), strict=True))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("rope_type", FAMILY)
def test_nothing_is_read_on_the_host_or_made_elsewhere_than_the_positions_are(rope_type: str, device: str) -> None:
    """In torch's fake mode, where a value that the host asked for, or a device that does not fit, is an error."""
    rotary = made(16, rope_type)
    with FakeTensorMode():
        x, positions = torch.empty(2, 20, 3, 16, device=device), torch.arange(20, device=device).expand(2, -1)
        for state in (None, rotary.init_state(2, 20, torch.device(device))):
            assert {out.device.type for out in rotary(x, x, positions, state)} == {device}


def test_the_width_and_its_relation_agree_where_floats_miss() -> None:
    """100 · 0.28 is above 28 in floats, 180 · 0.7 below 126."""
    for head_dim in range(2, 257):
        for hundredths in range(1, 101):
            rope, exact = RopeParameters(partial_rotary_factor=hundredths / 100), head_dim * hundredths
            faults = list(rotary_width_faults(rope, head_dim))
            assert bool(faults) == bool(exact % 200), (head_dim, hundredths)
            if not faults:
                assert Rotary(head_dim, rope, MAX).width == exact // 100
    assert list(rotary_width_faults(RopeParameters(partial_rotary_factor=1e-9), 64)), "none is no even number above 0"


EXTREMES = {
    "rope_theta": [1.1e-30, 1.0, 1 + 2**-52, 9.9e29],
    "factor": [1.0, 9.9e29],
    "original_max_position_embeddings": [1, 2**40 - 1],
    "attention_factor": [None, 1.1e-30],
    "beta_fast": [None, 1.1e-30, 9.9e29],
    "beta_slow": [None, 1.1e-30, 9.9e29],
    "mscale": [None, 1.1e-30, 9.9e29],
    "mscale_all_dim": [None, 1.1e-30, 9.9e29],
    "truncate": [None, False],
    "low_freq_factor": [1.1e-30, 1.0, 9.8e29],
    "high_freq_factor": [1.2e-30, 1 + 2**-52, 9.9e29],
}


@pytest.mark.parametrize("rope_type", FAMILY)
def test_the_largest_and_smallest_options_that_are_valid_give_numbers(rope_type: str) -> None:
    options, count = ("rope_theta", *ROPE_OPTIONS[rope_type][1]), 0
    for values in itertools.product(*(EXTREMES[name] for name in options)):
        rope = RopeParameters(rope_type=rope_type, **dict(zip(options, values, strict=True)))
        if not list(rope_faults(rope)):
            rotary, count = Rotary(8, rope, MAX), count + 1
            assert frequencies(rope, 8, rotary.original).isfinite().all(), rope
            assert math.isfinite(rotary.factor), rope
    assert count > 3
    x, far = torch.ones(1, 2, 1, 8), torch.tensor([[1, 2**40]])
    assert made(8, rope_type)(x, x, far)[0].isfinite().all()


# --- transformers' formulas -------------------------------------------------------------------------------------


@st.composite
def scalings(draw: st.DrawFn, rope_type: str) -> tuple[RopeParameters, int]:
    """Valid options of a type, each that it takes given or left out where it may be, and the width of a head."""
    needed, taken = ROPE_OPTIONS[rope_type]
    options: dict[str, Any] = {
        "factor": draw(st.just(1.0) | st.floats(1, 64)),
        "original_max_position_embeddings": draw(st.integers(1, 2**20)),
        "attention_factor": draw(st.floats(0.1, 4)),
        "beta_fast": draw(st.floats(0.5, 64)),
        "beta_slow": draw(st.floats(0.01, 32)),
        "mscale": draw(st.floats(0.1, 2)),
        "mscale_all_dim": draw(st.floats(0.1, 2)),
        "truncate": draw(st.booleans()),
        "low_freq_factor": draw(st.floats(0.1, 8)),
        "high_freq_factor": draw(st.floats(0.2, 32)),
    }
    given = {name: options[name] for name in taken if name in needed or draw(st.booleans())}
    rope = RopeParameters(
        rope_type=rope_type,
        rope_theta=draw(st.floats(1.5, 1e7)),
        partial_rotary_factor=draw(st.sampled_from([1.0, 0.5, 0.25])),
        **given,
    )
    head_dim = draw(st.sampled_from([16, 32, 48, 64, 128]))
    low, high = rope.low_freq_factor, rope.high_freq_factor
    # bounds that all but meet magnify the rounding of what lies between them
    assume(low is None or high is None or high - low > 0.05)
    assume(not list(rope_faults(rope)) and not list(rotary_width_faults(rope, head_dim)))
    return rope, head_dim


def config_of(rope: RopeParameters, head_dim: int, **options: Any) -> Any:
    """A Llama's of transformers. Its `dynamic` takes the original length for that of the model."""
    transformers = pytest.importorskip("transformers")
    given = rope.model_dump(exclude_none=True, exclude={"interleaved"})
    length = given.pop("original_max_position_embeddings", MAX) if rope.rope_type == "dynamic" else MAX
    sizes = {"hidden_size": 2 * head_dim, "num_attention_heads": 2, "head_dim": head_dim, "vocab_size": 8}
    return transformers.LlamaConfig(max_position_embeddings=length, rope_parameters=given, **{**sizes, **options})


@contextlib.contextmanager
def fp32_is_fp64() -> Iterator[None]:
    """For code of transformers, which names its dtype."""
    with mock.patch.multiple(torch, float=torch.float64, float32=torch.float64):
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(SINGLE)


def hf_frequencies(rope: RopeParameters, head_dim: int, length: int | None = None) -> tuple[Tensor, float]:
    """What transformers' own code gives when its fp32 is fp64: frequencies (width/2,) and the factor of cos and sin."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    with fp32_is_fp64():
        return ROPE_INIT_FUNCTIONS[rope.rope_type](config_of(rope, head_dim), None, seq_len=length)


@pytest.mark.parametrize("rope_type", ["linear", "yarn", "llama3"])
@settings(max_examples=60)
@given(data=st.data())
def test_frequencies_are_transformers(rope_type: str, data: st.DataObject) -> None:
    rope, head_dim = data.draw(scalings(rope_type))
    width = Rotary(head_dim, rope, MAX).width
    expected, factor = hf_frequencies(rope, head_dim)
    assert expected.dtype == torch.float64
    found = frequencies(rope, width, rope.original_max_position_embeddings or MAX)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=0)
    assert attention_factor(rope) == pytest.approx(factor, rel=1e-15)


@settings(max_examples=60)
@given(drawn=scalings("dynamic"), length=st.integers(1, 2**21))
def test_dynamic_frequencies_are_transformers_at_every_length(drawn: tuple[RopeParameters, int], length: int) -> None:
    rope, head_dim = drawn
    width, original = Rotary(head_dim, rope, MAX).width, rope.original_max_position_embeddings or MAX
    expected, factor = hf_frequencies(rope, head_dim, length)
    found = frequencies(rope, width, original) * stretched(torch.tensor(length), original, rope.factor or 0.0, width)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=0)
    assert attention_factor(rope) == factor == 1


@pytest.mark.parametrize("rope_type", FAMILY)
def test_cosines_are_as_exact_at_a_million_as_at_the_start_and_never_less_than_transformers(rope_type: str) -> None:
    """In fp32, against the truth: transformers rounds an angle of a million radians to a sixteenth of one."""
    pytest.importorskip("transformers", minversion="5.24")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary, D = made(64, rope_type), 64
    config = config_of(rotary.rope, D)
    far = torch.randint(2**20, (1000,), generator=torch.Generator().manual_seed(0))
    positions = torch.unique(torch.cat([torch.arange(200), far, 2 ** torch.arange(20), torch.tensor([2**20 - 1])]))
    # turned, (1, 0) is the cosine and the sine
    x = torch.cat([torch.ones(1, len(positions), 1, D // 2), torch.zeros(1, len(positions), 1, D // 2)], -1)
    found = rotary(x, x, positions[None])[0][0, :, 0].double()
    cos, sin = LlamaRotaryEmbedding(config)(x, positions[None])
    theirs = torch.cat([cos[0, :, : D // 2], sin[0, :, : D // 2]], -1).double()
    with fp32_is_fp64():
        exact = LlamaRotaryEmbedding(config)
        cos, sin = exact(x.double(), positions[None])
    truth = torch.cat([cos[0, :, : D // 2], sin[0, :, : D // 2]], -1)
    assert truth.dtype == torch.float64
    error, other = (found - truth).abs().amax(1), (theirs - truth).abs().amax(1)
    eps = torch.finfo(torch.float32).eps
    assert error.max() < 4 * eps, "an angle below 2π is rounded by 2 eps at most, a cosine and yarn's factor by 1"
    assert error.max() <= other.max()
    assert error[positions > 2**19].max() < other[positions > 2**19].max() / 100


@settings(max_examples=30)
@given(st.sampled_from([2, 4, 8]), st.integers(1, 20), st.floats(2, 1e5))
def test_interleaved_pairs_are_those_of_gpt_j(width: int, length: int, theta: float) -> None:
    pytest.importorskip("transformers")
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb

    x, angles = torch.randn(2, length, 3, 8, dtype=torch.float64), torch.arange(length)[:, None].double()
    angles = (angles * theta ** -(torch.arange(0, width, 2).double() / width))[None]
    expected = torch.cat([apply_rotary_pos_emb(x[..., :width], angles.sin(), angles.cos()), x[..., width:]], -1)
    rope = RopeParameters(rope_theta=theta, partial_rotary_factor=width / 8, interleaved=True)
    torch.testing.assert_close(Rotary(8, rope, MAX)(x, x), (expected, expected))


@settings(max_examples=30)
@given(st.sampled_from([2, 4, 8]), st.integers(1, 20), st.floats(2, 1e5))
def test_the_part_that_is_turned_is_that_of_gpt_neox(width: int, length: int, theta: float) -> None:
    pytest.importorskip("transformers")
    from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

    x, angles = torch.randn(2, length, 3, 8, dtype=torch.float64), torch.arange(length)[:, None].double()
    angles = (angles * theta ** -(torch.arange(0, width, 2).double() / width))[None].repeat(1, 1, 2)
    expected = apply_rotary_pos_emb(x, x, angles.cos(), angles.sin(), unsqueeze_dim=2)
    rope = RopeParameters(rope_theta=theta, partial_rotary_factor=width / 8)
    torch.testing.assert_close(Rotary(8, rope, MAX)(x, x), expected)


# --- lengths ----------------------------------------------------------------------------------------------------

PARTS = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=5)


@given(PARTS)
@example([(3, 0, 2)])
@example([(1, 2, 0), (2, 0, 0), (1, 0, 0)])
def test_a_sequence_is_as_long_as_its_last_position_says(parts: list[tuple[int, int, int]]) -> None:
    """Each part is a document: `left` pads at position 0, `real` tokens, `right` pads. Position 0 may be anyone's."""
    positions, expected = [], []
    for real, left, right in parts:
        positions += [0] * left + list(range(real)) + [0] * right
        expected += [None] * (left + 1) + [real] * (real - 1) + [None] * right
    found = sequence_lengths(torch.tensor([positions, positions]))
    assert torch.equal(found[0], found[1])
    assert [f for f, e in zip(found[0].tolist(), expected, strict=True) if e] == [e for e in expected if e]


def test_padding_inside_a_sequence_and_positions_that_start_late_or_skip_are_one_run() -> None:
    given = [[0, 1, 0, 0, 4, 5], [5, 6, 7, 8, 9, 11], [0, 1, 2, 7, 3, 4]]
    lengths = [[6] * 6, [12] * 6, [8] * 4 + [5] * 2]
    found = sequence_lengths(torch.tensor(given, dtype=torch.int32))
    assert found.tolist() == lengths


def test_each_sequence_of_a_batch_has_the_frequencies_of_its_own_length() -> None:
    """Packed, padded on either side, and alone; below the original length, of 8, those of the default."""
    rotary, plain = made(16, "dynamic"), made(16)
    x = torch.randn(1, 30, 2, 16, dtype=torch.float64)
    alone = {length: rotary(x[:, :length], x[:, :length])[0] for length in (5, 12, 30)}
    torch.testing.assert_close(alone[5], plain(x[:, :5], x[:, :5])[0])
    assert not torch.allclose(alone[12], alone[30][:, :12])
    packed = torch.cat([x[:, :12], x[:, :5], x[:, :12]], 1)
    positions = torch.cat([torch.arange(n) for n in (12, 5, 12)])[None]
    torch.testing.assert_close(rotary(packed, packed, positions)[0], torch.cat([alone[n] for n in (12, 5, 12)], 1))
    for before in (0, 3, 18):
        padded = torch.nn.functional.pad(x[:, :12], (0, 0, 0, 0, before, 18 - before))
        positions = torch.nn.functional.pad(torch.arange(12), (before, 18 - before))
        both = torch.cat([padded, x]), torch.stack([positions, torch.arange(30)])
        found = rotary(both[0], both[0], both[1])[0]
        torch.testing.assert_close(found[:1, before : before + 12], alone[12])
        torch.testing.assert_close(found[1:], alone[30])


def test_in_decoding_the_length_is_the_one_the_state_was_made_for() -> None:
    rotary, x = made(16, "dynamic"), torch.randn(2, 20, 2, 16)
    whole = rotary(x, x)[0]
    state = rotary.init_state(2, 20, torch.device("cpu"))
    for start, end in ((0, 1), (1, 9), (9, 20)):
        positions = torch.arange(start, end).expand(2, -1)
        torch.testing.assert_close(rotary(x[:, start:end], x[:, start:end], positions, state)[0], whole[:, start:end])
    for other in ("default", "yarn"):
        assert made(16, other).init_state(2, 20, torch.device("cpu")) == {}
