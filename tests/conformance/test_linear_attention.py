"""Linear attention's own laws: the recurrence, both directions, states, runs, memory, favor, decays, refusals."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import elu

from attncompiler.blocks.random_features import random_projection
from attncompiler.blocks.segments import run_numbers
from attncompiler.errors import InputError
from attncompiler.mechanisms.linear_attention.kernels import chunkwise
from attncompiler.mechanisms.linear_attention.layer import retention_decay
from attncompiler.mechanisms.linear_attention.mechanism import LinearAttentionPolicy, relations
from attncompiler.mechanisms.linear_attention.op import linear_attention
from attncompiler.mechanisms.linear_attention.state import init_state
from attncompiler.runtime.context import Chain, MixerContext

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


# --- favor ------------------------------------------------------------------------------------------------------


def projected(seed: int, R: int, D: int = 5, orthogonal: bool = True) -> Tensor:
    return random_projection(R, D, orthogonal, torch.Generator().manual_seed(seed)).double()


def performer(q: Tensor, k: Tensor, v: Tensor, w: Tensor, causal: bool, eps: float) -> Tensor:
    """Equations 5, 7 and 13 of the paper: q, k (B, H, T, D), v (B, H, T, V), w (R, D)."""
    R, D = w.shape

    def features(x: Tensor) -> Tensor:
        x = x / D**0.25
        return torch.exp(x @ w.T - x.square().sum(-1, keepdim=True) / 2) / math.sqrt(R)

    weights = features(q) @ features(k).mT
    weights = weights.tril() if causal else weights
    return weights @ v / (weights.sum(-1, keepdim=True) + eps)


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=30)
@given(seed=SEEDS, T=st.integers(1, 140), R=st.sampled_from([1, 6, 33]), causal=st.booleans())
def test_favor_is_the_papers_formula(name: str, seed: int, T: int, R: int, causal: bool) -> None:
    """Outputs, and gradients by autograd's way through the formula."""
    leaves = [x.requires_grad_() for x in tensors(seed, T)]
    w = projected(seed, R)
    out = linear_attention(*leaves, feature_map="favor", projection=w, causal=causal, eps=1e-3, kernel=name)
    expected = performer(*(x.transpose(1, 2) for x in leaves), w, causal, 1e-3).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x.sin().sum(), leaves) for x in (out, expected)))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("normalize", [True, False])
def test_favors_future_never_leaks_however_large(name: str, normalize: bool) -> None:
    """Keys a hundred times as large, whose features are next to nothing, and keys along w, whose are the largest."""
    q, k, v = (x.float() for x in tensors(0, 100))
    w = projected(0, 40).float()

    def run(k: Tensor) -> Tensor:
        return linear_attention(q, k, v, feature_map="favor", projection=w, normalize=normalize, kernel=name)

    plain, last = run(k), w[w.norm(dim=-1).argmax()] * 5**0.25
    for later in (100 * k[:, 70:], last.expand(2, 30, 2, 5), torch.zeros_like(k[:, 70:])):
        changed = torch.cat([k[:, :70], later], 1)
        assert torch.equal(run(changed)[:, :70], plain[:, :70])
        assert not torch.equal(run(changed)[:, 70:], plain[:, 70:])


@pytest.mark.parametrize("name", KERNELS)
def test_a_small_past_is_not_lost_to_a_large_future(name: str) -> None:
    """Features of exp(−100), which fp32 does not hold, beside others of exp(−1): only a running maximum keeps both."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 90, 1, 4, generator=generator) for _ in range(3))
    k[:, :30] *= 20 / k[:, :30].norm(dim=-1, keepdim=True)
    w = projected(0, 3, 4).float() / 100
    options: Any = {"feature_map": "favor", "eps": 1e-60, "kernel": name}
    out = linear_attention(q, k, v, projection=w, **options)
    exact = linear_attention(q.double(), k.double(), v.double(), projection=w.double(), **options)
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-4)
    assert out[:, :30].abs().mean() > 0.1


@pytest.mark.parametrize("name", KERNELS)
def test_eps_is_as_large_beside_small_features_as_beside_large_ones(name: str) -> None:
    """φ(q)·z is next to nothing beside this eps: a kernel that adds it to stabilised sums divides by another."""
    q, k, v = tensors(3, 20)
    w = projected(3, 12)
    options: Any = {"feature_map": "favor", "projection": w, "kernel": name}
    sums = linear_attention(q, k, v, normalize=False, **options)
    out = linear_attention(q, k, v, eps=1e4, **options)
    torch.testing.assert_close(out, sums / 1e4, rtol=0.05, atol=1e-7)


def softmax_error(R: int, seeds: int, orthogonal: bool) -> float:
    """The root mean square of Performer less softmax attention, over projections."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 48, 1, 16, generator=generator, dtype=torch.float64) * s for s in (0.5, 0.5, 1))
    exact = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)
    squares = []
    for seed in range(seeds):
        w = projected(seed, R, 16, orthogonal)
        squares.append((linear_attention(q, k, v, feature_map="favor", projection=w) - exact).square().mean().item())
    return math.sqrt(statistics.fmean(squares))


