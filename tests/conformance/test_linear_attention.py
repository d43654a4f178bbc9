"""Linear attention's own laws: the recurrence, what both directions sum, states, runs, and memory."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import elu

from attncompiler.blocks.segments import run_numbers
from attncompiler.errors import InputError, KernelError
from attncompiler.mechanisms.linear_attention.kernels import chunkwise
from attncompiler.mechanisms.linear_attention.mechanism import LinearAttentionPolicy, relations
from attncompiler.mechanisms.linear_attention.op import linear_attention
from attncompiler.mechanisms.linear_attention.state import init_state
from attncompiler.runtime.context import MixerContext

KERNELS = ["chunkwise", "eager"]
SEEDS = st.integers(0, 2**20)


def tensors(seed: int, T: int, B: int = 2, H: int = 2, D: int = 5, V: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, H, width, generator=generator, dtype=torch.float64) for width in (D, D, V)]


def recurrence(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """Token by token: equations 16 to 20 of the paper, with φ(x) = elu(x) + 1."""
    q, k = elu(q) + 1, elu(k) + 1
    B, T, H, D = q.shape
    s, z = q.new_zeros(B, H, D, v.shape[-1]), q.new_zeros(B, H, D)
    rows = []
    for t in range(T):
        s = s + k[:, t, :, :, None] * v[:, t, :, None]
        z = z + k[:, t]
        rows.append((q[:, t, :, None] @ s).squeeze(2) / ((q[:, t] * z).sum(-1, keepdim=True) + eps))
    return torch.stack(rows, 1)


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=30)
@given(seed=SEEDS, T=st.integers(1, 140))
def test_the_whole_sequence_equals_the_recurrence(name: str, seed: int, T: int) -> None:
    q, k, v = tensors(seed, T)
    out = linear_attention(q, k, v, eps=1e-3, kernel=name)
    torch.testing.assert_close(out, recurrence(q, k, v, 1e-3))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("feature_map", ["elu", "relu", "identity"])
@settings(max_examples=30)
@given(seed=SEEDS, T=st.integers(1, 140))
def test_both_directions_count_the_token_itself_once(name: str, feature_map: Any, seed: int, T: int) -> None:
    """Not causal = causal, and causal from the other end, less each token's own term."""
    q, k, v = tensors(seed, T)

    def sums(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
        return linear_attention(q, k, v, feature_map=feature_map, normalize=False, causal=causal, kernel=name)

    def each(x: Tensor) -> Tensor:
        return x.flatten(0, 1)[:, None]

    own = sums(each(q), each(k), each(v)).unflatten(0, q.shape[:2]).squeeze(2)
    after = sums(q.flip(1), k.flip(1), v.flip(1)).flip(1)
    torch.testing.assert_close(sums(q, k, v, causal=False), sums(q, k, v) + after - own)


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=30)
@given(seed=SEEDS, T=st.integers(1, 140), causal=st.booleans())
def test_segments_equal_separate_calls_in_both_directions(name: str, seed: int, T: int, causal: bool) -> None:
    """Each row cut at its own places; with an initial state, which is the first segment's."""
    q, k, v = tensors(seed, T)
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.rand(2, T, generator=generator) < 0.08).cumsum(1)
    initial = (torch.rand(2, 2, 5, 3, generator=generator), torch.rand(2, 2, 5, generator=generator), torch.zeros(2, 2))
    state = tuple(x.double() for x in initial)
    options: Any = {"causal": causal, "kernel": name, "return_state": True}
    out, (s, z, m) = linear_attention(q, k, v, segment_ids=ids, initial_state=state, **options)
    assert not m.any()
    for b in range(2):
        bounds = [0, *(torch.nonzero(ids[b].diff()).flatten() + 1).tolist(), T]
        for start, stop in pairwise(bounds):
            part = [x[b : b + 1, start:stop] for x in (q, k, v)]
            first = tuple(x[b : b + 1] for x in state) if start == 0 else None
            expected, last = linear_attention(*part, initial_state=first, **options)
            torch.testing.assert_close(out[b : b + 1, start:stop], expected)
        torch.testing.assert_close((s[b], z[b]), (last[0][0], last[1][0]))


@pytest.mark.parametrize("name", KERNELS)
def test_a_state_stands_for_its_sums_times_exp_m(name: str) -> None:
    q, k, v = tensors(0, 7)
    _, (s, z, m) = linear_attention(*tensors(1, 9), return_state=True, kernel=name)
    shift = torch.tensor([[0.5, -1.0], [2.0, 0.0]], dtype=torch.float64)
    scaled = (s * (-shift).exp()[..., None, None], z * (-shift).exp()[..., None], shift)
    plain, moved = (linear_attention(q, k, v, initial_state=x, kernel=name) for x in ((s, z, m), scaled))
    torch.testing.assert_close(plain, moved)


