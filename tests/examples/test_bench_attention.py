"""The grid of attention: its rows, its peers as functions, its statistics, and what fails in a cell."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attncompiler import ops
from attncompiler.bench.attention import bench, contestants, keep, peers
from attncompiler.bench.attention.bench import BENCH
from attncompiler.bench.attention.inputs import Inputs, pattern_mask
from attncompiler.bench.attention.rows import CPU, CUDA, Row, log_normal
from attncompiler.bench.device import Clock
from attncompiler.bench.grid import measure as grid
from attncompiler.bench.grid import report, run
from attncompiler.bench.grid.bench import Bench
from attncompiler.bench.grid.cells import Cell, Measured, Problem
from attncompiler.bench.grid.contestants import Absent, Call, Contestant
from attncompiler.bench.grid.rows import select
from attncompiler.bench.measure import Samples
from attncompiler.errors import UsageError
from attncompiler.measured import Run

ALL = (*CUDA, *CPU)
RUN = Run(device="here", date="2026-11-26", versions={})
SMALL = (
    Row("small", "causal", B=2, T=40, H=2, D=8),
    Row("small", "full", T=40, H=2, D=8, pattern={"kind": "full"}),
    Row("small", "window", T=40, H=4, K=2, D=8, pattern={"kind": "sliding_window", "window": 9}),
    Row("small", "globals", T=40, H=2, D=8, pattern={"kind": "sliding_window", "window": 9, "global_tokens": 3}),
    Row("small", "around", T=40, H=2, D=8, pattern={"kind": "sliding_window", "window": 9, "causal": False}),
    Row("small", "strided", T=40, H=2, D=8, pattern={"kind": "strided", "stride": 4, "window": 3}),
    Row("small", "blocks", T=40, H=2, D=8, pattern={"kind": "strided", "block_size": 4, "stride": 4, "window": 2}),
    Row("small", "near", T=40, H=2, D=8, pattern={"kind": "local_global", "block_size": 4, "local_blocks": 2}),
    Row("small", "random", T=40, H=2, D=8, pattern={"kind": "random", "block_size": 4, "random_blocks": 2}),
    Row(
        "small",
        "both-ways",
        T=40,
        H=2,
        D=8,
        pattern={"kind": "random", "block_size": 4, "random_blocks": 2, "causal": False},
    ),
    Row("small", "step", B=3, T=1, S=30, H=4, K=2, D=8),
    Row("small", "packed", T=40, H=2, D=8, layout="packed", lengths=(5, 20, 1, 14)),
    Row("small", "padded", B=3, T=20, H=2, D=8, layout="padded", lengths=(5, 20, 1)),
)
STEP, PACKED = SMALL[10], SMALL[11]
by_name = pytest.mark.parametrize("row", SMALL, ids=lambda row: row.name)
square = pytest.mark.parametrize("row", [row for row in SMALL if row.backward], ids=lambda row: row.name)


def measure(row: Row, *taking: Contestant, repeats: int = 2, of: Bench = BENCH) -> Measured:
    return grid.measure(of, row, taking, Clock("cpu"), torch.float32, repeats)


def raising(name: str, error: Exception, *, late: bool = False) -> Contestant:
    """A peer that fails when it is asked, or when it runs."""

    def fail() -> Any:
        raise error

    return Contestant(name, "peer", lambda inputs: Call(fail, inputs.qkv) if late else fail())


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [CUDA, CPU], ids=["cuda", "cpu"])
def test_rows_have_names_of_their_own_and_buckets_of_their_own(rows: tuple[Row, ...]) -> None:
    assert len({row.id for row in rows}) == len(rows)
    plain = [row for row in rows if row.layout == "plain"]
    bucket = contestants.mechanism().bucket
    assert bucket is not None
    keys = {bucket(row.shapes, contestants.policy(row), "bfloat16").key for row in plain}
    assert len(keys) == len(plain)


@pytest.mark.parametrize("row", ALL, ids=lambda row: row.id)
def test_lengths_fill_their_row(row: Row) -> None:
    if row.layout == "packed":
        assert sum(row.lengths) == row.T
    if row.layout == "padded":
        assert len(row.lengths) == row.B
        assert max(row.lengths) == row.T
    assert 0 < bench.visible_pairs(row) <= row.B * row.T * row.S


@given(st.integers(1, 64), st.integers(0, 4096))
def test_log_normal_lengths_are_positive_and_add_up(count: int, more: int) -> None:
    lengths = log_normal(count, count + more)
    assert len(lengths) == count
    assert sum(lengths) == count + more
    assert min(lengths) >= 1
    assert lengths == log_normal(count, count + more)


def test_rows_are_selected_by_group_by_name_and_by_wildcard() -> None:
    assert select(CUDA, ()) == CUDA
    assert {row.group for row in select(CUDA, ["causal"])} == {"causal"}
    assert [row.id for row in select(CUDA, ["decode/*", "long/causal-t131072"])] == [
        "long/causal-t131072",
        "decode/b64-s32768-h32-k8-d128",
    ]
    with pytest.raises(UsageError, match=r"E602 no row is named 'cuasal'; there are causal/b32"):
        select(CUDA, ["causal", "cuasal"])


def test_the_random_row_sees_a_fortieth_of_all_pairs() -> None:
    [row] = select(CUDA, ["sparse/random*"])
    assert bench.visible_pairs(row) / row.T**2 == pytest.approx(0.025, rel=0.1)


# --- functions --------------------------------------------------------------------------------------------------------


@by_name
def test_pairs_are_those_of_the_mask(row: Row) -> None:
    inputs = Inputs(row, "cpu", torch.float32)
    if row.layout == "padded":
        seen = sum(length * (length + 1) // 2 for length in row.lengths)
    elif not row.backward:
        seen = row.B * row.S
    else:
        seen = row.B * int(inputs.dense().sum())
    assert bench.visible_pairs(row) == seen


@square
def test_the_formula_of_a_pattern_is_the_operators(row: Row) -> None:
    """Keys with a weight where all scores are equal."""
    equal = torch.zeros(1, row.T, 1, 1)
    weights = ops.attention(equal, equal, torch.eye(row.T)[None, :, None], pattern=dict(row.pattern), kernel="eager")
    index = torch.arange(row.T)
    assert torch.equal(pattern_mask(row, "cpu")(0, 0, index[:, None], index[None]), weights[0, :, 0] > 0)


@by_name
def test_every_member_and_the_peer_compute_the_rows_function(row: Row) -> None:
    result = measure(row, *contestants.members("cpu", row), *peers.peers("cpu"))
    assert list(result.cells) == [*contestants.mechanism().order("cpu", {"pattern": row.pattern["kind"]}), "SDPA"]
    for cell in result.cells.values():
        assert isinstance(cell.forward, Samples)
        assert isinstance(cell.both, Samples) == row.backward
    assert result.chain[0] == next(iter(result.cells))


@square
def test_the_peers_gradients_are_those_of_the_operator(row: Row) -> None:
    inputs = Inputs(row, "cpu", torch.float64)
    ours, theirs = (c.prepare(inputs) for c in (contestants.member("eager"), peers.peers("cpu")[0]))
    weight = torch.randn(row.shapes["q"], dtype=torch.float64)
    if row.layout == "padded":
        weight = weight * inputs.real[:, :, None, None]
    found = [torch.autograd.grad((c.ours(c.forward()) * weight).sum(), c.leaves) for c in (ours, theirs)]
    for mine, other in zip(found[0], found[1], strict=True):
        torch.testing.assert_close(mine, other.transpose(1, 2))


@by_name
def test_flex_attention_computes_the_rows_function(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not compiled, as it runs on a CPU, and without its backward, which it has on a GPU alone."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)

    def prepare(inputs: Inputs) -> Call:
        for leaf in inputs.heads_first:
            leaf.requires_grad_(False)
        return peers.flex(inputs)

    result = measure(row, contestants.member("eager"), Contestant("Flex", "peer", prepare))
    assert isinstance(result.cells["Flex"].forward, Problem if row.layout == "padded" else Samples)


def flash(q: Any, k: Any, v: Any, causal: bool, left: int | None, right: int | None, offsets: Any = None) -> Any:
    """What flash-attention's functions are documented to compute, (B, T, H, D) or packed (T, H, D), by a dense mask.

    The last query is aligned with the last key; `left` and `right` are how many keys beside its own a query sees.
    """
    packed = q.dim() == 3
    q, k, v = (x[None] if packed else x for x in (q, k, v))
    i = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
    j = torch.arange(k.shape[1])[None]
    seen = (j <= i) if causal else (j >= 0) & (i >= 0)
    seen = seen if left is None else seen & (i - j <= left)
    seen = seen if right is None else seen & (j - i <= right)
    if offsets is not None:
        document = torch.bucketize(torch.arange(q.shape[1]), offsets[1:].long(), right=True)
        seen = seen & (document[:, None] == document[None])
    heads = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=seen, enable_gqa=True).transpose(1, 2)
    return out[0] if packed else out


def flash_attention_2(
    q: Any,
    k: Any,
    v: Any,
    ends_q: Any,
    ends_k: Any,
    most_q: int,
    most_k: int,
    dropout: float,
    causal: bool,
    debug: bool,
    *,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> Any:
    assert (dropout, debug, ends_q is ends_k) == (0.0, False, True)
    assert most_q == most_k <= q.shape[0 if q.dim() == 3 else 1]
    return (flash(q, k, v, causal, window_size_left, window_size_right, ends_q),)


class FlashAttention4:
    """The two functions of `flash_attn.cute.interface`."""

    @staticmethod
    def flash_attn_func(q: Any, k: Any, v: Any, *, causal: bool, window_size: tuple[Any, Any]) -> Any:
        return flash(q, k, v, causal, *window_size), None

    @staticmethod
    def flash_attn_varlen_func(
        q: Any,
        k: Any,
        v: Any,
        *,
        cu_seqlens_q: Any,
        cu_seqlens_k: Any,
        max_seqlen_q: int,
        max_seqlen_k: int,
        causal: bool,
        window_size: tuple[Any, Any],
    ) -> Any:
        assert cu_seqlens_q is cu_seqlens_k
        return flash(q, k, v, causal, *window_size, cu_seqlens_q), None


FLASH = ("causal", "full", "window", "around", "step", "packed", "padded")


@pytest.mark.parametrize("row", [row for row in SMALL if row.name in FLASH], ids=lambda row: row.name)
@pytest.mark.parametrize("peer", [peers.flash, peers.flash4])
def test_flash_attention_is_asked_for_the_rows_function(peer: Any, row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for what runs on a GPU alone."""
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_attention_2)
    found = SimpleNamespace(find_spec=lambda name: True)
    monkeypatch.setattr(peers, "importlib", SimpleNamespace(util=found, import_module=lambda name: FlashAttention4))
    result = measure(row, contestants.member("eager"), Contestant("peer", "peer", peer))
    assert isinstance(result.cells["peer"].forward, Samples)
    assert isinstance(result.cells["peer"].both, Samples) == row.backward


