"""The rows one after the other, on one device."""

from __future__ import annotations

import datetime
import importlib.util
from collections.abc import Iterator, Sequence
from importlib import metadata

import torch

from attncompiler.bench.attention.contestants import members
from attncompiler.bench.attention.grid import Measured, measure
from attncompiler.bench.attention.peers import peers
from attncompiler.bench.attention.rows import CPU, CUDA, Row
from attncompiler.bench.device import Clock
from attncompiler.errors import UsageError, fail
from attncompiler.measured import Run
from attncompiler.targets.target import Target

DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
"""what is measured where nobody says"""


def rows(device_type: str) -> tuple[Row, ...]:
    """What is measured on a kind of device."""
    return CUDA if device_type == "cuda" else CPU


def results(
    chosen: Sequence[Row],
    clock: Clock,
    dtype: torch.dtype,
    repeats: int,
    *,
    against_peers: bool,
    only: Sequence[str] | None = None,
) -> Iterator[Measured]:
    """Each row, measured; the last one that there is where the device is lost.

    With `only`, the kernels and peers of these names, and the planned kernel. Raises UsageError (E602) on a name that
    is no kernel's and no peer's.
    """
    device_type = clock.device.type
    everyone = [each.name for row in chosen for each in members(device_type, row.pattern["kind"]) + peers(device_type)]
    for name in only or ():
        if name not in everyone:
            known = ", ".join(dict.fromkeys(everyone))
            raise fail(UsageError, "E602", f"no kernel or peer is named {name!r}", remedy=f"there are {known}")
    for row in chosen:
        taking = members(device_type, row.pattern["kind"])
        if against_peers or only is not None:
            taking += peers(device_type)
        result = measure(row, taking, clock, dtype, repeats, only)
        yield result
        if result.lost:
            return
        if device_type == "cuda":
            torch.compiler.reset()  # what was compiled for one row serves no other
        clock.free()


def run_facts(target: Target) -> Run:
    """The device, today's date, and the versions that times depend on."""
    versions: dict[str, str] = {"torch": str(torch.__version__)}
    if target.device_type == "cuda":
        cudnn = torch.backends.cudnn.version()
        versions |= {"cuda": str(torch.version.cuda), "cudnn": str(cudnn)}
        names = {"triton": "triton", "flash_attn": "flash-attn-4"}
        for module, distribution in names.items():
            if importlib.util.find_spec(module) is not None:
                versions[distribution] = _version(distribution)
    else:
        versions["threads"] = str(torch.get_num_threads())
    return Run(device=target.title, date=datetime.date.today().isoformat(), versions=versions)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"
