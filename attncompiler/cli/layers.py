"""The tables of layers and of refused kernels, of what `plan.explain` gives."""

from __future__ import annotations

from typing import Any

from attncompiler.cli import output
from attncompiler.planning.explanation import kernels_text
from attncompiler.report.units import gib, seconds, si


def layers(explained: dict[str, Any], *, costs: bool) -> None:
    """A line for each kind of layer, with what it costs where that is asked for."""
    columns = ["layers", "policy", "mechanism", "mlp", "kernels, best first", "parameters"]
    right = ["parameters"]
    if costs:
        right += ["forward", "backward", "activations"]
    else:
        columns.insert(5, "refused")
        right.append("refused")
    rows = []
    for layer in explained["layers"]:
        row = [
            layer["indices"],
            layer["policy"],
            _mechanism(layer),
            layer["mlp"],
            kernels_text(layer),
            f"{layer['parameters']:,}",
        ]
        if costs:
            row += [
                seconds(layer["forward_seconds"]),
                seconds(layer["backward_seconds"]),
                gib(layer["activation_bytes"]),
            ]
        else:
            row.insert(5, str(len(layer["refusals"])))
        rows.append(row)
    output.table(columns + right[1:] if costs else columns, rows, right=right)


def _mechanism(layer: dict[str, Any]) -> str:
    """Its name, and what its tokens see of each other where that is not everything."""
    if layer["pattern"] is None:
        return layer["mechanism"]
    return f"{layer['mechanism']}: {layer['pattern']}, {100 * layer['density']:.3g}%"


def refusals(explained: dict[str, Any]) -> None:
    """A line for each kernel that was refused and why, once for all policies that it was refused for."""
    found: dict[tuple[str, str], list[str]] = {}
    for layer in explained["layers"]:
        for refused in layer["refusals"]:
            reasons = "; ".join(reason["reason"] for reason in refused["reasons"])
            found.setdefault((refused["kernel"], reasons), []).append(layer["policy"])
    if found:
        output.line()
        rows = [(kernel, ", ".join(dict.fromkeys(policies)), reasons) for (kernel, reasons), policies in found.items()]
        output.table(("refused", "for", "because"), rows)


def measured(explained: dict[str, Any]) -> None:
    """A line for each order of kernels that was measured: for which policies, on what device, and when."""
    found: dict[str, list[str]] = {}
    for layer in explained["layers"]:
        if (by := layer["measured"]) is not None:
            found.setdefault(f"{by['device']}, {by['date']}: {by['bucket']}", []).append(layer["policy"])
    if found:
        output.line()
        rows = [(", ".join(dict.fromkeys(policies)), what) for what, policies in found.items()]
        output.table(("order of", "measured on"), rows)


def totals(explained: dict[str, Any]) -> None:
    """What the whole model costs, and whether training fits."""
    model, fit = explained["model"], explained["fit"]
    output.line(
        f"{model['parameters']:,} parameters; a training step {si(model['training_flops'])}FLOP, "
        f"{seconds(model['step_seconds'])} at best, {model['tokens_per_second']:,.0f} tokens/s; "
        f"decode state {gib(model['state_bytes']) if model['state_bytes'] else 'none'}"
    )
    output.line()
    rows = [("training", fit["plain"]["verdict"]), ("with checkpointing", fit["checkpointed"]["verdict"])]
    output.table(("", ""), rows)
