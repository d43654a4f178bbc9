"""Linformer's own laws: what it equals, columns that are not read, padding, packing, and refusals."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attncompiler.errors import InputError
from attncompiler.mechanisms.linformer.documents import documents
from attncompiler.mechanisms.linformer.kernels import sdpa
from attncompiler.mechanisms.linformer.layer import Linformer
from attncompiler.mechanisms.linformer.mechanism import LinformerPolicy, relations
from attncompiler.mechanisms.linformer.op import linformer
from attncompiler.runtime.context import Chain, MixerContext

KERNELS = ["sdpa", "eager"]
SEEDS = st.integers(0, 2**20)


def tensors(seed: int, T: int, P: int, R: int = 4, per_head: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, T, 3, 8)] * 3 + [(3, R, P) if per_head else (R, P)] * 2
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def written_down(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """softmax(q (E k)ᵀ / √D) (F v), equation 7 of the paper: q, k, v (B, H, T, D), E and F (R, T) or (H, R, T)."""
    scores = q @ (keys @ k).mT / q.shape[-1] ** 0.5
    return scores.softmax(-1) @ (values @ v)


@pytest.mark.parametrize("name", KERNELS)
@given(seed=SEEDS, T=st.integers(1, 40), per_head=st.booleans(), shared=st.booleans())
def test_each_sharing_of_projections_is_the_papers_formula(
    name: str, seed: int, T: int, per_head: bool, shared: bool
) -> None:
    """A projection for each head, or one for all; and of keys and values the same, or not. Gradients by autograd."""
    *leaves, keys, values = (x.requires_grad_() for x in tensors(seed, T, T, per_head=per_head))
    projections = (keys, keys) if shared else (keys, values)
    out = linformer(*leaves, *projections, kernel=name)
    expected = written_down(*(x.transpose(1, 2) for x in leaves), *projections).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    leaves += projections[:1] if shared else projections
    torch.testing.assert_close(*(torch.autograd.grad(x.sin().sum(), leaves) for x in (out, expected)))


@pytest.mark.parametrize("name", KERNELS)
@given(seed=SEEDS, T=st.integers(1, 40))
def test_the_identity_projection_is_full_attention(name: str, seed: int, T: int) -> None:
    q, k, v, *_ = tensors(seed, T, T)
    out = linformer(q, k, v, torch.eye(T).double(), torch.eye(T).double(), kernel=name)
    full = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(out, full)


@pytest.mark.parametrize("name", KERNELS)
@given(seed=SEEDS, T=st.integers(1, 30), spare=st.integers(1, 9), per_head=st.booleans())
def test_columns_behind_the_sequence_are_not_read(name: str, seed: int, T: int, spare: int, per_head: bool) -> None:
    q, k, v, keys, values = tensors(seed, T, T + spare, per_head=per_head)
    keys, values = keys.requires_grad_(), values.requires_grad_()
    out = linformer(q, k, v, keys, values, kernel=name)
    torch.testing.assert_close(out, linformer(q, k, v, keys[..., :T], values[..., :T], kernel=name))
    for grad in torch.autograd.grad(out.square().sum(), (keys, values)):
        assert not grad[..., T:].any()
        assert grad[..., :T].any()


@pytest.mark.parametrize("name", KERNELS)
@given(seed=SEEDS, T=st.integers(1, 30))
def test_one_projection_per_head_equals_a_shared_one_repeated(name: str, seed: int, T: int) -> None:
    q, k, v, keys, values = tensors(seed, T, T)
    repeated = linformer(q, k, v, keys.expand(3, -1, -1), values.expand(3, -1, -1), kernel=name)
    torch.testing.assert_close(linformer(q, k, v, keys, values, kernel=name), repeated)


@pytest.mark.parametrize("name", KERNELS)
@given(seed=SEEDS, before=st.integers(0, 9), T=st.integers(1, 30), after=st.integers(0, 9))
def test_padding_moves_no_column(name: str, seed: int, before: int, T: int, after: int) -> None:
    """Whatever stands in the padding; and with queries that are the last of the keys."""
    length = before + T + after
    q, k, v, keys, values = tensors(seed, length, length)
    mask = torch.zeros(2, length, dtype=torch.int64)
    mask[:, before : before + T] = 1
    out = linformer(q, k, v, keys, values, attention_mask=mask, kernel=name)
    q_real, k_real, v_real = (x[:, before : before + T] for x in (q, k, v))
    torch.testing.assert_close(
        out[:, before : before + T], linformer(q_real, k_real, v_real, keys, values, kernel=name)
    )
    assert not out[:, :before].any()
    assert not out[:, before + T :].any()
    last = (length + 1) // 2
    torch.testing.assert_close(
        linformer(q[:, -last:], k, v, keys, values, attention_mask=mask, kernel=name), out[:, -last:]
    )


def test_rows_that_are_all_padding_give_zero_and_finite_gradients() -> None:
    inputs = [x.requires_grad_() for x in tensors(0, 6, 6)]
    mask = torch.tensor([[0] * 6, [1] * 6])
    for name in KERNELS:
        out = linformer(*inputs, attention_mask=mask, kernel=name)
        assert not out[0].any()
        grads = torch.autograd.grad(out.sum(), inputs)
        assert all(grad.isfinite().all() for grad in grads)
        assert not any(grad[0].any() for grad in grads[:3])


@pytest.mark.parametrize("name", KERNELS)
@given(
    seed=SEEDS,
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    before=st.integers(0, 4),
    shared=st.booleans(),
    missing=st.floats(0, 1),
)
def test_packed_documents_each_begin_at_the_first_column(
    name: str, seed: int, lengths: list[int], before: int, shared: bool, missing: float
) -> None:
    """Equation 7 for each document; padding in front has some id too; queries are the last of the keys."""
    total, longest = before + sum(lengths), max(lengths)
    q, k, v, *_ = tensors(seed, total, 1)
    *_, keys, values = tensors(seed, 1, longest, per_head=not shared)
    leaves = [x.requires_grad_() for x in (q, k, v, keys, values)]
    ids = torch.tensor([0] * before + [n % 2 for n, length in enumerate(lengths) for _ in range(length)])
    mask = (torch.arange(total) >= before).expand(2, -1) if before else None
    ids, first = ids.expand(2, -1), round(missing * (total - 1))
    out = linformer(q[:, first:], k, v, keys, values, segment_ids=ids, attention_mask=mask, kernel=name)
    expected, start = [torch.zeros(2, before, 3, 8).double()], before
    for length in lengths:
        part = [x[:, start : start + length].transpose(1, 2) for x in (q, k, v)]
        expected.append(written_down(*part, keys[..., :length], values[..., :length]).transpose(1, 2))
        start += length
    right = torch.cat(expected, 1)[:, first:]
    torch.testing.assert_close(out, right)
    torch.testing.assert_close(*(torch.autograd.grad(x.sin().sum(), leaves) for x in (out, right)))


@pytest.mark.parametrize("name", KERNELS)
def test_documents_know_nothing_of_one_another(name: str) -> None:
    """Not even that there is something that is no number in the next."""
    q, k, v, keys, values = tensors(0, 12, 12)
    ids = torch.tensor([[0] * 5 + [1] * 7]).expand(2, -1)
    out = linformer(q, k, v, keys, values, segment_ids=ids, kernel=name)
    k[:, 5:], v[0] = torch.nan, torch.inf
    spoilt = linformer(q, k, v, keys, values, segment_ids=ids, kernel=name)
    assert torch.equal(spoilt[1, :5], out[1, :5])
    assert not spoilt[0, :5].isfinite().any()


def test_documents_are_taken_together_with_others_of_like_length() -> None:
    """Twice the tokens at most, however lengths differ, and all tokens once."""
    lengths = [1, 1, 700, 2, 3, 40, 5, 64, 1, 33]
    ids = torch.repeat_interleave(torch.arange(10), torch.tensor(lengths)).expand(3, -1)
    parts = documents(ids, None)
    assert parts is not None
    assert len(parts) <= 11
    assert sum(part.index.numel() for part in parts) < 2 * ids.numel()
    found = torch.cat([part.index[part.real] for part in parts])
    assert found.sort().values.tolist() == list(range(ids.numel()))


def test_rows_that_are_all_padding_have_no_document() -> None:
    inputs = [x.requires_grad_() for x in tensors(0, 6, 6)]
    mask = torch.zeros(2, 6)
    for name in KERNELS:
        out = linformer(*inputs, segment_ids=torch.arange(6).expand(2, -1), attention_mask=mask, kernel=name)
        assert not out.any()
        grads = torch.autograd.grad(out.sum(), inputs)
        assert not any(grad.any() for grad in grads)


def test_a_row_may_be_longer_than_the_projections_and_a_document_may_not() -> None:
    q, k, v, keys, values = tensors(0, 9, 5)
    ids = torch.tensor([[0] * 4 + [1] * 5]).expand(2, -1)
    assert linformer(q, k, v, keys, values, segment_ids=ids).shape == q.shape
    with pytest.raises(InputError, match=r"E401.*5 columns.* 6 tokens"):
        linformer(q, k, v, keys, values, segment_ids=torch.tensor([[0] * 3 + [1] * 6]).expand(2, -1))


def test_how_many_queries_the_backward_takes_at_once_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [x.requires_grad_() for x in tensors(0, 23, 30)]

    def grads() -> tuple[Tensor, ...]:
        return torch.autograd.grad(linformer(*inputs, kernel="sdpa").square().sum(), inputs)

    whole = grads()
    monkeypatch.setattr(sdpa, "SCORES", 100)
    torch.testing.assert_close(grads(), whole)


@pytest.mark.parametrize("name", KERNELS)
def test_values_may_have_another_width(name: str) -> None:
    q, k, v, keys, values = tensors(0, 9, 9)
    wide = torch.cat([v, -v], -1)
    out = linformer(q, k, wide, keys, values, kernel=name)
    half = linformer(q, k, v, keys, values, kernel=name)
    torch.testing.assert_close(out, torch.cat([half, -half], -1))


def test_a_sequence_longer_than_the_projections_is_refused() -> None:
    q, k, v, keys, values = tensors(0, 9, 8)
    with pytest.raises(InputError, match=r"E401.*8 columns.*max_position_embeddings"):
        linformer(q, k, v, keys, values)


def _layer(**options: Any) -> Linformer:
    policy = LinformerPolicy(kind="linformer", num_attention_heads=2, projected_length=4, **options)
    return Linformer(policy, MixerContext(16, 3, 4, 12, 1e-5, Chain("layers.3.mixer", ("sdpa", "eager"))))


@pytest.mark.parametrize(
    ("share", "shapes"),
    [
        ("none", {"key_projection": (2, 4, 12), "value_projection": (2, 4, 12)}),
        ("heads", {"key_projection": (4, 12), "value_projection": (4, 12)}),
        ("kv", {"key_projection": (4, 12)}),
    ],
)
def test_sharing_decides_the_parameters(share: str, shapes: dict[str, tuple[int, ...]]) -> None:
    layer = _layer(share=share)
    found = {name: tuple(p.shape) for name, p in layer.named_parameters() if name.endswith("_projection")}
    assert found == shapes
    hidden = torch.randn(2, 9, 16)
    out, state = layer(hidden)
    assert out.shape == hidden.shape
    assert state is None
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())


def test_the_layer_refuses_decoding() -> None:
    layer = _layer()
    with pytest.raises(InputError, match="E503"):
        layer.init_state(1, 8, torch.device("cpu"), torch.float32)
    with pytest.raises(InputError, match="E503"):
        layer(torch.randn(1, 5, 16), state={})


def test_a_causal_linformer_is_an_error_that_says_why() -> None:
    policy = LinformerPolicy(kind="linformer", num_attention_heads=3, projected_length=64, causal=True)
    faults = list(relations(policy, SimpleNamespace(hidden_size=64, max_position_embeddings=32)))
    assert [fault.path for fault in faults] == [("causal",), ("projected_length",), ("num_attention_heads",)]
    assert "whole sequence" in faults[0].message
