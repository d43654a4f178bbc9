"""The gated recurrence's own laws: where a sequence is cut does not matter, and sums of decays
stay exact."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from attncompiler import ops
from attncompiler.blocks.gpu import Device
from attncompiler.blocks.recurrence import launch
from attncompiler.blocks.recurrence.launch import Groups, Order, Side, Tiles, groups_for, run, tiles_for
from attncompiler.mechanisms.mamba2.recurrence import launch as mamba2_launch

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
        patch.setattr(launch, "tiles_for", lambda *_, **__: Tiles(tokens, 16, 4, 1))
        patch.setattr(launch, "groups_for", lambda *_: Groups(count, each, tokens))
        found = run(Side(x), Side(y), Side(u), Order(decay), H=2, reverse=reverse)
    torch.testing.assert_close(found.out.double(), reference(x, y, u, decay, reverse), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(("T", "each"), [(1, 1), (33, 2), (150, 2)])
def test_marks_count_by_the_maximum_so_far(device: str, T: int, each: int, begun: bool, reverse: bool) -> None:
    """Also where it grows by more than fp32 has powers of 2 within a chunk, and where nothing was marked at first."""
    generator = torch.Generator().manual_seed(T)
    x, y, u = (torch.randn(1, T, 2, 16, generator=generator).to(device) for _ in range(3))
    own = torch.randn(1, 2, T, generator=generator) + torch.arange(T) * 10.0
    own[0, 1, : T // 3] = -math.inf
    before = torch.tensor([[3.0, 200.0]]) if begun else torch.full((1, 2), -math.inf)
    tops = torch.maximum(own, before[..., None]).cummax(-1).values
    lowest = torch.finfo(torch.float32).min
    marks = torch.stack([tops.clamp(min=lowest), own]).to(device)
    first = before.clamp(min=lowest).to(device) if begun else None
    state = torch.randn(1, 2, 16, 16, generator=generator).to(device) if begun and not reverse else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "tiles_for", lambda *_, **__: Tiles(16, 16, 4, 1))
        patch.setattr(launch, "groups_for", lambda *_: Groups(-(-T // (16 * each)), each, 16))
        order = Order(marks=marks, first=first)
        initial = None if state is None else state.flatten(2).contiguous()
        found = run(Side(x), Side(y), Side(u), order, H=2, reverse=reverse, initial=initial)
    held, seen = marks.double(), torch.ones(T, T, dtype=torch.bool, device=device).tril()
    weights = torch.exp2((held[1][..., None, :] - held[0][..., :, None]).masked_fill(~seen, -math.inf))
    weights = weights.mT if reverse else weights
    pairs = torch.einsum("bihk,bjhk->bhij", x.double(), y.double()) * weights
    expected = torch.einsum("bhij,bjhw->bihw", pairs, u.double())
    if state is not None:
        left = torch.exp2(before.to(device).double()[..., None] - held[0])
        expected += torch.einsum("bhi,bihk,bhkw->bihw", left, x.double(), state.double())
    torch.testing.assert_close(found.out.double(), expected, atol=2e-5, rtol=2e-5)


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


@pytest.mark.parametrize(("K", "W", "tokens", "width"), [(128, 128, 64, 64), (128, 64, 64, 64), (256, 128, 64, 32)])
def test_hopper_runs_two_programs_of_four_warps_beside_each_other(K: int, W: int, tokens: int, width: int) -> None:
    """By tiles that are read ahead: measured faster than one of eight warps."""
    tiles = tiles_for(Device(232448, 132, (9, 0)), torch.bfloat16, K, W)
    assert tiles == Tiles(tokens, width, 4, 2)


@given(programs=st.integers(1, 4096), T=st.integers(1, 2**21), multiprocessors=st.integers(1, 200))
def test_groups_hold_every_chunk_once(programs: int, T: int, multiprocessors: int) -> None:
    groups = groups_for(Device(2**17, multiprocessors, (9, 0)), programs, T, Tiles(64, 64, 8, 2))
    chunks = -(-T // 64)
    assert (groups.count - 1) * groups.chunks < chunks <= groups.count * groups.chunks


def call(device: str, T: int = 96) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(T)
    found = {name: torch.randn(1, T, 2, 40, generator=generator).to(device) for name in "qkv"}
    found["log_decay"] = -torch.rand(1, T, 2, generator=generator).to(device) / 4
    return found


@pytest.mark.parametrize("length", [8, 40])
def test_a_document_of_large_gradients_leaves_no_trace_in_the_next(device: str, length: int) -> None:
    """Nothing passes its end, so that not even a rounding of its sums may: as where a loss is masked."""
    inputs = call(device)
    inputs["log_decay"].requires_grad_()
    segments = (torch.arange(96, device=device) >= length).long()[None]
    q, k, v, log_decay = inputs.values()
    out = ops.linear_attention(q, k, v, log_decay=log_decay, segment_ids=segments, kernel="triton")
    assert isinstance(out, torch.Tensor)
    grad = torch.where(segments == 0, 1e6, 0.0)[..., None, None].expand_as(out)
    [found] = torch.autograd.grad(out, log_decay, grad)
    assert float(found[:, :length].abs().max()) > 1
    assert float(found[:, length:].abs().max()) == 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
@pytest.mark.parametrize("where", ["a document before", "a token ahead"])
def test_what_is_not_seen_need_not_be_finite(device: str, where: str) -> None:
    inputs = call(device)
    huge = inputs["v"].clone()
    token = 5 if where == "a document before" else 90
    huge[:, token] = 3e38
    inputs["k"][:, token] = 100.0
    segments = (torch.arange(96, device=device) >= 40).long()[None]
    outs = []
    for v in (inputs["v"], huge):
        outs.append(
            ops.linear_attention(
                inputs["q"], inputs["k"], v, log_decay=inputs["log_decay"], feature_map="identity", normalize=False,
                segment_ids=segments, kernel="triton",
            )
        )  # fmt: skip
    kept = slice(40, None) if where == "a document before" else slice(40, 90)
    assert torch.equal(outs[0][:, kept], outs[1][:, kept])
    assert bool(outs[1][:, kept].isfinite().all())


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning:triton.runtime.interpreter")
@pytest.mark.parametrize("feature_map", ["elu", "relu", "favor"])
@pytest.mark.parametrize("name", ["q", "k", "log_decay"])
def test_nan_is_not_swallowed(device: str, feature_map: Any, name: str) -> None:
    """A GPU's minimum and maximum give the number that is none."""
    inputs = call(device)
    inputs[name][:, 50] = float("nan")
    w = projection(device, 30, 40) if feature_map == "favor" else None
    q, k, v, log_decay = inputs.values()
    out = ops.linear_attention(q, k, v, log_decay=log_decay, feature_map=feature_map, projection=w, kernel="triton")
    assert isinstance(out, torch.Tensor)
    assert bool(out[:, 50].isnan().any())
    assert bool(out[:, :32].isfinite().all())


