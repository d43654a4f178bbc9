"""Draw the loss curves of runs of train_lm.py: held-out loss in nats per byte against minutes of training.

    python examples/plot_loss.py runs/hybrid-tiny runs/llama-tiny --out examples/loss_curve.png

Needs matplotlib: pip install 'attncompiler[plot]'.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def main(
    runs: Annotated[list[Path], typer.Argument(help="folders of runs, or their loss.json")],
    out: Annotated[Path, typer.Option(help="the picture to write: .png, .svg or .pdf")] = Path("loss_curve.png"),
) -> None:
    """Draw the loss curves of runs."""
    logs = [json.loads((run / "loss.json" if run.is_dir() else run).read_text()) for run in runs]
    if unfinished := [log["name"] for log in logs if "final" not in log]:
        raise typer.BadParameter(f"not finished yet: {', '.join(unfinished)}")
    if len({log["corpus"]["sha256"] for log in logs}) > 1:
        raise typer.BadParameter("the runs were trained on different texts: their losses do not compare")
    draw(logs, out)
    for log in logs:
        minutes = log["held_out"][-1]["seconds"] / 60
        typer.echo(f"{log['name']}: {log['final']['loss']:.3f} nats per byte after {minutes:.1f} minutes")
    typer.echo(str(out))


def draw(logs: list[dict[str, Any]], out: Path) -> None:
    """One line a run, the losses of its training steps faint behind it, and the bigram table's loss as a level.

    The numbers beside the names are of all held-out bytes; the lines follow some of them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, log in enumerate(logs):
        color = f"C{index}"
        held_out = [(point["seconds"] / 60, point["loss"]) for point in log["held_out"]]
        train = [(point["seconds"] / 60, point["loss"]) for point in log["train"]]
        axes.plot(*zip(*train, strict=True), color=color, alpha=0.25, linewidth=0.6)
        label = f"{log['name']} ({log['parameters'] / 1e6:.1f} M parameters): {log['final']['loss']:.2f}"
        axes.plot(*zip(*held_out, strict=True), color=color, marker="o", markersize=3, label=label)
    bigram = logs[0]["corpus"]["bigram_loss"]
    axes.axhline(bigram, color="gray", linestyle="--", linewidth=0.8, label=f"a bigram table: {bigram:.2f}")
    lowest = min(point["loss"] for log in logs for point in log["held_out"])
    axes.set(xlabel="minutes", ylabel="held-out loss, nats per byte", ylim=(lowest - 0.2, bigram + 1.2))
    axes.grid(alpha=0.2)
    axes.legend(frameon=False)
    figure.savefig(out)


if __name__ == "__main__":
    typer.run(main)
