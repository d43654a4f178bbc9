"""Norms, positions, pooling and losses against their formulas, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from attncompiler.blocks.head import ClassifierLoss, LMLoss, Pool, linear_cross_entropy
from attncompiler.blocks.norm import rms_norm
from attncompiler.blocks.positions import segment_positions
from attncompiler.errors import InputError
from attncompiler.testing.memory import PeakMemory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e-3])
def test_rms_norm_is_its_formula(dtype: torch.dtype, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(2, 5, 24, generator=generator, dtype=torch.float64) * scale).to(dtype)
    weight = torch.randn(24, generator=generator)
    cotangent = torch.randn(2, 5, 24, generator=generator).to(dtype)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    rms_norm(*leaves, 1e-5).backward(cotangent)
    exact = [x.double().requires_grad_(), weight.double().requires_grad_()]
    expected = exact[0] / (exact[0].square().mean(-1, keepdim=True) + 1e-5).sqrt() * exact[1]
    expected.backward(cotangent.double())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(rms_norm(*leaves, 1e-5).double(), expected, rtol=4 * eps, atol=4 * eps)
    for leaf, true in zip(leaves, exact, strict=True):
        bound = 8 * eps * true.grad.abs().max().item()
        torch.testing.assert_close(leaf.grad.double(), true.grad, rtol=0, atol=bound)


def test_rms_norm_passes_gradcheck() -> None:
    x = torch.randn(3, 4, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, 1e-6), (x, weight))
    assert torch.autograd.gradgradcheck(lambda a, b: rms_norm(a, b, 1e-6), (x, weight))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_mean_of_many_large_tokens_is_finite_in_half_precision(dtype: torch.dtype) -> None:
    hidden = (torch.randn(2, 9000, 4, generator=torch.Generator().manual_seed(0)) + 8).to(dtype)
    mask = torch.ones(2, 9000)
    mask[1, 5:] = 0
    expected = torch.stack([hidden[0].double().mean(0), hidden[1, :5].double().mean(0)])
    torch.testing.assert_close(Pool("mean")(hidden, mask).double(), expected, rtol=0.02, atol=0)


def test_a_classifiers_loss_is_zero_where_every_label_is_ignored() -> None:
    logits, labels = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 2, -100, 1])
    found = ClassifierLoss()(logits, labels)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(logits, labels))
    assert ClassifierLoss()(logits, torch.full((4,), -100)) == 0


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(2, 6, dtype=torch.int64), r"E401 labels must be \(B, T\) = \(2, 3\)"),
        (torch.zeros(3, 2, dtype=torch.int64), r"E401 .*not \(3, 2\)"),
        (torch.zeros(1, 1, dtype=torch.int64), "E401"),
        (torch.zeros(2, 3), "E402 labels must be whole numbers"),
    ],
)
def test_labels_that_are_not_the_tokens_own_are_refused(labels: torch.Tensor, message: str) -> None:
    """More labels than tokens, or as many in another order, would otherwise give a loss all the same."""
    with pytest.raises(InputError, match=message):
        LMLoss(None, chunk=2)(torch.randn(2, 3, 4), torch.randn(5, 4), None, labels)


Loss = Callable[[torch.Tensor], torch.Tensor]
SCORES = torch.arange(15.0).reshape(3, 5)


def lm_loss(labels: torch.Tensor) -> torch.Tensor:
    """Of a language model of 5 tokens, for 3 labels."""
    return LMLoss(None)(SCORES[None], torch.eye(5), None, labels[None])


def classifier_loss(labels: torch.Tensor) -> torch.Tensor:
    """Of a classifier of 5 classes, for 3 labels."""
    return ClassifierLoss()(SCORES, labels)


@pytest.mark.parametrize("loss", [lm_loss, classifier_loss])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_may_be_whole_numbers_of_any_width(loss: Loss, dtype: torch.dtype) -> None:
    torch.testing.assert_close(loss(torch.tensor([0, 4, 1], dtype=dtype)), loss(torch.tensor([0, 4, 1])))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.complex64])
@pytest.mark.parametrize("loss", [lm_loss, classifier_loss])
def test_labels_that_are_no_whole_numbers_are_refused(loss: Loss, dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match="E402 labels must be whole numbers"):
        loss(torch.ones(3, dtype=dtype))


@pytest.mark.parametrize("wrong", [-1, 5, -101, 2**40])
@pytest.mark.parametrize("loss", [lm_loss, classifier_loss])
def test_a_label_that_means_nothing_is_refused_where_that_waits_for_no_gpu(loss: Loss, wrong: int) -> None:
    labels = torch.tensor([-100, 4, wrong])
    with pytest.raises(InputError, match=f"E403 labels must be 0 to 4, or -100 to be ignored, not {wrong}"):
        loss(labels)
    with FakeTensorMode(allow_non_fake_inputs=True):
        loss(labels)


def test_the_fused_loss_makes_gradients_only_where_they_are_wanted_and_once() -> None:
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    labels = torch.arange(6) % 5
    with torch.no_grad(), PeakMemory() as memory:
        linear_cross_entropy(hidden, weight.detach().repeat(1000, 1).requires_grad_(), None, labels)
    quiet = memory.peak
    with PeakMemory() as memory:
        linear_cross_entropy(hidden, weight.detach().repeat(1000, 1).requires_grad_(), None, labels)
    assert quiet < memory.peak - 5000 * 4 * 4
    with pytest.raises(InputError, match="E403 the fused loss has no second derivatives"):
        torch.autograd.grad(linear_cross_entropy(hidden, weight, None, labels), hidden, create_graph=True)


def test_half_precision_gradients_of_many_labels_survive_with_a_loss_scale() -> None:
    """Divided by the number of labels before the scale is on it, most of a softmax is below fp16's least number."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4096, 32, generator=generator) / 4, torch.randn(8000, 32, generator=generator) / 4
    labels = torch.randint(8000, (4096,), generator=generator)
    low = [t.half().requires_grad_() for t in (hidden, weight)]
    exact = [t.detach().double().requires_grad_() for t in low]
    found = torch.autograd.grad(linear_cross_entropy(*low, None, labels) * 2.0**16, low)
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, labels) * 2.0**16, exact)
    for got, truth in zip(found, expected, strict=True):
        assert (got - truth).norm() < 2e-3 * truth.norm()


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=4))
def test_positions_count_from_the_first_real_token_of_a_segment(parts: list[tuple[int, int, int]]) -> None:
    """Each part is a segment: `left` pads, `real` tokens, `right` pads."""
    segments, mask, expected = [], [], []
    for number, (real, left, right) in enumerate(parts):
        segments += [number] * (left + real + right)
        mask += [False] * left + [True] * real + [False] * right
        expected += [None] * left + list(range(real)) + [None] * right
    found = segment_positions(torch.tensor([mask]), torch.tensor([segments]), len(mask))[0].tolist()
    assert [f for f, e in zip(found, expected, strict=True) if e is not None] == [e for e in expected if e is not None]