@pytest.mark.parametrize("number", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["elu", "favor", "raw", "gated", "ssd"])
def test_chunks_without_padding_agree_with_plain_torch(device: str, kind: str, number: str) -> None:
    """Of whole chunks nothing is masked, and on a GPU a sequence is long enough for all that is read ahead. Errors are
    those of plain torch in the same numbers, and a few roundings."""
    gpu = device == "cuda"
    if number == "bfloat16" and not gpu:
        pytest.skip("Triton's interpreter does not compute bf16 right")
    B, T, H, D = (8, 2048, 16, 128) if gpu else (2, 64, 4, 16)
    generator = torch.Generator().manual_seed(0)
    given = getattr(torch, number)

    def drawn(*shape: int, dtype: torch.dtype = given) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    inputs: dict[str, torch.Tensor]
    if kind == "ssd":
        inputs = {"x": drawn(B, T, H, 16), "dt": drawn(B, T, H), "A": -drawn(H, dtype=torch.float32).abs()}
        inputs |= {"B": drawn(B, T, 1, D), "C": drawn(B, T, 1, D), "D": drawn(H, dtype=torch.float32)}
    else:
        inputs = {name: drawn(B, T, H, D) for name in "qkv"}
        if kind == "gated":
            inputs["log_decay"] = torch.nn.functional.logsigmoid(drawn(B, T, H, dtype=torch.float32))
    more: dict[str, object] = {} if kind == "ssd" else {"feature_map": kind if kind in ("elu", "favor") else "identity"}
    w = projection(device, 2 * D, D) if kind == "favor" else None
    if kind in ("raw", "gated"):
        more |= {"normalize": False, "scale": T**-0.5}
    grad: torch.Tensor | None = None
    found: list[list[torch.Tensor]] = []
    for name, precise in (("triton", False), ("chunkwise", False), ("chunkwise", True)):
        leaves = {key: (each.double() if precise else each.clone()).requires_grad_() for key, each in inputs.items()}
        if w is not None:
            more["projection"] = w.double() if precise else w
        out = (ops.ssd if kind == "ssd" else ops.linear_attention)(**leaves, **more, kernel=name)  # type: ignore[arg-type]
        assert isinstance(out, torch.Tensor)
        grad = drawn(*out.shape) if grad is None else grad
        found.append([out.detach(), *torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))])
    rms = [float(exact.square().mean().sqrt()) for exact in found[2]]
    for which, ours, torchs, exact, size in zip(("out", *inputs), *found, rms, strict=True):
        apart, usual = (float((each.double() - exact).square().mean().sqrt()) for each in (ours, torchs))
        assert apart < 2 * usual + 4 * torch.finfo(given).eps * size, (which, apart, usual, size)


