"""The built-in kernels compile for every architecture they are meant for, within what it has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from attncompiler.blocks.launching import launcher
from attncompiler.blocks.launching.launcher import Launcher

SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""compute capability → bytes that a block may have (CUDA Programming Guide, December 2025, table 31)"""
FAST = 80
MOST_STACK = 512
"""Bytes of a thread's numbers that may lie outside its registers."""


@pytest.mark.parametrize(
    "capability",
    [pytest.param(each, marks=[] if each == FAST else [pytest.mark.slow]) for each in SHARED_MEMORY],
)
@pytest.mark.parametrize("compiles", ["attention", "linear_attention", "mamba", "mamba2", "streaming"])
def test_kernels_fit_an_architecture_that_is_not_here(capability: int, compiles: str) -> None:
    """Shared memory within the limit, next to nothing spilled, fp32 multiplied as fp32, and no address from a register
    that nothing has set."""
    for row in compiled(capability, compiles, *(["few"] if capability == FAST else [])):
        assert row["shared"] <= SHARED_MEMORY[capability], row
        # fp32 heads of 256 have sums that no tile of 16 rows leaves room for
        assert row["stack"] <= MOST_STACK or (row["dtype"] == "float32" and row["width"] > 128), row
        assert not (row["dtype"] == "float32" and row["tf32"]), row
        assert not row["unset"], row


@pytest.mark.slow
def test_hopper_runs_its_own_kernels() -> None:
    """Heads of 64 and 128 in 16 bits, by index, by lists and by segments, capped and deterministic; others run the
    kernels for every architecture."""
    rows = [row for row in compiled(90, "attention") if row["dtype"] == "bfloat16" and row["tokens"] > 1]
    patterns = ("causal", "strided", "local_global", "random")
    known = {(width, pattern) for width in (64, 128) for pattern in patterns} | {(128, "sliding_window")}
    known |= {(width, "causal", asked) for width in (64, 128) for asked in ("softcap", "deterministic")}
    known |= {(width, "sliding_window", "softcap", "deterministic") for width in (64, 128)}
    known |= {(width, pattern, "segment_ids") for width in (64, 128) for pattern in ("causal", "sliding_window")}
    assert ways(rows, "_attention") == ways(rows, "_backward") == known
    assert all(row["wgmma"] for row in rows if row["kernel"] in ("_attention", "_backward"))


def ways(rows: list[dict[str, Any]], kernel: str) -> set[tuple[Any, ...]]:
    """The widths, patterns and options for which a kernel was compiled."""
    return {
        (row["width"], row["pattern"], *row["options"], *(name for name in ("softcap", "deterministic") if row[name]))
        for row in rows
        if row["kernel"] == kernel
    }


def test_a_known_launch_runs_what_the_first_of_its_name_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    class Kernel:
        """As Triton has it: a launch returns what was compiled, which is launched likewise."""

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*arguments: object, num_warps: int, num_stages: int) -> Any:
                ran.append(("kernel", grid, arguments))
                return Later() if arguments == (0,) else Compiled()

            return launch

    class Compiled:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments: ran.append(("compiled", grid, arguments))

    class Later:
        """What a launch returns that only asks for a compilation."""

    monkeypatch.setattr(launcher, "CompiledKernel", Compiled)
    launch = Launcher(Kernel())
    for known, argument in (("a", 0), ("a", 1), ("a", 2), ("b", 3), (None, 4), ("b", 5)):
        launch((7, argument), known, argument)
    asked = [("kernel", 0), ("kernel", 1), ("compiled", 2), ("kernel", 3), ("kernel", 4), ("compiled", 5)]
    assert [(who, grid[1], *arguments) for who, grid, arguments in ran] == [(who, n, n) for who, n in asked]
    assert all(grid == (7, n, 1) for who, grid, (n,) in ran if who == "compiled")


@pytest.mark.parametrize(
    ("drawn", "calls", "ways"), [("attention", 4000, 200), ("recurrence", 1500, 200), ("streaming", 1500, 100)]
)
def test_a_launch_is_known_by_all_that_it_is_compiled_for(drawn: str, calls: int, ways: int) -> None:
    """`Launcher` runs what an earlier launch of the same name compiled: Triton would have compiled the same."""
    found = in_a_process("relaunched.py", drawn, calls)
    assert found["launches"] > 1.5 * found["names"]  # the same names come again, with other tensors
    assert found["ways"] > ways
    assert not found["in more than one way"]


def compiled(capability: int, mechanism: str, *how: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = in_a_process("compiled.py", capability, SHARED_MEMORY[capability], mechanism, *how)
    return rows


def in_a_process(script: str, *arguments: int | str) -> Any:
    """What a script beside this one says, in a process that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
