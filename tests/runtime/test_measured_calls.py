"""Calls without a site follow what was measured on this machine; sites and named kernels do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from attncompiler.errors import UsageError
from attncompiler.measured import Bucket, Entry, Run, Times, save, store
from attncompiler.mechanisms.attention.layer import AttentionSite
from attncompiler.mechanisms.attention.op import OPERATOR, AttentionOptions, attention
from attncompiler.runtime import dispatch
from attncompiler.runtime.context import Chain
from attncompiler.targets.detect import detect_target


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """A function that puts times of kernels for causal calls of so many tokens into this machine's table."""
    monkeypatch.setattr(store, "folder", lambda: tmp_path)

    def forget() -> None:
        store._entries.cache_clear()
        dispatch._decided.clear()

    def put(length: int, **seconds: float | tuple[float, float]) -> Path:
        here = detect_target("cpu")
        levels = {"width": 2, "block": 0, "group": 0, "density": 0, "length": length}
        each = Entry(
            mechanism="attention",
            bucket=Bucket(dtype="float32", kind="causal", levels=levels),
            run=Run(device=here.title, date="2026-11-26", versions={}),
            kernels={
                name: Times(forward=time[0], both=time[1])
                if isinstance(time, tuple)
                else Times(forward=time, both=time)
                for name, time in seconds.items()
            },
        )
        path = save([each], here.name)
        forget()
        return path

    forget()
    yield put
    forget()


def qkv(length: int) -> dict[str, torch.Tensor]:
    return {name: torch.randn(1, length, 2, 4) for name in "qkv"}


def chain(length: int, **options: object) -> tuple[str, ...]:
    return dispatch.chain(OPERATOR, qkv(length), AttentionOptions(**options))


def test_a_call_follows_the_nearest_length(measured: Callable[..., Path]) -> None:
    assert chain(8) == ("sdpa", "chunkwise", "eager")
    measured(3, sdpa=2.0, chunkwise=1.0)
    measured(8, sdpa=1.0, chunkwise=2.0)
    assert chain(8)[0] == "chunkwise"
    assert chain(256)[0] == "sdpa"
    assert chain(8, kernel=("eager", "sdpa")) == ("eager", "sdpa")


def test_what_runs_is_the_first_of_that_order(measured: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    measured(3, sdpa=2.0, chunkwise=1.0)
    ran: list[str] = []
    attempt = dispatch._attempt
    monkeypatch.setattr(dispatch, "_attempt", lambda kernel, *rest: ran.append(kernel.name) or attempt(kernel, *rest))
    inputs = qkv(8)
    expected = attention(*inputs.values(), kernel="eager")
    torch.testing.assert_close(attention(*inputs.values()), expected)
    site = AttentionSite(AttentionOptions(), Chain("layers.0.mixer", ("sdpa",)))
    site(*inputs.values())
    assert ran == ["eager", "chunkwise", "sdpa"]


def test_each_direction_begins_with_the_kernel_that_is_fastest_in_it(measured: Callable[..., Path]) -> None:
    measured(3, sdpa=(1.1, 2.0), chunkwise=(1.0, 3.0))
    options = AttentionOptions()
    assert dispatch.chain(OPERATOR, qkv(8), options) == ("chunkwise", "sdpa", "eager")
    assert dispatch.chain(OPERATOR, qkv(8), options, "backward") == ("sdpa", "chunkwise", "eager")
    for direction in ("forward", "backward"):
        assert dispatch.chain(OPERATOR, qkv(8), AttentionOptions(kernel=("chunkwise",)), direction) == ("chunkwise",)


def test_a_call_reads_no_file_and_finds_its_bucket_once(
    measured: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = measured(3, sdpa=2.0, chunkwise=1.0)
    assert chain(8)[0] == "chunkwise"
    path.unlink()
    monkeypatch.setattr(dispatch, "auto_order", lambda *_: pytest.fail("the order is known"))
    assert chain(8)[0] == "chunkwise"


def test_a_corrupt_table_says_where_it_is(measured: Callable[..., Path]) -> None:
    path = measured(3, sdpa=1.0)
    path.write_text("{")
    store._entries.cache_clear()
    with pytest.raises(UsageError, match=r"cpu\.json.*E605"):
        attention(*qkv(8).values())
    attention(*qkv(8).values(), kernel="sdpa")
