"""`attncompiler fuzz`: specs drawn, built and held to the laws."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attncompiler.cli import output
from attncompiler.cli.options import AsFormat, Device, Format

if TYPE_CHECKING:
    from attncompiler.testing.fuzz import Report
    from attncompiler.testing.model_laws import Broken

FOLDER = Path("fuzz-failures")


def fuzz(
    base: Annotated[
        Path | None,
        typer.Option(metavar="SPEC", help="stay near to it; default: the whole grammar", show_default=False),
    ] = None,
    examples: Annotated[
        int | None, typer.Option(min=1, help="how many; default: 100, or no limit with --seconds")
    ] = None,
    seconds: Annotated[float | None, typer.Option(min=0, help="when to stop drawing; default: never")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="of the draws; default: one by chance, which is shown")
    ] = None,
    device: Device = None,
    replay: Annotated[
        Path | None, typer.Option(metavar="FILE", help=f"run a failure from {FOLDER}/ again", show_default=False)
    ] = None,
    format: AsFormat = Format.text,
) -> None:
    """Fuzz the compiler: draw tiny specs, build each, and hold it to the laws; write down what breaks one."""
    from attncompiler import pipeline
    from attncompiler.targets.detect import detect_target
    from attncompiler.testing import fuzz as fuzzer

    if replay is not None:
        if base is not None or examples is not None or seconds is not None or seed is not None:
            raise typer.BadParameter("it runs one failure: leave out what is about drawing", param_hint="--replay")
        _replayed(replay, fuzzer.replay(replay, device=device), format)
        return
    near = None if base is None else pipeline.check(base)
    chosen = random.randrange(2**32) if seed is None else seed
    with output.progress(f"fuzzing with seed {chosen}") as stage:
        report = fuzzer.fuzz(
            near,
            examples=examples,
            seconds=seconds,
            seed=chosen,
            device=device or detect_target().device_type,
            folder=FOLDER,
            progress=stage,
        )
    if format == "json":
        output.as_json(_data(report))
    else:
        _print(report)
    if report.failure is not None:
        raise typer.Exit(1)


def _replayed(path: Path, broken: Broken | None, format: Format) -> None:
    if format == "json":
        output.as_json({"ok": broken is None, "broken": None if broken is None else vars(broken)})
    else:
        output.line(f"{path}: {broken}" if broken is not None else f"{path}: holds now")
    if broken is not None:
        raise typer.Exit(1)


def _data(report: Report) -> dict[str, object]:
    failure = report.failure
    return {
        "ok": failure is None,
        "seed": report.seed,
        "device": report.device,
        "examples": report.examples,
        "calls": report.calls,
        "refused": report.refused,
        "mechanisms": dict(report.mechanisms),
        "seconds": report.seconds,
        "failure": None
        if failure is None
        else {
            "law": failure.broken.law,
            "place": failure.broken.place,
            "detail": failure.broken.detail,
            "spec": failure.text,
            "inputs": failure.inputs.plain(),
            "path": str(report.path),
            "replay": report.replay,
        },
    }


def _print(report: Report) -> None:
    kinds = ", ".join(f"{name} {count}" for name, count in sorted(report.mechanisms.items()))
    output.line(
        f"{report.examples} examples with seed {report.seed} on {report.device} in {report.seconds:.0f} s ({kinds}); "
        f"{report.calls} calls of kernels judged, {report.refused} batches refused in words"
    )
    if report.failure is None:
        output.line("every law holds")
        return
    output.line()
    output.line(str(report.failure.broken))
    output.line()
    for text in report.failure.text.splitlines():
        output.line(f"    {text}")
    output.line()
    output.line(f"written to {report.path}; run it again with")
    output.line(f"    {report.replay}")