@pytest.mark.parametrize("name", ["window", "around", "globals", "strided", "packed"])
def test_what_a_peer_has_no_mask_for_it_says(name: str) -> None:
    """Without a GPU the calls are made and not run."""
    row = next(row for row in SMALL if row.name == name)
    inputs = Inputs(row, "cpu", torch.float32)
    with pytest.raises(Absent, match="cuDNN"):
        peers.cudnn(inputs)
    if name in ("globals", "strided"):
        with pytest.raises(Absent, match="no such mask"):
            peers.flash(inputs)
    else:
        assert {leaf.shape[-1] for leaf in peers.flash(inputs).leaves} == {row.D}


def test_flex_is_not_asked_for_a_mask_of_too_many_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "MASK_ELEMENTS", 1599)
    with pytest.raises(Absent, match="its block mask is built from all 40 × 40 pairs"):
        peers.flex(Inputs(SMALL[2], "cpu", torch.float32))


def test_flash_attention_4_is_named_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Absent, match="flash-attn-4 is not installed"):
        peers.flash4(Inputs(SMALL[0], "cpu", torch.float32))


# --- cells ------------------------------------------------------------------------------------------------------------


def test_what_fails_in_a_cell_is_shown_there_and_stops_no_other() -> None:
    failing = {
        "gone": (raising("gone", Absent("not installed")), "absent", "not installed"),
        "full": (raising("full", torch.OutOfMemoryError("no room\nat all"), late=True), "no memory", "no room"),
        "odd": (raising("odd", KeyError("x"), late=True), "failed", "KeyError: 'x'"),
        "sm": (raising("sm", RuntimeError("No available kernel. Aborting."), late=True), "refused", "torch offers no"),
        "ring": (contestants.member("ring"), "refused", "not built"),
    }
    result = measure(SMALL[0], *(each for each, *_ in failing.values()), contestants.member("sdpa"))
    for name, (_, kind, reason) in failing.items():
        problem = result.cells[name].forward
        assert isinstance(problem, Problem)
        assert problem.kind == kind
        assert problem.reason.startswith(reason)
        assert result.cells[name].both == problem
    assert isinstance(result.cells["sdpa"].both, Samples)


