"""The gated recurrence's own laws: where a sequence is cut does not matter, and sums of decays
stay exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from attncompiler.blocks.gpu import Device
from attncompiler.blocks.recurrence import launch
from attncompiler.blocks.recurrence.launch import Groups, Order, Side, Tiles, groups_for, run, tiles_for

SHARED_MEMORY = {(8, 0): 166912, (8, 6): 101376, (9, 0): 232448, (12, 0): 101376}


def reference(x: torch.Tensor, y: torch.Tensor, u: torch.Tensor, decay: torch.Tensor, reverse: bool) -> torch.Tensor:
    """Token by token, in fp64: (B, T, H, W)."""
    x, y, u, decay = (each.double() for each in (x, y, u, decay))
    state = x.new_zeros(*y[:, 0].shape, u.shape[-1])
    T = x.shape[1]
    rows = [state] * T
    for t in reversed(range(T)) if reverse else range(T):
        if not reverse:
            state = state * decay[:, t, :, None, None].exp()
        state = state + y[:, t, :, :, None] * u[:, t, :, None]
        rows[t] = torch.einsum("bhk,bhkw->bhw", x[:, t], state)
        if reverse:
            state = state * decay[:, t, :, None, None].exp()
    return torch.stack(rows, 1)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("tokens", [16, 32])
@pytest.mark.parametrize(("T", "each"), [(1, 1), (31, 1), (33, 2), (97, 1), (150, 2), (150, 3)])
def test_where_a_sequence_is_cut_does_not_matter(device: str, T: int, reverse: bool, tokens: int, each: int) -> None:
    generator = torch.Generator().manual_seed(T)
    x, y, u = (torch.randn(1, T, 2, width, generator=generator).to(device) for width in (20, 20, 12))
    decay = -torch.rand(1, T, 2, generator=generator).to(device)
    count = -(-T // (tokens * each))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "tiles_for", lambda *_: Tiles(tokens, 16, 4, 1))
        patch.setattr(launch, "groups_for", lambda *_: Groups(count, each, tokens))
        found = run(Side(x), Side(y), Side(u), Order(decay), H=2, reverse=reverse)
    torch.testing.assert_close(found.out.double(), reference(x, y, u, decay, reverse), atol=2e-5, rtol=2e-5)


def test_a_decay_that_leaves_nothing_does_not_blur_the_others(device: str) -> None:
    """Sums behind many resets are thousands; what lies between two tokens after them is still a small number."""
    T = 64
    x, y, u = (torch.ones(1, T, 1, 16, device=device) for _ in range(3))
    decay = torch.full((1, T, 1), -1e-4, device=device)
    decay[:, 1:40] = -1e4
    found = run(Side(x), Side(y), Side(u), Order(decay), H=1)
    expected = reference(x, y, u, decay, False)
    assert float((found.out.double() / expected - 1).abs().max()) < 1e-6


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@given(K=st.integers(1, 256), W=st.integers(1, 300))
def test_tiles_fit_their_device(capability: tuple[int, int], dtype: torch.dtype, K: int, W: int) -> None:
    device = Device(SHARED_MEMORY[capability], 100, capability)
    tiles = tiles_for(device, dtype, K, W)
    wide = max(16, 1 << (K - 1).bit_length())
    assert tiles.shared_memory(wide, 4 if dtype == torch.float16 else dtype.itemsize) <= device.shared_memory
    assert tiles.tokens >= 16
    assert tiles.width >= 16


@given(programs=st.integers(1, 4096), T=st.integers(1, 2**21), multiprocessors=st.integers(1, 200))
def test_groups_hold_every_chunk_once(programs: int, T: int, multiprocessors: int) -> None:
    groups = groups_for(Device(2**17, multiprocessors, (9, 0)), programs, T, Tiles(64, 64, 8, 2))
    chunks = -(-T // 64)
    assert (groups.count - 1) * groups.chunks < chunks <= groups.count * groups.chunks
