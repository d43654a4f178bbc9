"""Random projections that are drawn anew in training: when, as what, and for whom."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attncompiler.blocks.random_features import RandomFeatures, random_projection


def made(interval: int | None = 2, orthogonal: bool = True) -> RandomFeatures:
    module = RandomFeatures(6, 4, orthogonal, interval)
    for name, buffer in module.named_buffers():
        buffer.copy_(module.initial_value(name, torch.Generator().manual_seed(len(name))))
    return module


def drawn(module: RandomFeatures, forwards: int) -> list[Tensor]:
    return [module().clone() for _ in range(forwards)]


@pytest.mark.parametrize("interval", [1, 2, 5])
@pytest.mark.parametrize("orthogonal", [True, False])
def test_a_projection_serves_so_many_training_forwards(interval: int, orthogonal: bool) -> None:
    """The k-th redraw is that of a generator seeded with seed + k."""
    module = made(interval, orthogonal)
    first, seed = module.projection.clone(), int(module.seed)
    for number, found in enumerate(drawn(module, 11)):
        redraw = number // interval
        generator = torch.Generator().manual_seed(seed + redraw)
        expected = random_projection(6, 4, orthogonal, generator) if redraw else first
        assert torch.equal(found, expected), number


def test_evaluation_and_decoding_neither_draw_nor_count() -> None:
    module = made(1)
    first = module.projection.clone()
    module.eval()
    assert all(torch.equal(found, first) for found in drawn(module, 3))
    module.train()
    assert torch.equal(module(state={}), first)
    assert module.forwards == 0
    assert torch.equal(module(), first)
    assert not torch.equal(module(), first)


def test_without_an_interval_nothing_is_drawn_or_counted() -> None:
    module = made(None)
    assert list(module.state_dict()) == ["projection"]
    assert all(torch.equal(found, module.projection) for found in drawn(module, 3))


def test_processes_of_equal_weights_draw_alike_and_a_loaded_one_goes_on() -> None:
    module = made(2)
    drawn(module, 3)
    loaded, copied = RandomFeatures(6, 4, True, 2), copy.deepcopy(module)
    loaded.load_state_dict(module.state_dict())
    later = drawn(module, 6)
    for other in (loaded, copied):
        assert all(torch.equal(a, b) for a, b in zip(drawn(other, 6), later, strict=True))


class Scores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features, self.scale = made(1), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale @ self.features().mT).exp().sum()


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_forward_is_computed_again_with_the_same_projection(reentrant: bool) -> None:
    plain, module = Scores(), Scores()
    for _ in range(3):
        x = torch.randn(3, 4, requires_grad=True)
        plain(x).backward()
        expected, x.grad = x.grad, None
        checkpoint(module, x, use_reentrant=reentrant).backward()
        torch.testing.assert_close(x.grad, expected)
    torch.testing.assert_close(module.scale.grad, plain.scale.grad)
    assert module.features.forwards == 3


def test_a_backward_outlives_the_next_redraw() -> None:
    module = Scores()
    x = torch.ones(2, 4)
    first, second = module(x), module(x)
    (first + second).backward()
    assert module.scale.grad.isfinite().all()


def test_a_redraw_compiles_as_one_graph() -> None:
    module, plain = Scores(), Scores()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 4)
    for _ in range(4):
        torch.testing.assert_close(compiled(x), plain(x))
    assert module.features.forwards == 4
