"""`attncompiler build`: a spec → a model in a folder."""

from __future__ import annotations

import json
import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attncompiler.cli import output
from attncompiler.cli.options import AsFormat, Format, Overrides, SpecFile

if TYPE_CHECKING:
    from attncompiler.emit import CompiledModel


class DType(StrEnum):
    """Dtypes of parameters."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


def _device(value: str | None) -> str | None:
    if value is not None and not re.fullmatch(r"cpu|meta|cuda(:\d+)?", value):
        raise typer.BadParameter(f"{value!r} is not cpu, cuda, cuda:N or meta")
    return value


def build(
    spec: SpecFile,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="default: build/<name of the spec>")] = None,
    target: Annotated[str | None, typer.Option(metavar="NAME", help="emit for it; default: this machine")] = None,
    device: Annotated[
        str | None,
        typer.Option(callback=_device, metavar="cpu|cuda|meta", help="where the weights are made; meta: nowhere yet"),
    ] = None,
    dtype: Annotated[DType | None, typer.Option(help="of the parameters; default: the spec's")] = None,
    set_: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="replace trained weights too")] = False,
    format: AsFormat = Format.text,
) -> None:
    """Build a model: check the spec, plan it for its targets, emit it for this machine, and write the folder."""
    from attncompiler import pipeline

    with output.progress(f"checking {spec}") as stage:
        checked = pipeline.check(spec, overrides=set_ or ())
        stage(f"building {checked.name}")
        made = pipeline.build(checked, device=device, dtype=_torch_dtype(dtype), target=target, elsewhere=True)
        path = out or Path("build") / checked.name
        stage(f"writing {path}")
        pipeline.save(made, path, force=force)
    summary = _summary(made, path)
    if format == "json":
        output.as_json(summary)
    else:
        _print(summary, device, unasked=device is None and target is None)


def _torch_dtype(dtype: DType | None) -> Any:
    import torch

    return None if dtype is None else getattr(torch, dtype)


def _summary(model: CompiledModel, path: Path) -> dict[str, Any]:
    from attncompiler.planning.explanation import explain

    plan, spec = model.plan, model.spec
    assert plan is not None
    assert spec is not None
    return {
        "path": str(path),
        "listed": [str(target) for target in spec.targets],
        "input": spec.model.input,
        "head": spec.model.head.kind,
        "device": str(model.device),
        "device_type": plan.target.device_type,
        **explain(spec, plan),
    }


def _print(summary: dict[str, Any], device: str | None, *, unasked: bool) -> None:
    from attncompiler import targets
    from attncompiler.cli import layers

    count = sum(layer["count"] for layer in summary["layers"])
    parameters = summary["model"]["parameters"]
    output.line(f"{summary['spec']}: {count} layers, {parameters:,} parameters, {summary['dtype']}")
    output.line()
    layers.layers(summary, costs=False)
    layers.measured(summary)
    output.line()
    others = [name for name in summary["listed"] if name != summary["target"]]
    output.line(f"planned for {', '.join(summary['listed'])}; emitted for {summary['target']} ({summary['title']})")
    known = set(targets.names())
    if (
        unasked
        and summary["device"] != "meta"
        and any(name in known and targets.get(name).device_type != summary["device_type"] for name in others)
    ):
        output.line(f"no other device is at hand: this model was emitted for the {summary['device_type']}")
    if summary["device"] == "meta" and device != "meta":
        output.line("this machine cannot serve it: plans and spec were written, without weights, to be loaded there")
    output.line(f"written to {summary['path']}; load it with")
    output.line()
    output.line("    import attncompiler")
    output.line(f"    model = attncompiler.load({json.dumps(summary['path'])})")
    output.line(f"    {use(summary['input'], summary['head'])}")


def use(inputs: str, head: str) -> str:
    """The line of Python that trains, or runs, a model of that input and head."""
    argument = "input_ids" if inputs == "tokens" else "inputs_embeds"
    return f"hidden = model({argument})" if head == "none" else f"loss = model.loss({argument}, labels)"