# --- favor --------------------------------------------------------------------------------------------------------


def projection(device: str, R: int, D: int) -> torch.Tensor:
    return torch.randn(R, D, generator=torch.Generator().manual_seed(0)).to(device)


def performed(tensors: dict[str, torch.Tensor], w: torch.Tensor, kernel: str, **more: Any) -> list[torch.Tensor]:
    """out, the state behind it, and the gradients of all tensors, of a loss that reads both; in the tensors' dtype."""
    reads_state = "initial_state" not in more
    leaves = {name: each.clone().requires_grad_() for name, each in tensors.items()}
    given = {**leaves, "projection": w.to(tensors["q"].dtype), "feature_map": "favor"}
    out, (s, z, m) = ops.linear_attention(**given, kernel=kernel, return_state=True, **more)  # type: ignore[arg-type]
    loss = out.sin().sum() + (s.sin().sum() + z.sum() if reads_state else 0)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return [each.detach() for each in (out, s, z, m, *grads)]


@pytest.mark.parametrize("normalize", [True, False])
def test_favors_future_never_leaks_into_passes(device: str, normalize: bool) -> None:
    """Keys a hundred times as large, whose features are next to nothing, and keys along w, whose are the largest."""
    inputs = call(device)
    w = projection(device, 24, 40) / 4

    def out(k: torch.Tensor) -> torch.Tensor:
        given: Any = {"feature_map": "favor", "projection": w, "normalize": normalize, "kernel": "triton"}
        found = ops.linear_attention(inputs["q"], k, inputs["v"], **given)
        assert isinstance(found, torch.Tensor)
        return found

    k = inputs["k"]
    plain, last = out(k), w[w.norm(dim=-1).argmax()] * 40**0.25
    for later in (100 * k[:, 70:], last.expand(1, 26, 2, 40)):
        found = out(torch.cat([k[:, :70], later], 1))
        assert torch.equal(found[:, :70], plain[:, :70])
        assert not torch.equal(found[:, 70:], plain[:, 70:])


