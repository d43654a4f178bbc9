"""`attncompiler explain`: what runs where, what was refused and why, and what it costs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from attncompiler.cli import output
from attncompiler.cli.options import AsFormat, Format, Overrides, SpecFile


def explain(
    spec: SpecFile,
    target: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="a target; every listed one if absent")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=2**40, help="sequences in a batch")] = 1,
    seq_len: Annotated[
        int | None,
        typer.Option(min=1, max=2**40, help="tokens in a sequence; default: 2048, or what the model is meant for"),
    ] = None,
    set_: Overrides = None,
    format: AsFormat = Format.text,
) -> None:
    """Explain a spec on its targets: each layer's kernels, refusals and cost, and whether training fits."""
    from attncompiler import pipeline
    from attncompiler.cli import layers

    read = pipeline.read(spec, set_ or ())
    explained: dict[str, dict[str, Any]] = {}
    for name in target or (None,):
        explained |= pipeline.explain(read, target=name, batch=batch, seq_len=seq_len)
    if format == "json":
        output.as_json(explained)
        return
    for number, each in enumerate(explained.values()):
        if number:
            output.line()
        size = f"{each['batch']} × {each['seq_len']} tokens"
        output.line(f"{each['spec']} on {each['target']} ({each['title']}), {each['dtype']}, {size}")
        output.line()
        layers.layers(each, costs=True)
        output.line()
        layers.totals(each)
        layers.measured(each)
        layers.refusals(each)
