"""`attncompiler bench`: kernels of this machine, timed beside one another and beside their peers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attncompiler.cli import output
from attncompiler.cli.failures import Verb
from attncompiler.cli.options import AsFormat, Device, Format

if TYPE_CHECKING:
    from attncompiler.bench.grid.bench import Bench
    from attncompiler.bench.grid.cells import Measured
    from attncompiler.bench.grid.report import Table
    from attncompiler.bench.grid.rows import Row
    from attncompiler.measured import Run
    from attncompiler.targets.target import Target

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


class DType(StrEnum):
    """Dtypes that are measured."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.callback()
def bench() -> None:
    """Time a mechanism's kernels on this machine, and its peers'; keep what they took, for plans to follow."""


Rows = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="a group of rows, or a row, or either with wildcards; default: all"),
]
Only = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="a kernel or a peer: time no others, but for the planned kernel"),
]
DTypeOption = Annotated[DType | None, typer.Option(help="default: bfloat16 on a GPU, float32 on a CPU")]
Repeats = Annotated[int, typer.Option(min=1, max=10**6, help="turns of each kernel, at most")]


@app.command("attention", cls=Verb)
def attention(
    rows: Rows = None,
    peers: Annotated[bool, typer.Option("--peers", help="also time torch's, cuDNN's and flash-attn's kernels")] = False,
    only: Only = None,
    save: Annotated[bool, typer.Option("--save", help="put the times into this device's measured table")] = False,
    tables: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="where --save keeps tables; default: your own, which plans follow"),
    ] = None,
    device: Device = None,
    dtype: DTypeOption = None,
    repeats: Repeats = 60,
    format: AsFormat = Format.text,
) -> None:
    """Time every kernel of attention's chain, the planned one and its peers, row by row, in turns."""
    from attncompiler import measured
    from attncompiler.bench.attention import keep
    from attncompiler.bench.attention.bench import BENCH
    from attncompiler.errors import UsageError, fail

    if tables is not None and not save:
        raise fail(UsageError, "E602", "--tables says where --save keeps what was measured: give both")
    if only and save:
        raise fail(UsageError, "E602", "--save keeps what all kernels took in turns, and --only leaves some out")

    def saved(result: Measured, facts: Run, named: str, target: str) -> Path:
        return measured.save(keep.entries([result], facts, named), target, tables)

    _run(BENCH, rows, peers, only, device, dtype, repeats, format, saved if save else None)


@app.command("linear", cls=Verb)
def linear(
    rows: Rows = None,
    peers: Annotated[bool, typer.Option("--peers", help="also time fla's kernels, or on a CPU the plain form")] = False,
    only: Only = None,
    device: Device = None,
    dtype: DTypeOption = None,
    repeats: Repeats = 60,
    format: AsFormat = Format.text,
) -> None:
    """Time every kernel of linear attention's chain, the planned one and its peers, row by row, in turns."""
    from attncompiler.bench.linear.bench import BENCH

    _run(BENCH, rows, peers, only, device, dtype, repeats, format)


@app.command("mamba", cls=Verb)
def mamba(
    rows: Rows = None,
    peers: Annotated[
        bool, typer.Option("--peers", help="also time mamba-ssm's kernels, on a GPU, and HF's mixers")
    ] = False,
    only: Only = None,
    device: Device = None,
    dtype: DTypeOption = None,
    repeats: Repeats = 60,
    format: AsFormat = Format.text,
) -> None:
    """Time every kernel of Mamba's and Mamba-2's chains, the planned ones and their peers, row by row, in turns."""
    from attncompiler.bench.mamba.bench import BENCH

    _run(BENCH, rows, peers, only, device, dtype, repeats, format)


