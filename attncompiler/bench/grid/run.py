"""The rows one after the other, on one device."""

from __future__ import annotations

import datetime
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata

import torch

from attncompiler.bench.device import Clock
from attncompiler.bench.grid.bench import Bench
from attncompiler.bench.grid.cells import Measured
from attncompiler.bench.grid.measure import measure
from attncompiler.bench.grid.rows import Row
from attncompiler.errors import UsageError, fail
from attncompiler.measured import Run
from attncompiler.targets.target import Target

DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
"""what is measured where nobody says"""


def results(
    bench: Bench,
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
    everyone = [each.name for row in chosen for each in bench.members(device_type, row) + bench.peers(device_type)]
    for name in only or ():
        if name not in everyone:
            known = ", ".join(dict.fromkeys(everyone))
            raise fail(UsageError, "E602", f"no kernel or peer is named {name!r}", remedy=f"there are {known}")
    for row in chosen:
        taking = bench.members(device_type, row)
        if against_peers or only is not None:
            taking += bench.peers(device_type)
        result = measure(bench, row, taking, clock, dtype, repeats, only)
        yield result
        if result.lost:
            return
        if device_type == "cuda":
            torch.compiler.reset()  # what was compiled for one row serves no other
        clock.free()


def run_facts(target: Target, packages: Mapping[str, str]) -> Run:
    """The device, the date, and the versions that times depend on: of torch, and on a GPU of `packages`."""
    versions: dict[str, str] = {"torch": str(torch.__version__)}
    if target.device_type == "cuda":
        cudnn = torch.backends.cudnn.version()
        versions |= {"cuda": str(torch.version.cuda), "cudnn": str(cudnn)}
        for module, distribution in packages.items():
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