@given(st.data())
def test_padding_never_begins_a_run(data: st.DataObject) -> None:
    """Real tokens share a run exactly when no real token between them has another id."""
    T = data.draw(st.integers(1, 20))
    ids = sorted(data.draw(st.lists(st.integers(0, 3), min_size=T, max_size=T)))
    real = data.draw(st.lists(st.booleans(), min_size=T, max_size=T))
    noisy = [i if r else data.draw(st.integers(0, 9)) for i, r in zip(ids, real, strict=True)]
    runs = run_numbers(torch.tensor([noisy]), torch.tensor([real]))
    assert runs is not None
    found = runs[0].tolist()
    assert found[0] == 0
    assert all(b - a in (0, 1) for a, b in pairwise(found))
    kept = [(i, run) for i, r, run in zip(ids, real, found, strict=True) if r]
    assert all((i == j) == (a == b) for i, a in kept for j, b in kept)


@settings(max_examples=30)
@given(seed=SEEDS, T=st.integers(1, 90), tokens=st.sampled_from([4, 16, 48]), causal=st.booleans())
@example(seed=0, T=65, tokens=64, causal=False)
def test_span_and_chunk_do_not_show(seed: int, T: int, tokens: int, causal: bool) -> None:
    q, k, v = (x.requires_grad_() for x in tensors(seed, T))
    ids = (torch.arange(T) // 7).expand(2, T)

    def run() -> tuple[Tensor, ...]:
        out = linear_attention(q, k, v, causal=causal, segment_ids=ids, kernel="chunkwise")
        return (out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v)))

    whole = run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunkwise, "CHUNK", 4)
        patch.setattr(chunkwise, "SPAN", tokens)
        torch.testing.assert_close(run(), whole)


def test_small_features_keep_their_relative_precision() -> None:
    """elu(x) + 1 would round exp(−20) away in fp32, and with it the whole output."""
    q, k = torch.full((1, 3, 1, 4), -20.0), torch.full((1, 3, 1, 4), -20.0)
    v = torch.arange(3.0).reshape(1, 3, 1, 1).expand(1, 3, 1, 4)
    for name in KERNELS:
        out = linear_attention(q, k, v, normalize=False, kernel=name)
        exact = linear_attention(q.double(), k.double(), v.double(), normalize=False, kernel=name)
        torch.testing.assert_close(
            out.double() / exact[:, 1:].mean(), exact / exact[:, 1:].mean(), rtol=1e-5, atol=1e-5
        )


def test_memory_kept_for_the_backward_is_linear_in_the_length() -> None:
    T = 32768
    q, k, v = (torch.randn(1, T, 1, 8, requires_grad=True) for _ in range(3))
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = linear_attention(q, k, v, kernel="chunkwise")
    assert sum(kept.values()) <= 3 * sum(x.nbytes for x in (q, k, v, out))


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"k": torch.zeros(1, 4, 2, 6)}, "E401"),
        ({"k": torch.zeros(1, 4, 2, 5, dtype=torch.float64)}, "E402"),
        ({"initial_state": (torch.zeros(1, 2, 5, 3), torch.zeros(1, 2, 4), torch.zeros(1, 2))}, "E401"),
        ({"initial_state": tuple(torch.zeros(s).double() for s in ((1, 2, 5, 3), (1, 2, 5), (1, 2)))}, "E402"),
        ({"segment_ids": torch.zeros(1, 5, dtype=torch.int64)}, "E401"),
        ({"initial_state": 3}, "E403"),
        ({"eps": 0.0}, "E403"),
        ({"scale": math.inf}, "E403"),
        ({"feature_map": "identity"}, "E403"),
        ({"feature_map": "softmax"}, "E403"),
        ({"kernel": "fastest"}, "E403"),
    ],
)
def test_bad_arguments_are_refused_by_code(changed: dict[str, Any], code: str) -> None:
    q, k, v = torch.zeros(1, 4, 2, 5), torch.zeros(1, 4, 2, 5), torch.zeros(1, 4, 2, 3)
    with pytest.raises(InputError) as caught:
        linear_attention(**{"q": q, "k": k, "v": v, **changed})
    assert caught.value.diagnostics[0].code == code


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        ({"feature_map": "favor"}, "feature_map = favor"),
        ({"projection": torch.zeros(7, 5)}, "projection"),
        ({"log_decay": torch.zeros(2)}, "decay"),
    ],
)
def test_what_is_not_built_is_refused_in_words(asked: dict[str, Any], word: str) -> None:
    q = torch.zeros(1, 4, 2, 5)
    with pytest.raises(KernelError, match=word):
        linear_attention(q, q, q, **asked)


def test_relations_name_what_does_not_fit() -> None:
    policy = LinearAttentionPolicy(
        kind="linear_attention",
        num_attention_heads=3,
        feature_map="identity",
        num_features=8,
        decay="scalar",
        causal=False,
    )
    faults = list(relations(policy, SimpleNamespace(hidden_size=64)))
    assert [(fault.path[0], fault.code) for fault in faults] == [
        ("feature_map", "E105"),
        ("num_features", "E105"),
        ("decay", "E105"),
        ("num_attention_heads", "E101"),
    ]


def test_a_layer_that_reads_the_whole_sequence_has_no_decode_state() -> None:
    policy = LinearAttentionPolicy(kind="linear_attention", num_attention_heads=2, causal=False)
    context = MixerContext(32, 0, 1, 64, 1e-5, ("chunkwise",))
    with pytest.raises(InputError, match="E503"):
        init_state(policy, context, 1, 8, torch.device("cpu"), torch.float32)
