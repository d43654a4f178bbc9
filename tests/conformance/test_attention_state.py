"""Attention's decode state: in whatever pieces and with whatever padding, it is each sequence at once and alone."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from attncompiler.mechanisms.attention import op, state
from attncompiler.mechanisms.attention.cases import PATTERNS
from attncompiler.mechanisms.attention.layer import AttentionSite
from attncompiler.mechanisms.attention.mechanism import AttentionPolicy
from attncompiler.mechanisms.attention.pattern import Chunked, LocalGlobal, Pattern, SlidingWindow, retained
from attncompiler.mechanisms.attention.visibility import pattern_visible
from attncompiler.runtime.context import Chain, MixerContext
from attncompiler.testing.budget import Results, judge, oracle

H, K, D = 4, 2, 8
CAUSAL = PATTERNS.filter(lambda pattern: pattern.causal)
FORGETTING = CAUSAL.filter(lambda pattern: retained(pattern).recent is not None)
KERNELS = ("sdpa", "chunkwise", "eager")
SCORES = ("alibi_slopes", "sinks", "softcap")
CONTEXT = MixerContext(K * D, 0, 1, 64, 1e-5, Chain("layer", KERNELS))


def empty(pattern: Pattern, batch: int, max_length: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    policy = AttentionPolicy(
        kind="attention", num_attention_heads=H, num_key_value_heads=K, head_dim=D, pattern=pattern
    )
    return state.init_state(policy, CONTEXT, batch, max_length, torch.device("cpu"), dtype)


def site(pattern: Pattern, kernel: str, softcap: float | None = None) -> AttentionSite:
    options = op.AttentionOptions(pattern=pattern, softcap=softcap)
    return AttentionSite(options, Chain("site", (kernel,), "raise"))


def inputs(batch: int, length: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(batch, length, H if name == "q" else K, D, generator=generator) for name in "qkv"}


def by_row(decode: dict[str, Any], tensors: dict[str, Tensor], grad: Tensor, dtype: torch.dtype) -> Results:
    """The reference on each sequence alone, without its padding; padding gives 0."""
    leaves = {name: tensor.detach().to(dtype, copy=True).requires_grad_() for name, tensor in tensors.items()}
    out = torch.zeros(grad.shape, dtype=dtype) + 0 * leaves["q"]
    options = {"pattern": decode["pattern"], "softcap": decode["softcap"], "kernel": "eager"}
    for b, row in enumerate(decode["real"]):
        if row.any():
            alone = {name: leaf[b, row][None] if leaf.dim() == 4 else leaf for name, leaf in leaves.items()}
            found = op.attention(**alone, **options)
            out = out.index_put((torch.tensor(b), row.nonzero()[:, 0]), found[0])
    learned = {name: leaf for name, leaf in leaves.items() if name != "alibi_slopes"}
    found = torch.autograd.grad((out * grad.to(dtype)).sum(), list(learned.values()), allow_unused=True)
    grads = {
        f"grad {n}": torch.zeros_like(t) if g is None else g for (n, t), g in zip(learned.items(), found, strict=True)
    }
    return {"out": out.detach().double(), **{name: each.double() for name, each in grads.items()}}


def assert_same(found: Results, decode: dict[str, Any], tensors: dict[str, Tensor], grad: Tensor) -> None:
    exact, low = (by_row(decode, tensors, grad, dtype) for dtype in (torch.float64, torch.float32))
    errors = {name: (low[name] - exact[name]).abs() for name in exact}
    judged = oracle(exact, errors, tensors, torch.float32)
    wanted = judged if len(found) > 1 else oracle({"out": exact["out"]}, {"out": errors["out"]}, tensors, torch.float32)
    assert all(verdict.ok for verdict in judge(found, wanted)), [str(each) for each in judge(found, wanted)]


@st.composite
def decodes(draw: st.DrawFn) -> dict[str, Any]:
    """A pattern, what is done to scores, and a batch of sequences in pieces; `real` (B, T), with padding anywhere."""
    length, batch = draw(st.integers(1, 40)), draw(st.integers(1, 3))
    cuts = draw(st.sets(st.integers(1, length), max_size=6))
    by_one = draw(st.integers(0, length))
    real = torch.ones(batch, length, dtype=torch.bool)
    if draw(st.booleans()):
        seed = draw(st.integers(0, 2**16))
        real = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < draw(
            st.sampled_from([0.2, 0.8])
        )
    scores = draw(st.sampled_from([(), ("alibi_slopes",), ("sinks",), ("softcap",), SCORES]))
    return {
        "pattern": draw(CAUSAL),
        "kernel": draw(st.sampled_from(KERNELS if set(scores) <= {"sinks"} else ("chunkwise", "eager"))),
        "softcap": 2.0 if "softcap" in scores else None,
        "scores": [name for name in scores if name != "softcap"],
        "bounds": sorted({0, *cuts, *range(by_one, length), length}),
        "real": real,
        "room": draw(st.integers(0, 30)),
        "seed": draw(st.integers(0, 2**16)),
    }


def given_to(decode: dict[str, Any]) -> dict[str, Tensor]:
    """q, k, v of the whole batch, and sinks and slopes where there are some."""
    (batch, length), seed = decode["real"].shape, decode["seed"]
    generator = torch.Generator().manual_seed(seed + 2)
    return inputs(batch, length, seed) | {name: torch.rand(H, generator=generator) for name in decode["scores"]}


def run(decode: dict[str, Any], tensors: dict[str, Tensor], cache: dict[str, Any]) -> Tensor:
    """All pieces of a decode; a mask is given where there is padding in the piece."""
    made = site(decode["pattern"], decode["kernel"], decode["softcap"])
    scores = {name: tensors[name] for name in decode["scores"]}
    outs = []
    for start, stop in pairwise(decode["bounds"]):
        mask = decode["real"][:, start:stop]
        piece = {name: tensors[name][:, start:stop] for name in "qkv"}
        if bool(mask.all()):
            out, cache = made(**piece, **scores, state=cache)
        else:
            # what padding holds is nobody's business
            dirty = {n: torch.where(mask[..., None, None], t, torch.full_like(t, torch.nan)) for n, t in piece.items()}
            out, cache = made(**dirty, **scores, attention_mask=mask, state=cache)
        outs.append(out)
    return torch.cat(outs, 1)


def in_pieces(pattern: Pattern, scores: tuple[str, ...], length: int = 20) -> dict[str, Any]:
    """A decode by one token at a time, without padding."""
    real = torch.ones(2, length, dtype=torch.bool)
    given = {"pattern": pattern, "kernel": "chunkwise", "softcap": None, "scores": scores, "real": real}
    return {**given, "bounds": list(range(length + 1)), "room": 0, "seed": 0}


@given(decodes())
@example(in_pieces(SlidingWindow(window=5, global_tokens=2), ("alibi_slopes",)))
@example(in_pieces(LocalGlobal(block_size=3, local_blocks=1, global_blocks=1), ("alibi_slopes",)))
@example(in_pieces(Chunked(chunk=6), ("alibi_slopes", "sinks")))
def test_in_pieces_it_is_each_sequence_alone(decode: dict[str, Any]) -> None:
    """Outputs where the cache is written in place, outputs and gradients where autograd forbids that."""
    batch, length = decode["real"].shape
    tensors = given_to(decode)
    grad = torch.randn(batch, length, H, D, generator=torch.Generator().manual_seed(decode["seed"] + 1))
    cache = empty(decode["pattern"], batch, length + decode["room"])
    with torch.no_grad():
        out = run(decode, tensors, cache)
    assert_same({"out": out}, decode, tensors, grad)
    leaves = {name: tensor.clone().requires_grad_(name != "alibi_slopes") for name, tensor in tensors.items()}
    cache = empty(decode["pattern"], batch, length + decode["room"])
    out = run(decode, leaves, cache)
    (out * grad).sum().backward()
    grads = {
        f"grad {name}": torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        for name, leaf in leaves.items()
        if leaf.requires_grad
    }
    assert_same({"out": out.detach(), **grads}, decode, tensors, grad)
    assert not cache["k"].any()  # what was given is untouched where a gradient may need it


@given(FORGETTING, st.integers(0, 60), st.integers(0, 60))
@example(LocalGlobal(block_size=4, local_blocks=2, global_blocks=1), 9, 3)
def test_what_is_forgotten_is_never_seen_again(pattern: Pattern, position: int, distance: int) -> None:
    """And what is kept beside the first tokens is at most a block more than what is seen."""
    kept = retained(pattern)
    assert kept.recent is not None
    start = kept.start(position)
    keys = torch.arange(position + 1)
    later = torch.tensor([[position], [position + distance]])
    seen = pattern_visible(pattern, later, keys[None])
    assert not seen[:, kept.first : start].any()
    assert seen[0, start:].all()
    assert seen[0, : kept.first].all()
    assert position + 1 - start <= kept.recent < position + 1 - start + kept.block_size or start == 0


def test_the_cache_has_the_size_that_the_pattern_asks_for_whatever_the_length() -> None:
    for length in (1000, 10**6):
        assert empty(SlidingWindow(window=100, global_tokens=7), 1, length)["k"].shape[1] == 107
        assert empty(Chunked(chunk=64), 1, length)["k"].shape[1] == 64
        assert empty(LocalGlobal(block_size=8, local_blocks=3, global_blocks=2), 1, length)["v"].shape[1] == 40
    assert empty(SlidingWindow(window=100, global_tokens=7), 1, 50)["k"].shape[1] == 50


@given(CAUSAL, st.booleans())
def test_one_step_without_padding_writes_where_it_is_and_reads_without_a_copy(pattern: Pattern, wrapped: bool) -> None:
    """No key moves, whatever the length: a step's inputs lie in the cache's own memory, and no mask is made."""
    assume(not isinstance(pattern, LocalGlobal))
    cache = empty(pattern, 2, 64)
    memory = cache["k"].data_ptr()
    tensors = inputs(2, 60, 0)
    with torch.no_grad():
        cut = 59 if wrapped else 1
        _, cache = site(pattern, "eager")(**{n: t[:, :cut] for n, t in tensors.items()}, state=cache)
        query = {name: tensor[:, cut : cut + 1] for name, tensor in tensors.items()}
        _, reading, after, _ = state.extend(retained(pattern), cache, **query)
    assert after["k"].data_ptr() == reading["k"].data_ptr() == memory
    assert reading.keys() == {"k", "v"}


def test_a_cache_of_a_narrower_dtype_holds_its_dtype() -> None:
    cache = empty(SlidingWindow(window=4), 1, 64, torch.bfloat16)
    tensors = inputs(1, 9, 0)
    made = site(SlidingWindow(window=4), "eager")
    with torch.no_grad():
        for t in range(9):
            out, cache = made(**{name: tensor[:, t : t + 1] for name, tensor in tensors.items()}, state=cache)
    assert cache["k"].dtype == torch.bfloat16
    assert out.dtype == torch.float32
    rounded = {"q": tensors["q"], **{name: tensors[name].bfloat16().float() for name in "kv"}}
    expected = op.attention(**rounded, pattern=SlidingWindow(window=4), kernel="eager")
    torch.testing.assert_close(out, expected[:, -1:])


def test_a_state_that_a_gradient_reads_is_not_overwritten() -> None:
    """Not by a later step without gradients either."""
    pattern = SlidingWindow(window=3)
    tensors = {name: tensor.requires_grad_() for name, tensor in inputs(1, 6, 0).items()}
    made = site(pattern, "eager")
    out, cache = made(**{name: tensor[:, :5] for name, tensor in tensors.items()}, state=empty(pattern, 1, 8))
    held = copy.deepcopy(cache["k"].detach())
    with torch.no_grad():
        made(**{name: tensor[:, 5:] for name, tensor in tensors.items()}, state=cache)
    assert torch.equal(cache["k"], held)
    out.sum().backward()
    expected = op.attention(*(tensors[name][:, :5].detach().requires_grad_() for name in "qkv"), pattern=pattern)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("outside", [True, False])
def test_inference_mode_may_begin_and_end_anywhere(outside: bool) -> None:
    pattern, tensors = SlidingWindow(window=3), inputs(1, 6, 0)
    made = site(pattern, "eager")
    expected = op.attention(**tensors, pattern=pattern, kernel="eager")
    found = []
    with torch.inference_mode(not outside):
        cache = empty(pattern, 1, 6)
    for t in range(6):
        with torch.inference_mode(t % 2 == 0):
            out, cache = made(**{name: tensor[:, t : t + 1] for name, tensor in tensors.items()}, state=cache)
            found.append(out)
    torch.testing.assert_close(torch.cat([each.clone() for each in found], 1), expected)
