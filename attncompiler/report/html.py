"""An explained plan as one self-contained HTML page, without scripts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from attncompiler.planning.explanation import kernels_text
from attncompiler.report.units import gib, seconds, si

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: .5em 0 1.5em } th, td { text-align: left; padding: .25em .9em .25em 0 }
th { border-bottom: 1px solid #999 } td { border-bottom: 1px solid #eee; vertical-align: top }
"""


def page(explained: Sequence[dict[str, Any]]) -> str:
    """The page for what `plan.explain` gave: the plan emitted for first, then those of the listed targets."""
    emitted = explained[0]
    title = escape(emitted["spec"])
    facts = (
        f"{emitted['model']['parameters']:,} parameters, {emitted['dtype']}; "
        f"emitted for {emitted['target']} ({emitted['title']})"
    )
    sections = "\n".join(_target(each, is_emitted=each is emitted) for each in explained)
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n<style>{STYLE}</style>\n'
        f"<h1>{title}</h1>\n<p>{escape(facts)}</p>\n{sections}\n</html>\n"
    )


def _target(explained: dict[str, Any], *, is_emitted: bool) -> str:
    layers = explained["layers"]
    heading = f"{explained['target']}: {explained['title']}" + (" (emitted)" if is_emitted else "")
    columns = ("layers", "policy", "mechanism", "mlp", "kernels, best first", "parameters", "forward", "backward")
    rows = [
        (
            layer["indices"],
            layer["policy"],
            layer["mechanism"],
            layer["mlp"],
            kernels_text(layer, " → "),
            f"{layer['parameters']:,}",
            f"{si(layer['forward_flops'])}FLOP, {seconds(layer['forward_seconds'])}",
            f"{si(layer['backward_flops'])}FLOP, {seconds(layer['backward_seconds'])}",
        )
        for layer in layers
    ]
    refusals = [
        (layer["policy"], refused["kernel"], reason["source"], reason["reason"])
        for layer in layers
        for refused in layer["refusals"]
        for reason in refused["reasons"]
    ]
    measured = [
        (layer["policy"], by["device"], by["date"], by["bucket"])
        for layer in layers
        if (by := layer["measured"]) is not None
    ]
    fit = [
        (name, gib(each["parameter_bytes"]), gib(each["activation_bytes"]), gib(each["peak_bytes"]), each["verdict"])
        for name, each in explained["fit"].items()
        if isinstance(each, dict)
    ]
    size = f"A batch of {explained['batch']} × {explained['seq_len']} tokens; per layer, predicted."
    return "\n".join(
        (
            f"<h2>{escape(heading)}</h2>\n<p>{escape(size)}</p>",
            _table(columns, rows),
            "<h3>Training memory</h3>",
            _table(("training", "parameters", "activations", "peak", "verdict"), fit),
            "<h3>Measured orders</h3>" if measured else "",
            _table(("policy", "device", "date", "calls"), dict.fromkeys(measured)) if measured else "",
            "<h3>Refused kernels</h3>" if refusals else "",
            _table(("policy", "kernel", "because of", "reason"), dict.fromkeys(refusals)) if refusals else "",
        )
    )


def _table(columns: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>\n<tr>{head}</tr>\n{body}\n</table>"
