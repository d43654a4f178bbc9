"""What holds of attention's kernels beside what holds of every kernel: alignment, packing, empty rows, lse, tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attncompiler.mechanisms.attention.cases import extras, plain
from attncompiler.mechanisms.attention.kernels import chunkwise, sdpa
from attncompiler.mechanisms.attention.mechanism import MECHANISM
from attncompiler.mechanisms.attention.op import OPERATOR, AttentionOptions, as_pattern, attention
from attncompiler.mechanisms.case import Case
from attncompiler.testing.conformance import conforms, cotangents, evaluate, kernel_call, prepared

KERNELS = ("sdpa", "chunkwise", "eager")
WINDOW = {"kind": "sliding_window", "window": 5}
GLOBAL = {"kind": "sliding_window", "window": 5, "global_tokens": 3}
BOTH_WAYS = {**GLOBAL, "causal": False}
PATTERNS: tuple[Any, ...] = ("causal", "full", WINDOW, GLOBAL, BOTH_WAYS)


def tensors(
    B: int, T: int, S: int, H: int = 4, K: int = 2, D: int = 8, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(T + S)
    shapes = ((B, T, H, D), (B, S, K, D), (B, S, K, D))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def gradients(out: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.autograd.grad((out * weights).sum(), leaves)


# --- alignment, packing, grouped heads --------------------------------------------------------------------------------


@pytest.mark.parametrize("by", KERNELS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_last_query_is_aligned_with_the_last_key(by: str, pattern: Any) -> None:
    q, k, v = tensors(2, 23, 23)
    whole = attention(q, k, v, pattern=pattern, kernel=by)
    for T in (1, 7, 22):
        close(attention(q[:, -T:], k, v, pattern=pattern, kernel=by), whole[:, -T:])


@pytest.mark.parametrize("by", KERNELS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_queries_before_the_first_key_see_what_the_formula_says(by: str, pattern: Any) -> None:
    q, k, v = tensors(1, 9, 4)
    out, lse = attention(q, k, v, pattern=pattern, kernel=by, return_lse=True)
    reference, reference_lse = attention(q, k, v, pattern=pattern, kernel="eager", return_lse=True)
    close(out, reference)
    close(lse, reference_lse)
    if as_pattern(pattern).causal:
        assert torch.equal(out[:, :5], torch.zeros_like(out[:, :5]))


@pytest.mark.parametrize("by", KERNELS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_segments_are_separate_calls(by: str, pattern: Any) -> None:
    leaves = tensors(1, 29, 29)
    lengths = (11, 1, 17)
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    packed = attention(*leaves, pattern=pattern, segment_ids=ids, kernel=by)
    parts = zip(*(leaf.split(lengths, 1) for leaf in leaves), strict=True)
    apart = torch.cat([attention(*part, pattern=pattern, kernel=by) for part in parts], 1)
    close(packed, apart)
    for got, expected in zip(gradients(packed, leaves), gradients(apart, leaves), strict=True):
        close(got, expected)


@pytest.mark.parametrize("by", KERNELS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_segments_of_queries_and_keys_may_disagree(by: str, pattern: Any) -> None:
    """Cross attention between packed sequences: a token's index then says nothing of what it sees."""
    leaves = tensors(1, 12, 12)
    mine, theirs = (torch.repeat_interleave(torch.arange(2), torch.tensor(n))[None] for n in ((3, 9), (8, 4)))
    masks = {"segment_ids": mine, "kv_segment_ids": theirs}
    expected = attention(*leaves, pattern=pattern, **masks, kernel="eager")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunkwise, "QUERIES", 2)
        out = attention(*leaves, pattern=pattern, **masks, kernel=by)
        found = gradients(out, leaves)
    close(out, expected)
    for got, grad in zip(found, gradients(expected, leaves), strict=True):
        close(got, grad)
    if pattern == "full":
        q, k, v = leaves
        close(out[:, :3], attention(q[:, :3], k[:, :8], v[:, :8], pattern="full", kernel="eager"))
        close(out[:, 3:], attention(q[:, 3:], k[:, 8:], v[:, 8:], pattern="full", kernel="eager"))


@pytest.mark.parametrize("by", KERNELS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_grouped_heads_are_repeated_heads(by: str, pattern: Any) -> None:
    q, k, v = tensors(2, 19, 19, H=6, K=2)
    repeated = [tensor.repeat_interleave(3, 2) for tensor in (k, v)]
    grouped, plain_heads = (attention(q, *kv, pattern=pattern, kernel=by) for kv in ((k, v), repeated))
    close(grouped, plain_heads)
    for got, expected in zip(gradients(grouped, [q, k, v]), gradients(plain_heads, [q, k, v]), strict=True):
        close(got, expected)


# --- linear biases ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["chunkwise", "eager"])
@pytest.mark.parametrize("pattern", ["causal", "full"])
@pytest.mark.parametrize("queries", [17, 1])
def test_linear_biases_take_slope_times_distance_from_the_scores(by: str, pattern: str, queries: int) -> None:
    """softmax(q·k / √D − slope · |i − j|) v, outputs and gradients, of all queries and of the last one alone."""
    q, k, v = leaves = tensors(2, 17, 17)
    slopes = torch.tensor([0.03, 0.2, 0.7, 1.5], dtype=torch.float64)
    i, j = torch.arange(17)[-queries:, None], torch.arange(17)
    scores = torch.einsum("bihd,bjhd->bhij", q[:, -queries:], k.repeat_interleave(2, 2)) / 8**0.5
    scores = scores - slopes[:, None, None] * (i - j).abs()
    if pattern == "causal":
        scores = scores.masked_fill(j > i, -torch.inf)
    expected = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v.repeat_interleave(2, 2))
    out = attention(q[:, -queries:], k, v, pattern=pattern, alibi_slopes=slopes, kernel=by)
    close(out, expected)
    for got, grad in zip(gradients(out, leaves), gradients(expected, leaves), strict=True):
        close(got, grad)