def _run(
    bench: Bench,
    rows: Sequence[str] | None,
    peers: bool,
    only: Sequence[str] | None,
    device: str | None,
    dtype: DType | None,
    repeats: int,
    format: Format,
    keep: Callable[[Measured, Run, str, str], Path] | None = None,
) -> None:
    """Measure and print; `keep` (result, run, dtype, target) puts a row's times into a table and gives its path."""
    import torch

    from attncompiler.bench.device import Clock
    from attncompiler.bench.grid import report, run
    from attncompiler.bench.grid.rows import select
    from attncompiler.errors import KernelError, fail

    target = _target(device)
    kind = target.device_type
    chosen = select(bench.rows(kind), rows or ())
    named = dtype.value if dtype is not None else run.DTYPES[kind]
    clock, facts = Clock(device or kind), run.run_facts(target, bench.packages)
    copy_rate = clock.copy_rate() if any(row.beside_copy for row in chosen) else None
    if format == "text":
        versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
        output.line(f"{facts.device} ({target.name}), {named}, {facts.date}; {versions}")
    taken: list[Measured] = []
    saved: Path | None = None
    with output.progress("measuring") as stage:
        found = run.results(
            bench, chosen, clock, getattr(torch, named), repeats, against_peers=peers, only=only or None
        )
        for group, results in groupby(_staged(found, chosen, stage), key=lambda result: result.row.group):
            held: list[Measured] = []
            for result in results:
                held.append(result)
                taken.append(result)
                if keep is not None:
                    saved = keep(result, facts, named, target.name)
            if format == "text":
                _print(report.tables(bench, group, held, copy_rate))
    compared = tuple(bench.compared(taken))
    if format == "json":
        about = {"target": target.name, **facts.model_dump(), "dtype": named, "repeats": repeats}
        rates = {"copy_bytes_per_second": copy_rate}
        data = [report.as_data(bench, result) for result in taken]
        more = {"comparisons": [report.comparison_data(each) for each in compared]} if compared else {}
        output.as_json({**about, **rates, "rows": data, **more, "saved": saved and str(saved)})
    else:
        _summary(taken, report.lines(compared), saved)
    lost = next((result.lost for result in taken if result.lost), None)
    if lost is not None:
        raise fail(KernelError, "E504", f"{taken[-1].row.id}: {lost}", remedy="name the rows after it with --rows")
    if len(taken) < len(chosen):
        raise KeyboardInterrupt  # what was measured until then is printed; the command ends as interrupted ones do


def _target(device: str | None) -> Target:
    """The device to measure on, made torch's current one. Raises SpecError (E107) where it is not there."""
    import torch

    from attncompiler.targets import unknown
    from attncompiler.targets.detect import detect_target

    kind, _, index = (device or "").partition(":")
    found = detect_target(kind or None)
    if not index:
        return found
    if int(index) >= torch.cuda.device_count():
        raise unknown(f"torch sees no device {device!r} on this machine")
    torch.cuda.set_device(int(index))
    return detect_target(kind)


def _staged(found: Iterable[Measured], chosen: Sequence[Row], stage: Callable[[str], None]) -> Iterator[Measured]:
    """The results, with the row that is under way named before it is; those there are where it is interrupted."""
    results = iter(found)
    for number, row in enumerate(chosen, 1):
        stage(f"{row.id}, {number} of {len(chosen)}")
        try:
            result = next(results, None)
        except KeyboardInterrupt:
            return
        if result is None:
            return
        yield result


def _print(tables: Iterable[Table]) -> None:
    for table in tables:
        output.line()
        if table.title:
            output.line(table.title)
            output.line()
        output.table(table.columns, table.rows, right=table.right)


def _summary(taken: Sequence[Measured], compared: Iterable[str], saved: Path | None) -> None:
    """How rows compare, which are planned for less than the best member's speed, and where the times were kept."""
    from attncompiler.bench.grid import report

    output.line()
    for line in compared:
        output.line(line)
    short = [f"{result.row.id} ({', '.join(report.short_of(result))})" for result in taken if report.short_of(result)]
    if short:
        output.line(f"! planned for less than {report.NEAR:.0%} of the best member's speed: {'; '.join(short)}")
    else:
        output.line(f"every planned kernel has at least {report.NEAR:.0%} of the best member's speed")
    if saved is not None:
        output.line(f"saved to {saved}, which is read when a process first plans")
