"""The grids of linear attention and of Mamba: their rows, what these count, and their peers as functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attncompiler import ops
from attncompiler.bench.device import Clock
from attncompiler.bench.grid import linear_time, report
from attncompiler.bench.grid import measure as grid
from attncompiler.bench.grid.bench import Bench
from attncompiler.bench.grid.cells import Cell, Measured, Problem
from attncompiler.bench.grid.contestants import Absent, Call, Contestant
from attncompiler.bench.grid.operands import TimedRow
from attncompiler.bench.linear import bench as linear_bench
from attncompiler.bench.linear import peers as linear_peers
from attncompiler.bench.linear import rows as linear_rows
from attncompiler.bench.mamba import bench as mamba_bench
from attncompiler.bench.mamba import peers as mamba_peers
from attncompiler.bench.mamba import rows as mamba_rows
from attncompiler.bench.measure import Samples

Linear, Scan, Duality = linear_rows.Row, mamba_rows.Scan, mamba_rows.Duality
ScanMixer, DualityMixer = mamba_rows.ScanMixer, mamba_rows.DualityMixer
TINY: dict[str, Any] = {"H": 2, "D": 8, "V": 6}
LINEAR = (
    Linear("elu", "tiny", T=40, B=2, **TINY),
    Linear("raw", "tiny", T=40, feature_map="identity", **TINY),
    Linear("favor", "favor5", T=40, feature_map="favor", R=5, **TINY),
    Linear("favor", "elu-r5", T=40, H=2, D=5, V=6),
    Linear("retention", "tiny", T=40, feature_map="identity", decay="retention", **TINY),
    Linear("scalar", "tiny", T=40, feature_map="identity", decay="scalar", **TINY),
    Linear("decode", "elu", T=1, B=3, **TINY),
    Linear("decode", "raw", T=1, B=3, feature_map="identity", **TINY),
    Linear("decode", "retention", T=1, B=3, feature_map="identity", decay="retention", **TINY),
    Linear("decode", "scalar", T=1, B=3, feature_map="identity", decay="scalar", **TINY),
    Linear("length", "t40", T=40, feature_map="identity", forward_only=True, **TINY),
)
HEADS: dict[str, Any] = {"H": 4, "P": 6, "N": 8, "G": 2}
MAMBA = (
    Scan("s6", "tiny", T=20, B=2, E=6, N=4),
    Scan("s6-length", "t20", T=20, E=6, N=4, forward_only=True),
    Duality("ssd", "tiny", T=20, B=2, **HEADS),
    Scan("decode", "s6", T=1, B=3, E=6, N=4),
    Duality("decode", "ssd", T=1, B=3, **HEADS),
)
MIXERS = (
    ScanMixer("mixer", "s6", T=20, B=2, M=24, N=4),
    DualityMixer("mixer", "ssd", T=20, B=2, M=16, N=8, P=8),
)
TINY_ROWS = [
    *((linear_bench.BENCH, row) for row in LINEAR),
    *((mamba_bench.BENCH, row) for row in (*MAMBA, *MIXERS)),
]
by_row = pytest.mark.parametrize(
    ("bench", "row"), TINY_ROWS, ids=lambda each: each.id if isinstance(each, TimedRow) else ""
)


def measure(bench: Bench, row: TimedRow, *taking: Contestant) -> Measured:
    return grid.measure(bench, row, taking, Clock("cpu"), torch.float32, 2)


def member(bench: Bench, row: TimedRow, name: str = "eager") -> Contestant:
    return next(each for each in bench.members("cpu", row) if each.name == name)


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [linear_rows.CUDA, linear_rows.CPU, mamba_rows.CUDA, mamba_rows.CPU])
def test_rows_have_names_of_their_own_and_the_longest_come_last(rows: tuple[TimedRow, ...]) -> None:
    assert len({row.id for row in rows}) == len(rows)
    lengths = [row.by_length for row in rows]
    assert lengths == sorted(lengths), "a device that is lost there has done the others"
    assert {row.step for row in rows if row.group == "decode"} == {True}
    assert not any(row.backward for row in rows if row.step or row.forward_only)


def test_the_rows_of_the_bars_are_there() -> None:
    shapes = {(row.group, row.B, row.T) for row in linear_rows.CUDA}
    for group in ("elu", "raw", "retention", "scalar"):
        assert {(group, 8, 2048), (group, 1, 16384), (group, 1, 131072)} <= shapes
    performer, transformer = (row for row in linear_rows.CUDA if row.group == "favor")
    assert performer.features * performer.V == transformer.features * transformer.V == 256 * 128
    assert {row.B for row in (*linear_rows.CUDA, *mamba_rows.CUDA) if row.step} == {64}
    for rows in (linear_rows.CUDA, mamba_rows.CUDA):
        lengths = [row for row in rows if row.by_length]
        assert {row.T for row in lengths} == {2048, 16384, 131072, 1048576}
        for group in {row.group for row in lengths}:
            apart = {replace(row, B=row.B * row.T, T=0, name="") for row in lengths if row.group == group}
            assert len(apart) == 1, "they differ in length alone, of as many tokens"


@by_row
def test_the_floor_is_the_bytes_of_the_tensors(bench: Bench, row: TimedRow) -> None:
    inputs: Any = bench.inputs(row, "cpu", torch.bfloat16)
    found = bench.count(row, torch.bfloat16.itemsize)

    def size(tensors: Any) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    out = member(bench, row).prepare(inputs).forward()
    assert tuple(out.shape) == row.operands.out
    if row.step:
        states = [tensor for name, tensor in inputs.tensors.items() if name.startswith("initial_") and tensor.dim() > 2]
        assert found.floor == {"forward": 2 * size(states)}
        return
    given, gradients = size(inputs.tensors.values()), size(inputs.leaves)
    assert found.floor["forward"] == given + size([out])
    assert found.floor.get("both") == (2 * given + gradients + 2 * size([out]) if row.backward else None)
    assert all(leaf.requires_grad == row.backward for leaf in inputs.leaves)
    assert found.tokens == row.B * row.T


def test_flops_are_those_of_the_recurrence() -> None:
    row = Linear("raw", "x", T=10, B=2, H=3, D=4, V=5, feature_map="identity")
    forward = 2 * 2 * (2 * 10 * 3 * 4 * 5)
    assert linear_bench.count(row, 2).flops == {"forward": forward, "both": forward + forward / 2 * 5}


# --- functions --------------------------------------------------------------------------------------------------------


@by_row
def test_every_member_computes_the_rows_function_and_peers_that_cannot_say_why(bench: Bench, row: TimedRow) -> None:
    result = measure(bench, row, *bench.members("cpu", row), *bench.peers("cpu"))
    for name, cell in result.cells.items():
        if isinstance(cell.forward, Problem):
            assert cell.role == "peer"
            assert cell.forward.kind == "absent"
            assert name != "plain" or row.step or row.group in ("retention", "scalar")
            assert (name, row.group) != ("hf-slow", "mixer") or find_spec("transformers") is None
        else:
            assert isinstance(cell.both, Samples) == row.backward
    assert result.chain[0] == next(iter(result.cells))
    assert isinstance(result.plan, Cell)


@pytest.mark.parametrize("row", LINEAR[:4], ids=lambda row: row.id)
def test_the_plain_forms_gradients_are_those_of_the_operator(row: Any) -> None:
    """In fp64, where rounding leaves no doubt."""
    inputs = linear_bench.BENCH.inputs(row, "cpu", torch.float64)
    ours, plain = (
        made.prepare(inputs) for made in (member(linear_bench.BENCH, row), linear_bench.BENCH.peers("cpu")[0])
    )
    found = [torch.autograd.grad(call.forward().sin().sum(), call.leaves) for call in (ours, plain)]
    torch.testing.assert_close(*found)


def test_a_peer_that_leaves_out_the_decays_is_told_from_rounding() -> None:
    row = LINEAR[4]

    def undecayed(inputs: Any) -> Call:
        q, k, v = (inputs.tensors[name] for name in "qkv")
        options: Any = row.options
        return Call(lambda: ops.linear_attention(q, k, v, **options), inputs.leaves)

    result = measure(linear_bench.BENCH, row, member(linear_bench.BENCH, row), Contestant("x", "peer", undecayed))
    problem = result.cells["x"].forward
    assert isinstance(problem, Problem)
    assert problem.kind == "another function"


def test_an_output_of_another_shape_is_no_function_of_the_row() -> None:
    row = LINEAR[1]

    def short(inputs: Any) -> Call:
        right = member(linear_bench.BENCH, row).prepare(inputs)
        return replace(right, forward=lambda: right.forward()[:, :1])

    result = measure(linear_bench.BENCH, row, member(linear_bench.BENCH, row), Contestant("x", "peer", short))
    assert result.cells["x"].forward == Problem(
        "failed", "ValueError: its output is (1, 1, 2, 6), where ours is (1, 40, 2, 6)"
    )


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 64), st.floats(0, 2))
def test_outputs_are_compared_in_parts_as_in_one(batch: int, length: int, compared: int, far: float) -> None:
    first = torch.randn(batch, length, 4, generator=torch.Generator().manual_seed(length))
    out = first + far * torch.randn(batch, length, 4, generator=torch.Generator().manual_seed(batch))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "COMPARED", compared)
        found = grid._apart(out, first)
    assert found == pytest.approx(float((out - first).norm() / first.norm()), rel=1e-4)
    assert math.isnan(grid._apart(out * math.nan, first))


# --- fla --------------------------------------------------------------------------------------------------------------


def recurrent(q: Any, k: Any, v: Any, log_decay: Any, scale: float | None, state: Any = None) -> tuple[Any, Any]:
    """What fla's functions are documented to compute, token by token; scale is K^-½ where it is not given."""
    state = torch.zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]) if state is None else state
    out = []
    for t in range(q.shape[1]):
        state = (
            log_decay.expand(q.shape[:3])[:, t, :, None, None].exp() * state + k[:, t, :, :, None] * v[:, t, :, None]
        )
        out.append((q[:, t, :, None] @ state).squeeze(-2))
    return (q.shape[-1] ** -0.5 if scale is None else scale) * torch.stack(out, 1), state