def test_more_features_come_closer_to_softmax_attention() -> None:
    """A Monte Carlo estimate: four times the features halve its error."""
    errors = [softmax_error(R, 40, orthogonal=False) for R in (64, 256, 1024, 4096)]
    assert errors[-1] < 0.02
    for few, many in pairwise(errors):
        assert 1.7 < few / many < 2.3


def test_orthogonal_features_are_no_worse_than_independent_ones() -> None:
    for R in (16, 64):
        assert softmax_error(R, 200, True) < softmax_error(R, 200, False)


@given(seed=SEEDS, R=st.integers(1, 40), D=st.integers(1, 12))
def test_orthogonal_rows_are_orthogonal_within_each_block(seed: int, R: int, D: int) -> None:
    w = projected(seed, R, D)
    assert w.shape == (R, D)
    for block in w.split(D):
        products = block @ block.T
        torch.testing.assert_close(products, products.diagonal().diag(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("orthogonal", [True, False])
def test_rows_are_distributed_as_gaussian_vectors(orthogonal: bool) -> None:
    """Each coordinate's mean, square and fourth power, and the mean square of lengths."""
    w = projected(0, 60000, 4, orthogonal)
    assert (w.mean(0).abs() < 0.02).all()
    assert ((w.square().mean(0) - 1).abs() < 0.03).all()
    assert ((w.pow(4).mean(0) - 3).abs() < 0.2).all()
    assert abs(w.norm(dim=-1).var().item() / (4 - 8 * (math.gamma(2.5) / math.gamma(2)) ** 2 / 4) - 1) < 0.05


def test_favors_initial_state_may_be_given_at_any_m() -> None:
    q, k, v = tensors(0, 7)
    options: Any = {"feature_map": "favor", "projection": projected(0, 6)}
    _, (s, z, m) = linear_attention(*tensors(1, 9), return_state=True, **options)
    shift = torch.tensor([[0.5, -1.0], [2.0, 300.0]], dtype=torch.float64)
    moved = (s * (-shift).exp()[..., None, None], z * (-shift).exp()[..., None], m + shift)
    for name in KERNELS:
        results = [linear_attention(q, k, v, initial_state=x, kernel=name, **options) for x in ((s, z, m), moved)]
        torch.testing.assert_close(*results)


# --- decays -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=30)
@given(seed=SEEDS, T=st.integers(1, 140))
def test_retention_is_its_recurrence(name: str, seed: int, T: int) -> None:
    """S[n] = γ S[n−1] + k[n]ᵀ v[n], out[n] = q[n] S[n]: equation 6 of the paper, in numpy."""
    q, k, v = tensors(seed, T)
    gamma = 1 - 2.0 ** (-5 - np.arange(2))
    log_decay = retention_decay(2, q.device, torch.float64)
    out = linear_attention(q, k, v, feature_map="identity", normalize=False, log_decay=log_decay, kernel=name)
    for b in range(2):
        for h in range(2):
            rows, state = [], np.zeros((5, 3))
            for t in range(T):
                state = gamma[h] * state + np.outer(k[b, t, h], v[b, t, h])
                rows.append(q[b, t, h].numpy() @ state)
            torch.testing.assert_close(out[b, :, h], torch.from_numpy(np.stack(rows)))


def test_retentions_decays_are_the_papers() -> None:
    found = retention_decay(40, torch.device("cpu"), torch.float32)
    assert found[:4].exp().tolist() == pytest.approx([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128, 1 - 1 / 256])
    assert (found < 0).all(), "the longest memory of many heads still forgets"


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("feature_map", ["elu", "favor"])
@settings(max_examples=20)
@given(seed=SEEDS, T=st.integers(1, 140))
def test_a_decay_scales_both_sums(name: str, feature_map: Any, seed: int, T: int) -> None:
    """Token by token, the initial state too, and gradients: of the decays themselves by autograd's."""
    q, k, v = tensors(seed, T)
    w = projected(seed, 6) if feature_map == "favor" else None
    generator = torch.Generator().manual_seed(seed)
    g = torch.nn.functional.logsigmoid(3 * torch.randn(2, T, 2, generator=generator, dtype=torch.float64))
    R = 5 if w is None else 6
    s, z = (torch.rand(2, 2, R, *more, generator=generator, dtype=torch.float64) for more in ((3,), ()))
    leaves = [x.requires_grad_() for x in (q, k, v, g, s, z)]

    def phi(x: Tensor) -> Tensor:
        if w is None:
            return elu(x) + 1
        x = x * 5**-0.25
        return (x @ w.T - x.square().sum(-1, keepdim=True) / 2).exp() / 6**0.5

    S, Z, rows = s, z, []
    for t in range(T):
        decay = g[:, t].exp()[..., None]
        S = decay[..., None] * S + phi(k[:, t])[..., None] * v[:, t, :, None]
        Z = decay * Z + phi(k[:, t])
        rows.append((phi(q[:, t])[:, :, None] @ S)[:, :, 0] / ((phi(q[:, t]) * Z).sum(-1, keepdim=True) + 1e-3))
    options: Any = {"feature_map": feature_map, "projection": w, "eps": 1e-3, "kernel": name}
    initial = (s, z, torch.zeros(2, 2, dtype=torch.float64))
    out, (last, _, m) = linear_attention(q, k, v, log_decay=g, initial_state=initial, return_state=True, **options)
    expected = torch.stack(rows, 1)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(last * m.exp()[..., None, None], S)
    found, wanted = (torch.autograd.grad(x.sin().sum(), leaves) for x in (out, expected))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("feature_map", ["elu", "favor"])
@pytest.mark.parametrize("reset", [-1e4, -1e38, -math.inf])
def test_a_decay_that_leaves_nothing_overflows_nowhere(name: str, feature_map: Any, reset: float) -> None:
    """It begins the sequence anew, and blurs none of the weak decays behind it."""
    q, k, v = (x.float() for x in tensors(0, 150))
    w = projected(0, 9).float() if feature_map == "favor" else None
    g = torch.full((2, 150, 2), -0.01)
    g[:, 70], g[:, 80] = reset, reset
    leaves = [x.requires_grad_() for x in (q, k, v, g)]
    options: Any = {"feature_map": feature_map, "projection": w, "kernel": name, "return_state": True}
    out, state = linear_attention(q, k, v, log_decay=g, **options)
    grads = torch.autograd.grad(out.sum() + state[0].sum(), leaves)
    assert all(x.isfinite().all() for x in (out, *state, *grads))
    behind, last = linear_attention(q[:, 80:], k[:, 80:], v[:, 80:], log_decay=g[:, 80:], **options)
    torch.testing.assert_close((out[:, 80:], state), (behind, last))


@pytest.mark.parametrize("name", KERNELS)
def test_one_decay_a_head_is_that_decay_at_every_token(name: str) -> None:
    q, k, v = tensors(0, 70)
    g = torch.tensor([-0.3, -0.01], dtype=torch.float64, requires_grad=True)
    own = linear_attention(q, k, v, log_decay=g, kernel=name)
    wide = linear_attention(q, k, v, log_decay=g.expand(2, 70, 2).contiguous(), kernel=name)
    torch.testing.assert_close(own, wide)
    torch.testing.assert_close(*(torch.autograd.grad(x.sin().sum(), g)[0] for x in (own, wide)))


@pytest.mark.parametrize("name", KERNELS)
def test_padding_does_not_decay(name: str) -> None:
    q, k, v = tensors(0, 30)
    g = -torch.rand(2, 30, 2, generator=torch.Generator().manual_seed(0)).double()
    mask = torch.ones(2, 30)
    mask[:, 10:17] = 0
    real = mask[0] > 0
    noisy = g.masked_fill(mask[..., None] == 0, math.nan).requires_grad_()
    options: Any = {"kernel": name, "return_state": True}
    out, state = linear_attention(q, k, v, log_decay=noisy, attention_mask=mask, **options)
    short = linear_attention(q[:, real], k[:, real], v[:, real], log_decay=g[:, real], **options)
    torch.testing.assert_close((out[:, real], state), short)
    assert not torch.autograd.grad(out.sum(), noisy)[0][:, ~real].any()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("feature_map", ["elu", "favor"])
def test_both_states_and_the_decays_are_differentiable(name: str, feature_map: Any) -> None:
    """By finite differences, m being part of what a state stands for; packed, the second segment loses the state."""
    q, k, v = tensors(0, 5, B=1)
    generator = torch.Generator().manual_seed(1)
    w = projected(0, 4) if feature_map == "favor" else None
    R = 5 if w is None else 4
    s, z, g = (torch.rand(size, generator=generator).double() for size in ((1, 2, R, 3), (1, 2, R), (1, 5, 2)))
    m = torch.tensor([[0.3, -2.0]], dtype=torch.float64)

    for ids in (None, torch.tensor([[0, 0, 1, 1, 1]])):

        def run(*leaves: Tensor, ids: Tensor | None = ids) -> tuple[Tensor, ...]:
            q, k, v, s, z, g = leaves
            options: Any = {"feature_map": feature_map, "projection": w, "log_decay": -g, "kernel": name}
            out, (s, z, last) = linear_attention(
                q, k, v, initial_state=(s, z, m), return_state=True, segment_ids=ids, **options
            )
            return out, s * last.exp()[..., None, None], z * last.exp()[..., None]

        assert torch.autograd.gradcheck(run, tuple(x.requires_grad_() for x in (q, k, v, s, z, g)))


def test_favor_and_decays_compile_as_one_graph_and_keep_fp32_under_autocast() -> None:
    q, k, v = (x.float().requires_grad_() for x in tensors(0, 70))
    w, g = projected(0, 6).float(), torch.tensor([-0.1, -0.2], requires_grad=True)

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return linear_attention(q, k, v, feature_map="favor", projection=w, log_decay=g)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    outs = run(q, k, v, g), compiled(q, k, v, g)
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(torch.autograd.grad(out.sin().sum(), (q, k, v, g)) for out in outs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = run(q, k, v, g)
    assert low.dtype == torch.bfloat16
    expected = linear_attention(*(x.bfloat16() for x in (q, k, v)), feature_map="favor", projection=w, log_decay=g)
    assert torch.equal(low, expected)


# --- what is refused --------------------------------------------------------------------------------------------


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
        ({"feature_map": "favor"}, "E403"),
        ({"projection": torch.zeros(7, 5)}, "E403"),
        ({"feature_map": "favor", "projection": torch.zeros(7, 4)}, "E401"),
        ({"feature_map": "favor", "projection": torch.zeros(7, 5).double()}, "E402"),
        ({"log_decay": torch.zeros(2), "causal": False}, "E403"),
        ({"log_decay": torch.zeros(3)}, "E401"),
        ({"log_decay": torch.zeros(1, 4)}, "E401"),
        ({"log_decay": torch.zeros(2).double()}, "E402"),
    ],
)
def test_bad_arguments_are_refused_by_code(changed: dict[str, Any], code: str) -> None:
    q, k, v = torch.zeros(1, 4, 2, 5), torch.zeros(1, 4, 2, 5), torch.zeros(1, 4, 2, 3)
    with pytest.raises(InputError) as caught:
        linear_attention(**{"q": q, "k": k, "v": v, **changed})
    assert caught.value.diagnostics[0].code == code


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
    context = MixerContext(32, 0, 1, 64, 1e-5, Chain("layer", ("chunkwise",)))
    with pytest.raises(InputError, match="E503"):
        init_state(policy, context, 1, 8, torch.device("cpu"), torch.float32)