# --- empty rows and the lse -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("left", [True, False])
def test_rows_that_see_nothing_are_zero_with_finite_gradients(
    by: str, dtype: torch.dtype, pattern: Any, left: bool
) -> None:
    leaves = tensors(2, 10, 10, dtype=dtype)
    real = torch.arange(10) >= 4 if left else torch.arange(10) < 6
    mask = torch.stack([real, torch.zeros(10, dtype=torch.bool)])
    out, lse = attention(*leaves, pattern=pattern, attention_mask=mask, kernel=by, return_lse=True)
    assert torch.equal(out[~mask], torch.zeros_like(out[~mask]))
    assert torch.equal(lse.isneginf(), ~mask[:, None].expand_as(lse))
    assert lse.masked_fill(~mask[:, None], 0).isfinite().all()
    for grad in gradients(out, leaves):
        assert grad.isfinite().all()
        assert torch.equal(grad[~mask], torch.zeros_like(grad[~mask]))
        assert (grad[0, mask[0]] != 0).any()


@pytest.mark.parametrize("by", ["sdpa", "chunkwise"])
def test_an_lse_of_exactly_zero_is_not_an_empty_row(by: str) -> None:
    """A lone visible key with a score of 0 has lse 0, which torch's kernel also gives for a row that sees nothing."""
    q, k, v = tensors(1, 3, 3, H=1, K=1)
    mask = torch.tensor([[False, True, True]])
    out, lse = attention(torch.zeros_like(q), k, v, attention_mask=mask, kernel=by, return_lse=True)
    assert lse[0, 0, 0] == -torch.inf
    assert lse[0, 0, 1] == 0
    close(out[:, 1], v[:, 1])


@pytest.mark.parametrize("by", ["sdpa", "chunkwise"])
def test_partial_results_merge_by_lse_and_gradients_add(by: str) -> None:
    """What a ring of devices relies on: the backward of a part, given the whole's out and lse, is its share."""
    implementation = {"sdpa": sdpa.KERNEL, "chunkwise": chunkwise.KERNEL}[by]
    options = AttentionOptions(pattern=as_pattern("full"))
    q, k, v = (tensor.detach() for tensor in tensors(1, 6, 10))
    whole = implementation.forward({"q": q, "k": k, "v": v}, options)
    halves = [{"q": q, "k": k[:, part], "v": v[:, part]} for part in (slice(0, 4), slice(4, 10))]
    a, b = (implementation.forward(half, options) for half in halves)
    share = torch.sigmoid(b["lse"] - a["lse"]).transpose(1, 2)[..., None]
    close(a["out"] + share * (b["out"] - a["out"]), whole["out"])
    close(torch.logaddexp(a["lse"], b["lse"]), whole["lse"])
    dout = torch.ones_like(q)
    expected = implementation.backward({"out": dout}, {"q": q, "k": k, "v": v}, whole, options)
    parts = [implementation.backward({"out": dout}, half, whole, options) for half in halves]
    close(parts[0]["q"] + parts[1]["q"], expected["q"])
    close(torch.cat([part["k"] for part in parts], 1), expected["k"])
    close(torch.cat([part["v"] for part in parts], 1), expected["v"])


# --- the kernels beside the reference ---------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.one_of(plain(), extras()), st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 2**22]))
def test_tile_sizes_do_not_show(case: Case, queries: int, keys: int, tile: int) -> None:
    case = prepared(case, torch.float64)
    grads = cotangents(case)
    expected = evaluate(kernel_call("chunkwise"), case, grads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunkwise, "QUERIES", queries)
        patch.setattr(chunkwise, "KEYS", keys)
        patch.setattr(chunkwise, "TILE", tile)
        got = evaluate(kernel_call("chunkwise"), case, grads)
    largest = max(
        1.0, *(tensor[tensor.isfinite()].abs().max().item() for tensor in expected.values() if tensor.isfinite().any())
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-9, atol=1e-11 * largest)


@pytest.mark.parametrize("by", ["sdpa", "chunkwise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", ["causal", {**GLOBAL, "window": 100}, {**BOTH_WAYS, "window": 100}], ids=str)
def test_lengths_beyond_a_tile_keep_the_error_budget(by: str, dtype: torch.dtype, pattern: Any) -> None:
    T = 600
    q, k, v = (tensor.detach() for tensor in tensors(2, T, T, H=2, K=1, D=16))
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor((150, 350, 100))).expand(2, T).contiguous()
    real = torch.stack([torch.arange(T) >= 200, torch.arange(T) < 580])
    for masks in ({}, {"segment_ids": ids, "attention_mask": real}):
        case = Case(OPERATOR, {"q": q, "k": k, "v": v, **masks}, AttentionOptions(pattern=as_pattern(pattern)), False)
        verdicts = conforms(MECHANISM, kernel_call(by), prepared(case, dtype), dtype)
        assert all(verdict.ok for verdict in verdicts), "\n".join(map(str, verdicts))