def test_another_function_is_told_from_rounding() -> None:
    def shifted(inputs: Inputs) -> Call:
        right = contestants.member("eager").prepare(inputs)
        return replace(right, forward=lambda: right.forward().roll(1, dims=1))

    result = measure(SMALL[0], contestants.member("sdpa"), Contestant("rolled", "peer", shifted))
    problem = result.cells["rolled"].forward
    assert isinstance(problem, Problem)
    assert problem.kind == "another function"


def test_a_contestant_that_fails_in_its_turns_is_timed_no_more() -> None:
    def tiring(inputs: Inputs) -> Call:
        right, left = contestants.member("sdpa").prepare(inputs), [5]

        def forward() -> torch.Tensor:
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError("tired")
            return right.forward()

        return replace(right, forward=forward)

    result = measure(STEP, contestants.member("sdpa"), Contestant("tiring", "peer", tiring), repeats=9)
    assert result.cells["tiring"].forward == Problem("failed", "RuntimeError: tired")
    forward = result.cells["sdpa"].forward
    assert isinstance(forward, Samples)
    assert len(forward.seconds) == 9


def test_a_device_that_is_lost_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clock, "lost", lambda self: "an illegal access")
    failing = replace(BENCH, members=lambda *_: (raising("a", RuntimeError("x")), contestants.member("sdpa")))
    found = list(run.results(failing, SMALL[:3], Clock("cpu"), torch.float32, 1, against_peers=False))
    assert len(found) == 1
    assert found[0].lost == "an illegal access"
    assert list(found[0].cells) == ["a"]
    assert not list(keep.entries(found, RUN, "float32"))


