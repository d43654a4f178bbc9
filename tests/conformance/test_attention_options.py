"""Attention's options together: every two values of two options, on every kernel, run or refuse in words."""

from __future__ import annotations

from typing import Any

import covering
import pytest
import torch
from torch import Tensor

from attncompiler.errors import InputError, KernelError
from attncompiler.mechanisms.attention.mechanism import MECHANISM
from attncompiler.mechanisms.attention.op import OPERATOR, AttentionOptions, as_pattern, attention
from attncompiler.mechanisms.case import Case, values
from attncompiler.testing.conformance import conforms, kernel_call, prepared, refusals_of

PLAIN = ("chunkwise", "eager")
"""the kernels in plain torch, which serve everything"""
FACTORS: dict[str, list[Any]] = {
    "kernel": [kernel.name for kernel in MECHANISM.kernels if "cpu" in kernel.needs.device_types],
    "dtype": [torch.float32, torch.bfloat16, torch.float64],
    "pattern": [
        {"kind": "causal"},
        {"kind": "full"},
        {"kind": "sliding_window", "window": 7, "global_tokens": 2},
        {"kind": "sliding_window", "window": 5, "global_tokens": 3, "causal": False},
        {"kind": "strided", "stride": 3, "window": 2, "block_size": 4},
        {"kind": "local_global", "block_size": 4, "local_blocks": 2, "global_blocks": 1, "causal": False},
        {"kind": "random", "block_size": 4, "random_blocks": 2, "global_blocks": 1},
        {"kind": "chunked", "chunk": 11},
    ],
    "softcap": [None, 3.0],
    "sinks": [False, True],
    "alibi": [False, True],
    "dropout": [0.0, 0.3],
    "scale": [None, 0.3],
    "heads": [(2, 2), (4, 1), (4, 2)],
    "widths": [(16, 16), (16, 24), (256, 256), (20, 8)],
    "lengths": [(33, 33), (5, 40), (1, 29), (40, 30)],
    "segments": [False, True],
    "padding": [None, "left", "right"],
    "positions": [False, True],
    "deterministic": [False, True],
    "values": ["normal", "outliers"],
}
ROWS = covering.array(FACTORS)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row" in metafunc.fixturenames:
        device_type = metafunc.config.getoption("--device").partition(":")[0]
        kernels = [kernel.name for kernel in MECHANISM.kernels if device_type in kernel.needs.device_types]
        same = kernels == FACTORS["kernel"]
        metafunc.parametrize("row", ROWS if same else covering.array({**FACTORS, "kernel": kernels}), ids=str)


def test_the_rows_cover_every_pair() -> None:
    """Over the whole product of factors, and with far fewer rows than it has."""
    numbered = [{name: FACTORS[name].index(row[name]) for name in FACTORS} for row in ROWS]
    assert set().union(*map(covering.covered, numbered)) == covering.pairs(FACTORS)
    assert len(ROWS) < 60


def case_of(row: dict[str, Any]) -> Case:
    (H, K), (D, V), (T, S) = row["heads"], row["widths"], row["lengths"]
    generator = torch.Generator().manual_seed(len(str(row)))
    kind = row["values"]
    tensors: dict[str, Tensor] = {
        "q": values(kind, (2, T, H, D), generator),
        "k": values("normal", (2, S, K, D), generator),
        "v": values(kind, (2, S, K, V), generator),
    }
    if row["sinks"]:
        tensors["sinks"] = values("normal", (H,), generator)
    if row["alibi"]:
        tensors["alibi_slopes"] = torch.rand(H, generator=generator, dtype=torch.float64)
    if row["dropout"]:
        tensors["dropout_seed"] = torch.tensor([12345678901])
    if row["segments"]:
        ids = torch.arange(max(T, S)).div(9, rounding_mode="floor").expand(2, -1)
        tensors |= {"segment_ids": ids[:, -T:].contiguous(), "kv_segment_ids": ids[:, -S:].contiguous()}
    if row["padding"]:
        index, pads = torch.arange(S), torch.tensor([[3], [0]])
        tensors["attention_mask"] = index >= pads if row["padding"] == "left" else index < S - pads
    if row["positions"]:
        order = torch.randperm(S, generator=generator).expand(2, S).contiguous()
        tensors |= {"kv_positions": order, "q_positions": (torch.arange(T) + S - T).clamp(min=0).repeat(2, 1)}
    options = AttentionOptions(
        pattern=as_pattern(row["pattern"]),
        scale=row["scale"],
        softcap=row["softcap"],
        dropout=row["dropout"],
        layer=2,
        deterministic=row["deterministic"],
    )
    return Case(OPERATOR, tensors, options, causal=options.pattern.causal)


def test_every_pair_of_options_runs_or_refuses_in_words(row: dict[str, Any], device: str) -> None:
    kernel = MECHANISM.kernel(row["kernel"])
    assert kernel is not None
    case = prepared(case_of(row), row["dtype"], device)
    refused = refusals_of(kernel, case)
    if not refused:
        verdicts = conforms(MECHANISM, kernel_call(kernel.name), case, row["dtype"])
        assert all(verdict.ok for verdict in verdicts), "\n".join(map(str, verdicts))
        return
    assert kernel.name not in PLAIN
    with pytest.raises(KernelError) as error:
        kernel_call(kernel.name)(case)
    message = str(error.value)
    assert message.startswith(
        f"E501 no kernel could run attention (forward) on {device}: {kernel.name}: {kernel.name} "
    )
    said = {"softcap": "softcap = 3.0", "alibi": "alibi", "dropout": "dropout = 0.3"}
    for option, words in said.items():
        offered = kernel.needs.at(device).refuse(option, row[option]) is None
        assert (f"does not offer {words}" in message) == (bool(row[option]) and not offered)


