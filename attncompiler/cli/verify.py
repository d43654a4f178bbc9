"""`attncompiler verify`: a spec's kernels, proven on this machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from attncompiler.cli import output
from attncompiler.cli.options import AsFormat, Device, Format, Overrides, SpecFile

if TYPE_CHECKING:
    from attncompiler.testing.verify import Row, Verification


def verify(
    spec: SpecFile,
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="its chains, as far as they run here; default: this machine's"),
    ] = None,
    device: Device = None,
    set_: Overrides = None,
    format: AsFormat = Format.text,
) -> None:
    """Verify a spec's kernels against the fp64 reference, outputs and gradients, on its own shapes."""
    from attncompiler.testing.verify import verify as run

    with output.progress(f"reading {spec}") as stage:
        found = run(spec, target=tuple(target or ()), device=device, overrides=set_ or (), progress=stage)
    if format == "json":
        output.as_json({"ok": found.ok, **asdict(found)})
    else:
        _print(found)
    if not found.ok:
        raise typer.Exit(1)


def _print(found: Verification) -> None:
    lengths = sorted({row.length for row in found.rows})
    tokens = " or ".join(f"{length:,}" for length in lengths)
    output.line(
        f"{found.spec} on {found.device}, {found.dtype}: batches of {found.batch} × {tokens} of "
        f"{found.full_length:,} tokens, the most that the fp64 reference takes of what is planned for"
    )
    output.line()
    columns = ["layers", "policy", "target", "kernel", "tensor", "call", "error", "budget", "verdict"]
    output.table(columns, [_cells(row) for row in found.rows if row.ok is not None], right=["error", "budget"])
    idle = [row for row in found.rows if row.reason is not None]
    if idle:
        output.line()
        rows = {(row.target, row.policy, row.kernel, row.call or "all", row.reason or ""): None for row in idle}
        output.table(("target", "policy", "not run", "calls", "because"), list(rows))
    output.line()
    over = sum(row.ok is False for row in found.rows)
    count = sum(row.ok is not None for row in found.rows)
    unproven = {row.policy for row in found.rows} - {row.policy for row in found.rows if row.ok is not None}
    if unproven:
        output.line(f"no kernel of {', '.join(sorted(unproven))} runs here")
    output.line(f"{over} of {count} tensors over the budget" if over else f"all {count} tensors within the budget")


def _cells(row: Row) -> list[str]:
    """The largest error, or the root mean square where that alone is over its budget."""
    assert row.max_error is not None
    assert row.max_budget is not None
    error, budget, note = row.max_error, row.max_budget, ""
    if row.ok is False and error <= budget:
        assert row.rms_error is not None
        assert row.rms_budget is not None
        error, budget, note = row.rms_error, row.rms_budget, " (rms)"
    verdict = f"OVER{note}" if row.ok is False else "fine"
    tensor, call = row.tensor or "", row.call or ""
    return [row.layers, row.policy, row.target, row.kernel, tensor, call, f"{error:.1e}", f"{budget:.1e}", verdict]
