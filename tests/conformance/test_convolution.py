"""The causal convolution: against torch's own, over segments, padding and steps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attncompiler.blocks import convolution
from attncompiler.blocks.convolution import CausalConv1d, causal_conv1d
from attncompiler.testing.poison import poisoned


def module(channels: int, width: int, bias: bool = True, dtype: torch.dtype = torch.float64) -> CausalConv1d:
    conv = CausalConv1d(channels, width, bias).to(dtype)
    generator = torch.Generator().manual_seed(width)
    with torch.no_grad():
        for p in conv.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return conv


def data(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def torch_form(conv: CausalConv1d, x: Tensor) -> Tensor:
    W, E = conv.weight.shape[-1], conv.weight.shape[0]
    if not x.shape[1]:
        return x
    return F.silu(F.conv1d(F.pad(x.mT, (W - 1, 0)), conv.weight, conv.bias, groups=E)).mT


def results(conv: CausalConv1d, y: Tensor, x: Tensor) -> list[Tensor]:
    grads = torch.autograd.grad(y, [x, *conv.parameters()], data(*y.shape, seed=9).to(y.dtype))
    return [y.detach(), *grads]


@settings(max_examples=40)
@example(length=70, width=4, bias=True, block=32)
@given(st.integers(1, 70), st.integers(1, 6), st.booleans(), st.sampled_from([1, 2, 32, 10_000]))
def test_it_is_torchs_convolution_whatever_the_blocks(length: int, width: int, bias: bool, block: int) -> None:
    conv, x = module(3, width, bias), data(2, length, 5)[..., 1:4].requires_grad_()
    expected = results(conv, torch_form(conv, x), x)
    with pytest.MonkeyPatch.context() as patch, poisoned():
        patch.setattr(convolution, "_blocks", lambda x, w: _blocks_of(block, x, w))
        found = results(conv, conv(x)[0], x)
    torch.testing.assert_close(found, expected)


def _blocks_of(size: int, x: Tensor, weight: Tensor):
    for start in range(0, x.shape[1], size):
        stop = min(start + size, x.shape[1])
        yield start, stop, x[:, max(0, start - weight.shape[-1] + 1) : stop]


@settings(max_examples=25)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 5), st.booleans())
def test_segments_are_separate_calls(lengths: list[int], width: int, padded: bool) -> None:
    conv, T = module(3, width), sum(lengths)
    x = data(2, T, 3).requires_grad_()
    ids = torch.cat([torch.full((n,), 7 - i) for i, n in enumerate(lengths)]).expand(2, T)
    mask = torch.ones(2, T) if padded else None
    found = results(conv, conv(x, mask, ids)[0], x)
    expected = results(conv, torch.cat([torch_form(conv, part) for part in x.split(lengths, 1)], 1), x)
    torch.testing.assert_close(found, expected)


@settings(max_examples=25)
@given(st.integers(1, 12), st.integers(0, 6), st.integers(0, 6), st.integers(1, 5))
def test_padding_gives_nothing_and_takes_nothing(length: int, before: int, after: int, width: int) -> None:
    conv, x = module(3, width), data(1, length, 3)
    mask = F.pad(torch.ones(1, length), (before, after))
    padded = F.pad(x, (0, 0, before, after), value=5.0).requires_grad_()
    y, _ = conv(padded, mask)
    real = slice(before, before + length)
    torch.testing.assert_close(y[:, real], torch_form(conv, x))
    assert (y[mask == 0] == 0).all()
    (grad,) = torch.autograd.grad(y.sum(), padded)
    assert (grad[mask == 0] == 0).all()


@settings(max_examples=40)
@example([[2, 0, 1], [0, 3, 1]], 4)
@given(st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), min_size=1, max_size=6), st.integers(1, 5))
def test_steps_with_padding_anywhere_are_one_call_of_the_real_tokens(pieces: list[list[int]], width: int) -> None:
    """Each step gives a row a number of real tokens among padding; the rows differ."""
    conv = module(3, width)
    rows = [data(1, sum(piece[b % len(piece)] for piece in pieces), 3, seed=b) for b in range(2)]
    state, taken, found = torch.zeros(2, 3, width - 1, dtype=torch.float64), [0, 0], [[], []]
    for number, piece in enumerate(pieces):
        counts = [piece[b % len(piece)] for b in range(2)]
        T = max(counts) + 1
        x, mask = torch.full((2, T, 3), 9.0, dtype=torch.float64), torch.zeros(2, T)
        for b in range(2):
            places = torch.randperm(T, generator=torch.Generator().manual_seed(number))[: counts[b]].sort().values
            x[b, places] = rows[b][0, taken[b] : taken[b] + counts[b]]
            mask[b, places] = 1
            taken[b] += counts[b]
        y, state = conv(x, mask, None, {"conv": state})
        assert (y[mask == 0] == 0).all()
        for b in range(2):
            found[b].append(y[b, mask[b] != 0])
    for b in range(2):
        torch.testing.assert_close(torch.cat(found[b])[None], torch_form(conv, rows[b]))
        kept = F.pad(rows[b], (0, 0, width - 1, 0))[:, rows[b].shape[1] :]
        torch.testing.assert_close(state[b : b + 1], kept.mT)


@pytest.mark.parametrize("masked", [False, True])
def test_a_step_over_a_segment_keeps_only_the_last_ones_inputs(masked: bool) -> None:
    conv, x = module(3, 4), data(1, 6, 3)
    before = data(1, 3, 3, seed=1)
    ids = torch.tensor([[1, 1, 1, 1, 2, 2]])
    mask = torch.ones(1, 6) if masked else None
    y, state = conv(x, mask, ids, {"conv": before})
    first = torch_form(conv, torch.cat([before.mT, x[:, :4]], 1))[:, 3:]
    torch.testing.assert_close(y, torch.cat([first, torch_form(conv, x[:, 4:])], 1))
    torch.testing.assert_close(state, F.pad(x[:, 4:].mT, (1, 0)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_sums_in_fp32(dtype: torch.dtype) -> None:
    conv, x = module(8, 4, dtype=dtype), data(2, 50, 8).to(dtype)
    y, _ = conv(x)
    assert y.dtype == dtype
    expected = torch_form(module(8, 4).requires_grad_(False).to(dtype).double(), x.double())
    assert ((y - expected).abs() <= torch.finfo(dtype).eps * (expected.abs() + 1e-3)).all()


def test_the_operator_is_one_that_torch_can_trace() -> None:
    conv, x = module(3, 4), data(2, 9, 3).requires_grad_()
    runs = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2]] * 2)
    for given_runs in (None, runs):
        torch.library.opcheck(causal_conv1d, (x, conv.weight, conv.bias, given_runs))
    torch.library.opcheck(causal_conv1d, (x, conv.weight, None, None))


def test_first_weights_are_uniform_and_repeatable() -> None:
    conv = CausalConv1d(500, 4, True)
    for name in ("weight", "bias"):
        first, again = (conv.initial_value(name, torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(first, again)
        assert first.shape == getattr(conv, name).shape
        assert 0.49 < first.abs().max() <= 0.5
