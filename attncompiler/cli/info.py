"""`attncompiler info`: this machine, as the compiler sees it."""

from __future__ import annotations

from collections.abc import Mapping

from attncompiler.cli import output
from attncompiler.cli.options import AsFormat, Format

CORE = ("torch", "pydantic", "yaml", "safetensors", "typer", "rich", "hypothesis", "numpy")
EXTRAS = {"gpu": "triton", "fa4": "flash-attn-4", "hf": "transformers", "plot": "matplotlib"}
"""optional extra → the name of what it installs"""


def info(format: AsFormat = Format.text) -> None:
    """Show this machine: the device and what it can do, packages and their versions, optional extras."""
    from attncompiler import __version__
    from attncompiler.report.units import gib, si
    from attncompiler.targets.detect import detect_environment, detect_target

    environment, target = detect_environment(), detect_target()
    packages: Mapping[str, str] = environment.packages
    versions = {name: packages.get(name) for name in (*CORE, *EXTRAS.values())}
    if format == "json":
        output.as_json(
            {
                "attncompiler": __version__,
                "python": environment.python,
                "system": environment.system,
                "target": target.model_dump(mode="json"),
                "packages": versions,
                "extras": {extra: name in packages for extra, name in EXTRAS.items()},
            }
        )
        return
    rows = [
        ("attncompiler", __version__),
        ("python", f"{environment.python} on {environment.system}"),
        ("device", f"{target.title}, as target {target.name}"),
        ("memory", f"{gib(target.memory_bytes)}, {si(target.bandwidth)}B/s"),
        *((f"{dtype} matrices", f"{si(rate)}FLOP/s at best") for dtype, rate in target.matrix_flops.items()),
        *((name, versions[name] or "not installed") for name in CORE),
    ]
    for extra, name in EXTRAS.items():
        absent = f"not installed: pip install 'attncompiler[{extra}]'"
        rows.append((f"{name} ({extra})", versions[name] or absent))
    output.table(("", ""), rows)