def test_sdpa_refuses_no_more_than_it_must() -> None:
    """Of the rows for sdpa those without softcap, ALiBi, dropout and V ≠ D are served."""
    for row in ROWS:
        if row["kernel"] == "sdpa":
            needed = row["softcap"] or row["alibi"] or row["dropout"] or row["widths"][0] != row["widths"][1]
            kernel = MECHANISM.kernel("sdpa")
            assert kernel is not None
            assert bool(refusals_of(kernel, prepared(case_of(row), row["dtype"]))) == bool(needed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sink", [89.0, 800.0])
def test_a_large_sink_does_not_reach_rows_that_see_nothing(sink: float, dtype: torch.dtype) -> None:
    """Its exponential is ∞ where no score stands beside it."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, heads, 8, generator=generator, dtype=dtype) for heads in (2, 1, 1))
    found = {}
    for kernel in ("eager", "sdpa", "chunkwise"):
        given = [tensor.clone().requires_grad_() for tensor in (q, k, v, torch.tensor([sink, 0.5], dtype=dtype))]
        mask = torch.tensor([[0, 0, 1, 1]])
        out = attention(*given[:3], sinks=given[3], attention_mask=mask, kernel=kernel)
        found[kernel] = [out, *torch.autograd.grad(out.sum(), given)]
    for kernel, results in found.items():
        for result, exact in zip(results, found["eager"], strict=True):
            assert result.isfinite().all(), kernel
            torch.testing.assert_close(result, exact, rtol=1e-4, atol=1e-6)


# --- dropout --------------------------------------------------------------------------------------------------------


def dropped(share: float, seed: int, T: int = 64, S: int = 96, kernel: str = "chunkwise") -> Tensor:
    """What dropout multiplies each probability with, (2, 4, T, S): read off by values that are an identity."""
    q, k = torch.zeros(2, T, 4, 8), torch.zeros(2, S, 4, 8)
    v = torch.eye(S).expand(2, 4, S, S).transpose(1, 2)
    out = attention(q, k, v, pattern="full", dropout=share, dropout_seed=torch.tensor([seed]), kernel=kernel)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2) * S


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8, torch.int32])
def test_a_dropout_seed_that_is_no_int64_is_refused(dtype: torch.dtype) -> None:
    q = torch.zeros(1, 4, 2, 8)
    with pytest.raises(InputError, match=f"E402 dropout_seed must be torch.int64, not {dtype}"):
        attention(q, q, q, dropout=0.5, dropout_seed=torch.ones(1).to(dtype))


@pytest.mark.parametrize("name", ["chunkwise", "eager"])
def test_dropout_keeps_the_share_it_should_and_scales_it(name: str) -> None:
    for share in (0.1, 0.5, 0.9):
        factors = dropped(share, 7, kernel=name)
        kept = factors != 0
        torch.testing.assert_close(factors[kept], torch.full_like(factors[kept], 1 / (1 - share)))
        n, p = kept.numel(), 1 - share
        assert abs(float(kept.double().mean()) - p) < 5 * (p * share / n) ** 0.5


def test_drops_are_independent_of_each_other() -> None:
    """Correlations between neighbours on every axis, and between seeds, are those of independent draws."""
    drops = (dropped(0.5, 3) != 0).double() * 2 - 1
    others = (dropped(0.5, 4) != 0).double() * 2 - 1
    n = drops.numel()
    for axis in range(4):
        for distance in (1, 2, 4, 16):
            if distance < drops.shape[axis]:
                near = drops.narrow(axis, 0, drops.shape[axis] - distance)
                far = drops.narrow(axis, distance, drops.shape[axis] - distance)
                assert abs(float((near * far).mean())) < 5 * near.numel() ** -0.5
    assert abs(float((drops * others).mean())) < 5 * n**-0.5
    # rows and columns as often as they should be: no head, row or column is favoured
    for axes in ((0, 1, 2), (0, 1, 3), (2, 3)):
        means = drops.mean(axes)
        z = means * (n / means.numel()) ** 0.5
        assert float(z.abs().max()) < 5


def test_the_seed_alone_decides() -> None:
    assert torch.equal(dropped(0.3, 5), dropped(0.3, 5))
    assert torch.equal(dropped(0.3, 5), dropped(0.3, 5, kernel="eager"))
    assert not torch.equal(dropped(0.3, 5), dropped(0.3, 6))
    assert not torch.equal(dropped(0.3, 5), dropped(0.3, 5 + 2**40)), "both halves of a seed count"


def test_without_a_seed_torchs_generator_is_drawn_from() -> None:
    q = torch.randn(1, 9, 2, 8)

    def call() -> Tensor:
        out = attention(q, q, q, dropout=0.5)
        assert isinstance(out, Tensor)
        return out

    torch.manual_seed(3)
    first, second = call(), call()
    torch.manual_seed(3)
    assert torch.equal(call(), first)
    assert not torch.equal(first, second)


def test_the_expectation_is_attention_without_dropout() -> None:
    """The mean over 2,000 seeds is within five of its standard errors."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 6, 2, 8, generator=generator) for _ in range(3))
    exact = attention(q, k, v, kernel="eager")
    draws = []
    for seed in range(2000):
        draws.append(attention(q, k, v, dropout=0.4, dropout_seed=torch.tensor([seed]), kernel="chunkwise"))
    stacked = torch.stack(draws)  # type: ignore[arg-type]
    error = (stacked.mean(0) - exact).abs() / (stacked.std(0) / 2000**0.5 + 1e-7)
    assert float(error.max()) < 5