@pytest.mark.parametrize("order", ["rising", "falling", "decayed", "both ways", "packed both ways"])
def test_a_small_past_is_as_exact_beside_a_large_future(device: str, order: str) -> None:
    """Keys whose features lie up to exp(150) apart, more than fp32 holds, and beside them decays that are as strong."""
    T, generator = 90, torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(1, T, 1, 4, generator=generator).to(device) for name in "qkv"}
    k = inputs["k"] / inputs["k"].norm(dim=-1, keepdim=True)
    lengths = torch.linspace(24, 1, T, device=device)
    inputs["k"] = k * (lengths if order != "falling" else lengths.flip(0))[None, :, None, None]
    more: dict[str, Any] = {"eps": 1e-30}
    if order == "decayed":
        inputs["log_decay"] = torch.linspace(-4, -0.01, T, device=device)[None, :, None]
    if "both ways" in order:
        more["causal"] = False
    if "packed" in order:
        more["segment_ids"] = (torch.arange(T, device=device) // 35)[None]
    w = projection(device, 7, 4) / 100
    ours = performed(inputs, w, "triton", **more)
    plain = performed(inputs, w, "chunkwise", **more)
    exact = performed({name: each.double() for name, each in inputs.items()}, w, "chunkwise", **more)
    assert ours[0].abs().mean() > 0.05
    size = max(float(each.abs().max()) for each in exact)
    for found, usual, truth in zip(ours, plain, exact, strict=True):
        apart, least = (float((each - truth).abs().max()) for each in (found, usual))
        assert apart <= 4 * least + 1e-6 * size


def test_favor_takes_numbers_of_any_size(device: str) -> None:
    """Logarithms of some 1e8, of which a part in fp32 is several: nothing is exact there, and nothing is not finite."""
    inputs = call(device)
    w = projection(device, 24, 40)
    for scale in (1e-30, 1e2, 1e4):
        tensors = {name: inputs[name] * scale if name in "qk" else inputs[name] for name in inputs}
        assert all(bool(each.isfinite().all()) for each in performed(tensors, w, "triton"))
        del tensors["log_decay"]
        assert all(bool(each.isfinite().all()) for each in performed(tensors, w, "triton", causal=False))


@pytest.mark.parametrize("causal", [True, False])
def test_favors_state_may_be_of_any_m(device: str, causal: bool) -> None:
    """As a multiple of exp(m), and empty, of exp(−∞), where nothing of it counts."""
    inputs = {name: each for name, each in call(device, 40).items() if causal or name != "log_decay"}
    w = projection(device, 6, 40) / 8
    _, s, z, m, *_ = performed(inputs, w, "triton", causal=causal)
    empty, nothing = torch.full_like(m, -math.inf), torch.zeros_like(m)
    found = [
        performed(inputs, w, "triton", causal=causal, initial_state=state)
        for state in (
            *((s, z, m), (s * math.exp(-3), z * math.exp(-3), m + 3)),
            *((s, z, empty), (0 * s, 0 * z, nothing - 90)),
        )
    ]
    for one, other in (found[:2], found[2:]):
        for first, second in zip((one[0], *one[4:]), (other[0], *other[4:]), strict=True):
            torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)
        sums = [found[1] * found[3].exp()[..., None, None] for found in (one, other)]
        torch.testing.assert_close(*sums, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reset", [-1e4, -1e38, -math.inf])
def test_favors_decay_that_leaves_nothing_overflows_nowhere(device: str, reset: float) -> None:
    """It begins the sequence anew, and blurs none of the weak decays behind it."""
    inputs = call(device)
    inputs["log_decay"] = torch.full_like(inputs["log_decay"], -0.01)
    inputs["log_decay"][:, 50], inputs["log_decay"][:, 60] = reset, reset
    w = projection(device, 9, 40) / 4
    whole = performed(inputs, w, "triton")
    assert all(bool(each.isfinite().all()) for each in whole)
    behind = performed({name: each[:, 60:] for name, each in inputs.items()}, w, "triton")
    torch.testing.assert_close(whole[0][:, 60:], behind[0])
    torch.testing.assert_close(whole[1:4], behind[1:4])


def test_how_many_states_are_held_at_a_time_changes_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mamba-2's gradients go through a sequence in segments, whose states share one buffer."""
    T = 8192 if device == "cuda" else 130
    generator = torch.Generator().manual_seed(T)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device).requires_grad_()

    leaves = [drawn(1, T, 2, 16), drawn(1, T, 2), drawn(2), drawn(1, T, 1, 16), drawn(1, T, 1, 16), drawn(2)]
    x, dt, A, B, C, D = leaves
    grad = torch.randn(1, T, 2, 16, generator=generator).to(device)
    found = []
    for some in (1, 1000):

        def cut(groups: Groups, each: int, held: int, some: int = some) -> list[tuple[int, int]]:
            assert groups.count > 2
            begins = range(0, groups.count, some)
            return [(begin, min(begin + some, groups.count)) for begin in begins]

        monkeypatch.setattr(mamba2_launch, "segments", cut)
        out = ops.ssd(x, dt, -A.exp(), B, C, D, kernel="triton")
        assert isinstance(out, torch.Tensor)
        found.append(torch.autograd.grad(out, leaves, grad))
    assert all(map(torch.equal, *found))
