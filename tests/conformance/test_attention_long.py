"""Every attention kernel at lengths of several tiles, where the tiles it skips matter as much as those it meets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attncompiler.mechanisms.attention.op import OPERATOR, AttentionOptions, as_pattern
from attncompiler.mechanisms.base import Kernel, Mechanism
from attncompiler.mechanisms.case import Case
from attncompiler.testing.conformance import conforms, kernel_call, prepared, refusals_of

PATTERNS: list[dict[str, Any]] = [
    {"kind": "full"},
    {"kind": "causal"},
    {"kind": "sliding_window", "window": 100},
    {"kind": "sliding_window", "window": 70, "causal": False},
    {"kind": "local_global", "block_size": 32, "local_blocks": 2, "global_blocks": 1},
]
LENGTHS = [(70, 130), (80, 30), (150, 420), (320, 320), (300, 170)]
TILED: list[dict[str, Any]] = [
    {"kind": "full"},
    {"kind": "causal"},
    {"kind": "sliding_window", "window": 100, "global_tokens": 20},
    {"kind": "sliding_window", "window": 70, "global_tokens": 20, "causal": False},
    {"kind": "strided", "block_size": 64, "stride": 4, "window": 1},
    {"kind": "local_global", "block_size": 32, "local_blocks": 2, "global_blocks": 1},
    {"kind": "chunked", "chunk": 100},
    {"kind": "random", "block_size": 128, "random_blocks": 1, "local_blocks": 1},
]
"""for lengths of whole tiles of 128"""
FEW_QUERIES = [(1, 600), (3, 700)]
"""as in decoding, where the keys of one sequence may be split among programs"""


def case_of(
    pattern: dict[str, Any], lengths: tuple[int, int], D: int, sinks: bool, masks: bool, segments: bool = False
) -> Case:
    (T, S), generator = lengths, torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {
        "q": torch.randn(2, T, 4, D, generator=generator, dtype=torch.float64),
        "k": torch.randn(2, S, 2, D, generator=generator, dtype=torch.float64),
        "v": torch.randn(2, S, 2, D, generator=generator, dtype=torch.float64),
    }
    if sinks:
        tensors["sinks"] = torch.randn(4, generator=generator, dtype=torch.float64)
    if masks:
        ids = torch.arange(max(T, S)).div(90, rounding_mode="floor").expand(2, -1)
        tensors |= {"segment_ids": ids[:, -T:].contiguous(), "kv_segment_ids": ids[:, -S:].contiguous()}
        tensors["attention_mask"] = torch.arange(S) >= torch.tensor([[0], [37]])
    if segments:
        tensors["segment_ids"] = torch.arange(T) // torch.tensor([[90], [250]])
    options = AttentionOptions(pattern=as_pattern(pattern))
    return Case(OPERATOR, tensors, options, causal=options.pattern.causal)


@pytest.mark.offers("alibi_slopes")
@pytest.mark.parametrize("number", range(len(PATTERNS)), ids=lambda number: str(PATTERNS[number]["kind"]))
def test_long_calls_are_within_the_budget_or_refused(
    mechanism: Mechanism, kernel: Kernel, dtype: torch.dtype, device: str, number: int
) -> None:
    # the interpreter takes seconds for each
    long = LENGTHS if device.partition(":")[0] in kernel.needs.device_types else LENGTHS[:2]
    for lengths in (*long, *FEW_QUERIES):
        for masks in (False, True):
            case = prepared(case_of(PATTERNS[number], lengths, 32, number % 2 == 1, masks), dtype, device)
            if refusals_of(kernel, case):
                assert kernel.name not in ("chunkwise", "eager")
                continue
            verdicts = conforms(mechanism, kernel_call(kernel.name), case, dtype)
            assert all(verdict.ok for verdict in verdicts), "\n".join([f"{lengths} {masks}", *map(str, verdicts)])


@pytest.mark.offers("alibi_slopes")
@pytest.mark.parametrize("number", range(len(TILED)), ids=lambda number: str(TILED[number]["kind"]))
def test_heads_that_some_gpus_have_kernels_of_their_own_for_are_within_the_budget(
    mechanism: Mechanism, kernel: Kernel, dtype: torch.dtype, device: str, number: int
) -> None:
    """Heads of 64 or 128, several tiles long, by lists and by segments."""
    if device == "cpu":
        pytest.skip("no kernel of a CPU knows such heads from others")
    D = 64 if number % 4 < 2 else 128  # each is compiled anew
    for (T, S), segments in (((384, 384), False), ((256, 640), False), ((384, 384), True), ((300, 300), True)):
        case = prepared(case_of(TILED[number], (T, S), D, number % 2 == 1, False, segments), dtype, device)
        if refusals_of(kernel, case):
            continue
        verdicts = conforms(mechanism, kernel_call(kernel.name), case, dtype)
        assert all(verdict.ok for verdict in verdicts), "\n".join([f"{T} {S} {segments}", *map(str, verdicts)])


@pytest.mark.offers("alibi_slopes")
@pytest.mark.parametrize("D", [8, 24, 40, 48, 72, 80, 112])
def test_heads_of_every_width_are_within_the_budget(
    mechanism: Mechanism, kernel: Kernel, dtype: torch.dtype, device: str, D: int
) -> None:
    """Kernels widen heads to what their tiles take, and a library's may count its sums by another width than it adds
    them up (FlashAttention-4's backward, flash-attention #2896): wrong from the second tile on, so two are asked for.
    """
    if device == "cpu" and D not in (24, 80):
        pytest.skip("no kernel of a CPU has tiles of a head's width")
    T = 200 if device in kernel.needs.device_types else 70  # the interpreter takes seconds for each
    for kind in ("causal", "full"):
        case = prepared(case_of({"kind": kind}, (T, T), D, False, False), dtype, device)
        assert not refusals_of(kernel, case)
        verdicts = conforms(mechanism, kernel_call(kernel.name), case, dtype)
        assert all(verdict.ok for verdict in verdicts), "\n".join([f"{kind} {D}", *map(str, verdicts)])