class Fla:
    """The functions of `fla.ops.linear_attn`, `fla.ops.simple_gla` and `fla.ops.retention` that are asked."""

    @staticmethod
    def chunk_linear_attn(
        q: Any,
        k: Any,
        v: Any,
        scale: float | None = None,
        initial_state: Any = None,
        output_final_state: bool = False,
        normalize: bool = True,
    ) -> Any:
        start, keys = initial_state if isinstance(initial_state, tuple) else (initial_state, 0)
        out, state = recurrent(q, k, v, torch.zeros(()), scale, start)
        if not normalize:
            return out, state
        keys = k.cumsum(1) + keys
        return out / ((q * scale * keys).sum(-1, keepdim=True) + 1e-10), (state, keys[:, -1:])

    fused_chunk_linear_attn = chunk_linear_attn

    @staticmethod
    def fused_recurrent_linear_attn(*tensors: Any, normalize: bool = False, **options: Any) -> Any:
        assert options["output_final_state"]
        return Fla.chunk_linear_attn(*tensors, normalize=normalize, **options)

    @staticmethod
    def chunk_simple_gla(
        q: Any,
        k: Any,
        v: Any,
        g: Any = None,
        g_gamma: Any = None,
        scale: float | None = None,
        initial_state: Any = None,
        output_final_state: bool = False,
    ) -> Any:
        assert (g is None) != (g_gamma is None)
        assert g.shape == q.shape[:3] if g_gamma is None else g_gamma.shape == q.shape[2:3]
        return recurrent(q, k, v, g_gamma if g is None else g, scale, initial_state)

    fused_recurrent_simple_gla = chunk_simple_gla

    @staticmethod
    def chunk_retention(q: Any, k: Any, v: Any, scale: float | None = None) -> Any:
        return recurrent(q, k, v, (1 - 2.0 ** (-5.0 - torch.arange(q.shape[2]))).log(), scale)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Stand-ins for what runs on a GPU alone, on a GPU of that capability."""

    def install(capability: int = 8, triton: str = "3.6.0", packages: tuple[str, ...] = ("fla", "mamba_ssm")) -> None:
        asked: dict[str, Any] = {"triton": SimpleNamespace(__version__=triton)}

        def found(name: str) -> bool | None:
            return True if name in (*packages, "selective_scan_cuda") else None

        for peers, library in ((linear_peers, Fla), (mamba_peers, MambaSsm)):
            tools = SimpleNamespace(
                util=SimpleNamespace(find_spec=found), import_module=lambda name, it=library: asked.get(name, it)
            )
            monkeypatch.setattr(peers, "importlib", tools)
            monkeypatch.setattr(peers, "on_gpu", lambda inputs: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))

    return install


@pytest.mark.parametrize("row", LINEAR, ids=lambda row: row.id)
@pytest.mark.parametrize("name", ["fla", "fla-fused"])
def test_fla_is_asked_for_the_rows_function(name: str, row: Any, installed: Callable[..., None]) -> None:
    installed()
    peer = next(each for each in linear_bench.BENCH.peers("cuda") if each.name == name)
    cell = measure(linear_bench.BENCH, row, member(linear_bench.BENCH, row), peer).cells[name]
    if name == "fla-fused" and (row.step or row.decay != "none"):
        assert cell.forward == Problem("absent", "it is measured on whole sequences without a decay")
    else:
        assert isinstance(cell.forward, Samples), cell.forward
        assert isinstance(cell.both, Samples) == row.backward


@pytest.mark.parametrize(
    ("capability", "triton", "more", "refused"),
    [
        (9, "3.3.1", (), False),
        (9, "3.4.0", (), True),
        (9, "3.6.0+gitabc", (), True),
        (9, "3.7.0", (), True),
        (9, "3.7.1", (), False),
        (9, "3.6.0", ("tilelang",), False),
        (8, "3.6.0", (), False),
        (10, "3.6.0", (), False),
    ],
)
def test_flas_gated_backward_is_refused_where_it_is_wrong(
    capability: int, triton: str, more: tuple[str, ...], refused: bool, installed: Callable[..., None]
) -> None:
    installed(capability, triton, ("fla", *more))
    bench = linear_bench.BENCH
    for row in LINEAR[:6]:
        cell = measure(bench, row, member(bench, row), bench.peers("cuda")[0]).cells["fla"]
        assert isinstance(cell.forward, Samples)
        if refused and row.decay == "scalar":
            assert isinstance(cell.both, Problem)
            assert cell.both.kind == "absent"
            assert cell.both.reason.startswith(f"fla refuses its gated backward on Hopper with triton {triton}")
        else:
            assert isinstance(cell.both, Samples)


# --- mamba-ssm --------------------------------------------------------------------------------------------------------


class MambaSsm:
    """The functions of mamba-ssm that are asked, as they are documented, token by token."""

    @staticmethod
    def selective_scan_fn(
        u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, *, z: Any, delta_bias: Any, delta_softplus: bool
    ) -> Any:
        """u, delta, z (B, E, T), A (E, N), B and C (B, G, N, T)."""
        assert u.is_contiguous()
        assert B.is_contiguous()
        state, out = torch.zeros(*u.shape[:2], A.shape[1]), []
        for t in range(u.shape[2]):
            group, *given = B[:, 0, :, t], u[..., t], delta[..., t], A
            step = MambaSsm.selective_state_update(
                state, *given, group, C[:, 0, :, t], D, z[..., t], delta_bias, delta_softplus, in_place=False
            )
            out.append(step[0])
            state = step[1]
        return torch.stack(out, 2)

    @staticmethod
    def selective_state_update(
        state: Any,
        x: Any,
        dt: Any,
        A: Any,
        B: Any,
        C: Any,
        D: Any = None,
        z: Any = None,
        dt_bias: Any = None,
        dt_softplus: bool = False,
        in_place: bool = True,
    ) -> Any:
        """state (B, E, N), x, dt, z (B, E), A (E, N), B, C (B, N), D, dt_bias (E,); or heads (H, P) for E, groups."""
        assert dt.shape == x.shape
        assert A.shape == state.shape[1:]
        if state.dim() == 4:
            assert D.shape == dt_bias.shape == x.shape[1:]
            B, C = (each.repeat_interleave(state.shape[1] // each.shape[1], 1)[:, :, None] for each in (B, C))
        else:
            B, C = B[:, None], C[:, None]
        delta = torch.nn.functional.softplus(dt + dt_bias) if dt_softplus else dt + dt_bias
        after = (delta[..., None] * A).exp() * state + (delta * x)[..., None] * B
        out = (after * C).sum(-1) + D * x
        out = out if z is None else out * torch.nn.functional.silu(z)
        if not in_place:
            return out, after
        state.copy_(after)
        return out

    @staticmethod
    def mamba_chunk_scan_combined(
        x: Any, dt: Any, A: Any, B: Any, C: Any, chunk_size: int, *, D: Any, dt_bias: Any, dt_softplus: bool
    ) -> Any:
        P, N = x.shape[3], B.shape[3]
        state, out = torch.zeros(x.shape[0], x.shape[2], P, N), []
        wide = (A[:, None, None].expand(-1, P, N), D[:, None].expand(-1, P), dt_bias[:, None].expand(-1, P))
        for t in range(x.shape[1]):
            given = x[:, t], dt[:, t, :, None].expand(-1, -1, P), wide[0], B[:, t], C[:, t], wide[1], None, wide[2]
            step, state = MambaSsm.selective_state_update(state, *given, dt_softplus, in_place=False)
            out.append(step)
        return torch.stack(out, 1)


@pytest.mark.parametrize("row", MAMBA, ids=lambda row: row.id)
def test_mamba_ssm_is_asked_for_the_rows_function(row: Any, installed: Callable[..., None]) -> None:
    installed()
    peer, _ = mamba_bench.BENCH.peers("cuda")
    cell = measure(mamba_bench.BENCH, row, member(mamba_bench.BENCH, row), peer).cells["mamba_ssm"]
    assert isinstance(cell.forward, Samples), cell.forward
    assert isinstance(cell.both, Samples) == row.backward


def test_the_scans_leaves_are_channels_first_and_their_gradients_ours(installed: Callable[..., None]) -> None:
    installed()
    row = MAMBA[0]
    inputs = mamba_bench.BENCH.inputs(row, "cpu", torch.float32)
    ours, theirs = member(mamba_bench.BENCH, row).prepare(inputs), mamba_peers.mamba_ssm(inputs)
    found = [torch.autograd.grad(call.ours(call.forward()).sin().sum(), call.leaves) for call in (ours, theirs)]
    by_name = dict(zip(row.operands.given, found[0], strict=True))
    for name, gradient in zip(("u", "dt", "a", "b", "c", "d", "z", "dt_bias"), found[1], strict=True):
        turned = {3: (0, 2, 1), 4: (0, 3, 1, 2)}.get(gradient.dim())
        torch.testing.assert_close(
            gradient.permute(turned) if turned else gradient, by_name[name], rtol=1e-4, atol=1e-4
        )


def test_a_tensor_that_offsets_of_32_bits_cannot_tell_apart_is_not_given_to_triton(
    installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed()
    monkeypatch.setattr(mamba_peers, "OFFSETS", 2 * 20 * 4 * 6)
    with pytest.raises(Absent, match="count a tensor's elements in 32 bits, and x has 960"):
        mamba_peers.mamba_ssm(mamba_bench.BENCH.inputs(MAMBA[2], "cpu", torch.float32))
    longest = [row for row in mamba_rows.CUDA if row.mechanism == "mamba2" and math.prod(row.operands.out) >= 2**31]
    assert [row.id for row in longest] == [row.id for row in mamba_rows.CUDA if row.group == "ssd-length"]


# --- whole mixers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", MIXERS, ids=lambda row: row.id)
def test_hfs_mixer_has_our_gradients_of_the_same_parameters(row: Any) -> None:
    pytest.importorskip("transformers", reason="needs the extra `hf`")
    inputs = mamba_bench.BENCH.inputs(row, "cpu", torch.float32)
    ours, theirs = member(mamba_bench.BENCH, row, "chunkwise").prepare(inputs), mamba_peers.hf(inputs)
    assert [leaf.shape for leaf in ours.leaves] == list(row.operands.given.values())
    assert all(mine.data_ptr() == other.data_ptr() for mine, other in zip(ours.leaves, theirs.leaves, strict=True))
    found = [torch.autograd.grad(call.forward().sin().sum(), call.leaves) for call in (ours, theirs)]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("row", MIXERS, ids=lambda row: row.id)
def test_a_mixer_counts_the_parameters_that_its_cost_does(row: Any) -> None:
    mechanism = mamba_bench.ours.mechanism(row.mechanism)
    policy = mechanism.policy.model_validate(row.fields)
    cost = mamba_bench.load_entry(mechanism.cost)(policy, mamba_bench.MixerSize(row.M, row.T, row.B, row.T, 4, "eager"))
    assert sum(math.prod(shape) for name, shape in row.operands.given.items() if name != "hidden") == cost.parameters
    inner = mamba_bench.count(row.inner, 4).flops
    assert mamba_bench.count(row, 4).flops["both"] > inner["both"]


def test_the_mixer_that_the_operator_chooses_is_the_planned_one() -> None:
    inputs: Any = mamba_bench.BENCH.inputs(MIXERS[0], "cpu", torch.float32)
    assert mamba_bench.BENCH.planned(inputs, "forward") == ("chunkwise", "eager")
    calls = [
        contestant.prepare(inputs)
        for contestant in (mamba_bench.BENCH.auto, member(mamba_bench.BENCH, MIXERS[0], "chunkwise"))
    ]
    torch.testing.assert_close(*(call.forward() for call in calls), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("there", "device", "name", "reasons"),
    [
        ((), "cpu", "hf-slow", ["transformers is not installed"] * 2),
        (("transformers", "mamba_ssm"), "cpu", "hf-slow", ["where mamba-ssm is installed it runs its kernels"] * 2),
        (("transformers",), "cuda", "hf-torch-conv1d", ["mamba-ssm is not installed: pip install"] * 2),
        (("transformers", "causal_conv1d"), "cuda", "hf", ["mamba-ssm is not installed: pip install"] * 2),
        (("transformers", "mamba_ssm"), "cuda", "hf-torch-conv1d", ["without its scan in CUDA", None]),
        (("transformers", "mamba_ssm", "causal_conv1d", "selective_scan_cuda"), "cuda", "hf", [None, None]),
    ],
)
def test_hfs_slow_form_stands_for_no_kernel(
    there: tuple[str, ...], device: str, name: str, reasons: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="needs the extra `hf`")
    monkeypatch.setattr(mamba_peers, "installed", lambda module: module in there)
    monkeypatch.setattr(mamba_peers, "on_gpu", lambda inputs: device == "cuda")
    peer = mamba_bench.BENCH.peers(device)[1]
    assert peer.name == name
    for row, reason in zip(MIXERS, reasons, strict=True):
        inputs = mamba_bench.BENCH.inputs(row, "cpu", torch.float32)
        if reason is None:
            assert peer.prepare(inputs).forward().shape == row.operands.out
        else:
            with pytest.raises(Absent, match=reason):
                peer.prepare(inputs)


# --- absence ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peers", "row", "there", "reason"),
    [
        (linear_peers.fla, LINEAR[0], (), "flash-linear-attention is not installed: pip install"),
        (linear_peers.fla_fused, LINEAR[0], (), "flash-linear-attention is not installed: pip install"),
        (linear_peers.fla, LINEAR[0], ("fla",), "its kernels run on a GPU alone"),
        (mamba_peers.mamba_ssm, MAMBA[0], (), "mamba-ssm is not installed: pip install"),
        (mamba_peers.mamba_ssm, MAMBA[3], ("mamba_ssm",), "its kernels run on a GPU alone"),
        (mamba_peers.mamba_ssm, MIXERS[0], ("mamba_ssm",), "its kernels are measured in HF's mixer there"),
        (mamba_peers.hf, MAMBA[0], (), "it is measured as a whole mixer"),
    ],
)
def test_what_is_not_there_is_said(
    peers: Any, row: Any, there: tuple[str, ...], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = linear_bench.BENCH if row in LINEAR else mamba_bench.BENCH
    inputs = bench.inputs(row, "cpu", torch.float32)
    monkeypatch.setattr(linear_peers.importlib.util, "find_spec", lambda name: name in there or None)
    with pytest.raises(Absent, match=reason):
        peers(inputs)


def test_mamba_ssm_without_its_scan_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = mamba_bench.BENCH.inputs(MAMBA[0], "cpu", torch.float32)
    monkeypatch.setattr(mamba_peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Absent, match="without its scan in CUDA"):
        mamba_peers.scan_call(inputs)


def test_long_rows_are_not_asked_of_the_reference_nor_of_the_plain_form(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = linear_bench.BENCH.inputs(LINEAR[1], "cpu", torch.float32)
    monkeypatch.setattr(linear_peers, "PLAIN_NUMBERS", 40 * 2 * 8 * 6 - 1)
    with pytest.raises(Absent, match="a state for every token, 3,840 numbers"):
        linear_peers.plain(inputs)
    limited = linear_time.member("eager", lambda *_: pytest.fail("asked"), 39)
    with pytest.raises(Absent, match="the reference is not timed on more than 39 tokens"):
        limited.prepare(inputs)


# --- reports ----------------------------------------------------------------------------------------------------------


def found(bench: Bench, row: TimedRow, forward: float, both: float | None = None, **more: Cell) -> Measured:
    taken = Cell("member", Samples((forward,)), None if both is None else Samples((both,)))
    copies = {"forward": 1.0} if both is None else {"forward": 1.0, "both": 2.8}
    return Measured(row, 2, bench.count(row, 2), ("a",), {"a": taken, **more}, copies=copies)


def test_the_share_of_the_floor_is_that_of_a_copy() -> None:
    bench, row = linear_bench.BENCH, LINEAR[1]
    result = found(bench, row, 2.0, 4.0, fla=Cell("peer", Samples((6.0,)), Samples((10.0,)), peak_bytes=2**20))
    size = 2 * 2 * 40 * 2 * (8 + 6)
    speeds, verdict, *_ = report.tables(bench, "raw", [result], None)
    assert speeds.title == "raw: ms, forward / forward + backward"
    assert speeds.rows == (("tiny", "2,000/4,000", "6,000/10,000"),)
    shown = dict(zip(verdict.columns, verdict.rows[0], strict=True))
    assert shown["of floor"] == "0.50 / 0.70"
    assert shown["over best peer"] == "3.00 / 2.50"
    assert shown["best peer's"] == "1"
    assert "over FA2" not in shown
    data = report.as_data(bench, result)
    assert data["share_of_floor"]["forward"] == 0.5
    assert (data["feature_map"], data["T"], data["tokens"]) == ("identity", 40, 40)
    cell = data["cells"]["a"]["forward"]
    assert cell["bytes_per_second"] == size / 2
    assert cell["seconds_per_token"] == 2.0 / 40
    assert data["copy_seconds"] == {"forward": 1.0, "both": 2.8}
    assert report.as_data(bench, replace(result, copies={}))["share_of_floor"] == {}


def test_a_row_has_a_copy_of_as_many_bytes_measured() -> None:
    copied = []

    class Counting(Clock):
        def copy(self, moved: int) -> float:
            copied.append(moved)
            return super().copy(moved)

    bench, row = linear_bench.BENCH, LINEAR[1]
    taken = grid.measure(bench, row, bench.members("cpu", row), Counting("cpu"), torch.float32, 1, ["chunkwise"])
    assert copied == list(bench.count(row, 4).floor.values())
    assert all(seconds > 0 for seconds in taken.copies.values())
    assert taken.copies.keys() == {"forward", "both"}


def test_steps_are_told_by_the_states_they_move() -> None:
    bench, row = mamba_bench.BENCH, MAMBA[3]
    speeds, *_ = report.tables(bench, "decode", [found(bench, row, 1e-6)], 1e12)
    assert speeds.title == "decode: GB/s, forward, of states read and written; a copy moves 1,000"
    assert speeds.rows[0][1] == f"{2 * 4 * 3 * 6 * 4 / 1e3:.3g}"


def test_rows_are_compared_by_length_and_by_equal_states() -> None:
    bench = linear_bench.BENCH
    length = [Linear("length", f"t{T}", T=T, feature_map="identity", **TINY) for T in (10, 20, 40)]
    results = [
        found(bench, LINEAR[2], 3.0, 8.0),
        found(bench, LINEAR[3], 2.0, 5.0),
        found(bench, length[0], 1.0, 2.0),
        found(bench, length[1], 3.0, 4.0),
        found(bench, replace(length[2], forward_only=True), 4.0),
    ]
    equal, flat = linear_bench.compared(results)
    assert equal.ratio == {"forward": 1.5, "both": 1.6}
    assert flat.ratio == {"forward": pytest.approx(1.5), "both": 1.0}
    assert list(report.lines([equal, flat])) == [
        "favor/favor5 takes, times what elu-r5 of an equal state takes: 1.50 / 1.60",
        "length: largest over smallest time per token: 1.50 / 1.00",
    ]
    assert not list(linear_bench.compared([results[0], results[2]]))
    assert speeds_of(bench, results[2:4]) == "length: ns a token, forward / forward + backward"


def speeds_of(bench: Bench, results: list[Measured]) -> str:
    return next(iter(report.tables(bench, results[0].row.group, results, None))).title