def test_what_is_slow_is_not_asked_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "SLOW", 0.0)
    cell = measure(SMALL[0], contestants.member("sdpa"), repeats=9).cells["sdpa"]
    assert isinstance(cell.forward, Samples)
    assert len(cell.forward.seconds) == 1
    assert isinstance(cell.both, Problem)
    assert cell.both.kind == "too slow"


def test_nobody_has_the_same_neighbour_in_every_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a call takes depends on the one before it."""
    monkeypatch.setattr(grid, "BUDGET", 1e9)  # all have all turns, however slow the machine is
    begun: list[str] = []

    def noted(name: str) -> Contestant:
        def prepare(inputs: Inputs) -> Call:
            right = contestants.member("sdpa").prepare(inputs)
            return replace(right, forward=lambda: (begun.append(name), right.forward())[1])

        return Contestant(name, "peer", prepare)

    names = ("a", "b", "c", "d")
    measure(STEP, *(noted(name) for name in names), repeats=40)
    turns = list(zip(*[iter(begun[-4 * 40 :])] * 4, strict=True))
    assert all(sorted(turn) == list(names) for turn in turns)
    for name in names:
        before = Counter(turn[turn.index(name) - 1] for turn in turns if turn[0] != name)
        assert len(before) == 3
        assert max(before.values()) < 0.7 * before.total()


@given(st.integers(1, 200), st.data())
def test_turns_are_spread_over_all_of_them(most: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, most))
    due = [turn for turn in range(most) if grid._due(turn, count, most)]
    assert len(due) == count
    gaps = [later - earlier for earlier, later in pairwise(due)]
    assert max(gaps, default=0) - min(gaps, default=0) <= 1


@given(st.floats(1e-7, 1e3), st.integers(1, 1000))
def test_turns_fit_the_budget_or_are_the_fewest(estimate: float, repeats: int) -> None:
    turns = grid._turns(estimate, repeats)
    assert turns <= repeats
    assert turns <= grid.FEWEST or turns * estimate <= grid.BUDGET
    assert (turns == 0) == (estimate > grid.SLOW)


# --- reports ----------------------------------------------------------------------------------------------------------


def cell(role: Any, forward: float, both: float | None = None) -> Cell:
    given = Samples((both,)) if both is not None else Problem("no memory", "no room")
    return Cell(role, Samples((forward,)), given)


RESULT = Measured(
    SMALL[0],
    itemsize=2,
    count=bench.count(SMALL[0], 2),
    chain=("a", "b"),
    cells={
        "a": cell("member", 2.0, 4.0),
        "b": cell("member", 1.0, 8.0),
        "FA2": cell("peer", 3.0, 2.0),
        "X": cell("peer", 2.0),
    },
)


def test_ratios_are_of_the_planned_kernel() -> None:
    assert report.ratios(RESULT, "FA2") == {
        "best_peer": {"forward": 1.0, "both": 0.5},
        "fa2": {"forward": 1.5, "both": 0.5},
        "best_member": {"forward": 0.5, "both": 1.0},
    }
    assert report.short_of(RESULT) == ("forward",)
    assert report.short_of(replace(RESULT, chain=("b",))) == ("both",)
    assert report.short_of(replace(RESULT, cells=RESULT.cells | {"b": cell("member", 1.95, 3.9)})) == ()
    assert report.short_of(replace(RESULT, chain=("c",))) == ("forward", "both"), "what is planned did not run"


def test_a_planned_kernel_without_a_backward_is_measured_as_the_pair_that_runs() -> None:
    paired = replace(BENCH, planned=lambda inputs, direction: ("ring", "sdpa"))
    result = measure(SMALL[0], contestants.member("ring"), contestants.member("sdpa"), of=paired)
    assert isinstance(result.cells["auto"].both, Samples)
    assert result.plan is result.cells["auto"]
    assert [list(entry.kernels) for entry in keep.entries([result], RUN, "float32")] == [["sdpa"]]


def test_two_kernels_that_share_a_call_are_measured_together() -> None:
    chains = {"forward": ("sdpa", "chunkwise"), "backward": ("chunkwise", "sdpa")}
    paired = replace(BENCH, planned=lambda inputs, direction: chains[direction])
    result = measure(SMALL[0], contestants.member("sdpa"), contestants.member("chunkwise"), of=paired)
    assert result.plan is result.cells["auto"]
    _, verdict, *_ = report.tables(BENCH, "small", [result], None)
    assert dict(zip(verdict.columns, verdict.rows[0], strict=True))["planned"] == "sdpa, backward chunkwise"
    assert report.as_data(BENCH, result)["planned_backward"] == "chunkwise"
    assert [sorted(entry.kernels) for entry in keep.entries([result], RUN, "float32")] == [["chunkwise", "sdpa"]]


def test_speed_counts_visible_pairs_and_a_step_what_it_reads() -> None:
    assert RESULT.count.flops["forward"] == 4 * 2 * 8 * 1640
    data = report.as_data(BENCH, RESULT)
    assert data["cells"]["a"]["forward"]["flops_per_second"] == RESULT.count.flops["forward"] / 2.0
    assert data["cells"]["a"]["both"]["flops_per_second"] == 3.5 * RESULT.count.flops["forward"] / 4.0
    assert data["cells"]["X"]["both"] == {"problem": "no memory", "reason": "no room"}
    assert bench.key_bytes(STEP, 2) == 2 * 3 * 30 * 2 * 8 * 2


def test_tables_name_everyone_who_ran_and_why_others_did_not() -> None:
    speeds, verdict, notes = report.tables(BENCH, "small", [RESULT], None)
    assert speeds.columns == ("small", "a", "b", "FA2", "X")
    assert speeds.rows[0][-1].endswith("/memory")
    [row] = verdict.rows
    assert dict(zip(verdict.columns, row, strict=True)) == {
        "small": "causal",
        "planned": "a",
        "ms": "2e+03 / 4e+03",
        "spread": "0% / 0%",
        "of best member": "0.50 / 1.00 !",
        "over best peer": "1.00 / 0.50",
        "over FA2": "1.50 / 0.50",
    }
    assert notes.rows == (("X", "no memory (with backward)", "all", "no room"),)


def test_entries_hold_members_alone_by_bucket() -> None:
    [entry] = keep.entries([RESULT], RUN, "bfloat16")
    assert set(entry.kernels) == {"a", "b"}
    assert entry.kernels["b"].both == 8.0
    assert (entry.bucket.kind, entry.bucket.dtype, entry.bucket.levels["length"]) == ("causal", "bfloat16", 5)
    assert not list(keep.entries([replace(RESULT, row=PACKED)], RUN, "bfloat16"))


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=9), st.floats(0.1, 10))
def test_the_spread_of_samples_has_no_unit(seconds: list[float], factor: float) -> None:
    samples = Samples(tuple(seconds))
    assert samples.spread >= 0
    assert samples.scaled(factor).spread == pytest.approx(samples.spread, rel=1e-9, abs=1e-9)
    assert Samples((1.0, 1.0, 1.0, 50.0, 1.0)).spread == 0
