"""A strided pattern of small blocks in two parts is the pattern: results and gradients, whatever its sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attncompiler.mechanisms.attention import residues
from attncompiler.mechanisms.attention.kernels import chunkwise
from attncompiler.mechanisms.attention.mechanism import MECHANISM
from attncompiler.mechanisms.attention.op import OPERATOR, AttentionOptions
from attncompiler.mechanisms.attention.pattern import Strided
from attncompiler.mechanisms.case import Case, values
from attncompiler.testing.conformance import conforms, kernel_call, prepared

PATTERNS = st.builds(
    Strided, stride=st.integers(2, 9), window=st.integers(1, 12), block_size=st.sampled_from([1, 2, 3, 8])
)


@settings(max_examples=60, deadline=None)
@given(PATTERNS, st.integers(1, 90), st.integers(0, 2**20), st.sampled_from([torch.float32, torch.bfloat16]), st.data())
def test_two_parts_are_the_whole(pattern: Strided, T: int, seed: int, dtype: torch.dtype, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "q": values("normal", (2, T, 4, 8), generator),
        "k": values("normal", (2, T, 2, 8), generator),
        "v": values("outliers", (2, T, 2, 12), generator),
    }
    if data.draw(st.booleans()):
        tensors["sinks"] = values("normal", (4,), generator)
    options = AttentionOptions(pattern=pattern, softcap=data.draw(st.sampled_from([None, 4.0])))
    case = prepared(Case(OPERATOR, tensors, options, causal=True), dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residues, "SHORT", 0)
        assert residues.splits(case.tensors, case.options)
        verdicts = conforms(MECHANISM, kernel_call("chunkwise"), case, dtype)
    assert all(verdict.ok for verdict in verdicts), "\n".join(map(str, verdicts))


@pytest.mark.parametrize(
    ("half", "sinks", "softcap"),
    [
        (True, True, 4.0),
        pytest.param(False, True, None, marks=pytest.mark.slow),
        pytest.param(True, False, None, marks=pytest.mark.slow),
    ],
)
def test_single_tokens_are_two_parts_on_a_gpu(half: bool, sinks: bool, softcap: float | None, device: str) -> None:
    """Heads of 64 are those that some GPUs have kernels of their own for."""
    pytest.importorskip("triton")
    from attncompiler.mechanisms.attention.flash import kernel

    D, generator = 16 if device == "cpu" else 64, torch.Generator().manual_seed(0)
    sizes = {"q": (2, 141, 4, D), "k": (2, 141, 2, D), "v": (2, 141, 2, D), "sinks": (4,)}
    tensors = {name: values("normal", size, generator) for name, size in sizes.items() if sinks or name != "sinks"}
    options = AttentionOptions(pattern=Strided(stride=2, window=5), softcap=softcap)
    dtype = torch.float16 if half else torch.float32
    case, calls = prepared(Case(OPERATOR, tensors, options, causal=True), dtype, device), []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_forward", "_backward"):
            real = getattr(kernel, name)
            patch.setattr(kernel, name, lambda *given, real=real: (calls.append(given[-1].pattern), real(*given))[1])
        verdicts = conforms(MECHANISM, kernel_call("triton"), case, dtype)
    assert all(verdict.ok for verdict in verdicts), "\n".join(map(str, verdicts))
    assert {pattern.kind for pattern in calls} == {"sliding_window", "causal"}


def test_only_calls_without_masks_positions_and_counters_are_split() -> None:
    q = torch.zeros(1, 100, 1, 8)
    plain = {"q": q, "k": q, "v": q}
    pattern = Strided(stride=8, window=8)
    options = AttentionOptions(pattern=pattern)
    assert residues.splits(plain, options)
    ids, short = torch.zeros(1, 100, dtype=torch.int64), torch.zeros(1, 20, 1, 8)
    for name in ("segment_ids", "attention_mask", "alibi_slopes", "q_positions"):
        assert not residues.splits({**plain, name: ids}, options)
    assert not residues.splits({"q": short, "k": q, "v": q}, options)
    assert not residues.splits({"q": short, "k": short, "v": short}, options)
    for other in ({"dropout": 0.1}, {"pattern": pattern.model_copy(update={"causal": False})}):
        assert not residues.splits(plain, options.model_copy(update=other))


def test_the_parts_meet_few_keys_that_are_not_seen() -> None:
    """Pairs computed for a stride of 64 tokens among 4096: a fifteenth of those that whole tiles would hold."""
    met = 0
    made = chunkwise.Call.blocks

    def counted(call: chunkwise.Call):  # type: ignore[no-untyped-def]
        nonlocal met
        for block in made(call):
            met += (block.batch.stop - block.batch.start) * block.length * sum(map(len, block.columns))
            yield block

    q = torch.zeros(1, 4096, 1, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunkwise.Call, "blocks", counted)
        chunkwise.forward({"q": q, "k": q, "v": q}, AttentionOptions(pattern=Strided(stride=64, window=64)))
    assert met < 4096**2 / 2 / 7
