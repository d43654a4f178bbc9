"""How long commands take from nothing: `build --device meta` of a large spec, and `check`.

    python -m attncompiler.bench.startup --large specs/hybrid_13b.yaml --small specs/hybrid_tiny.yaml

Each runs in a process of its own, whose imports count.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from attncompiler.bench.measure import Samples, maxrss_bytes
from attncompiler.bench.report import Format, FormatOption, mib, show

COMMAND = (sys.executable, "-c", "from attncompiler.cli import main; main()")


def main(
    large: Annotated[Path, typer.Option(help="the spec to build on meta")] = Path("specs/hybrid_13b.yaml"),
    small: Annotated[Path, typer.Option(help="the spec to check")] = Path("specs/hybrid_tiny.yaml"),
    repeats: Annotated[int, typer.Option(help="timed turns of each command")] = 5,
    format: FormatOption = Format.text,
) -> None:
    """Time whole commands, and the most memory each has held."""
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            f"build {large.name} --device meta": [
                "build",
                str(large),
                "--device",
                "meta",
                "--out",
                f"{folder}/built",
                "--force",
            ],
            f"check {large.name}": ["check", str(large)],
            f"check {small.name}": ["check", str(small)],
        }
        runs: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
        for _ in range(repeats):
            for name, arguments in commands.items():
                runs[name].append(run([*COMMAND, *arguments]))
    rows = [
        {
            "command": name,
            "seconds": Samples(tuple(seconds for seconds, _ in taken)),
            "peak MiB": mib(max(peak for _, peak in taken)),
        }
        for name, taken in runs.items()
    ]
    show("Whole commands, each in a fresh process", rows, format)


def run(command: list[str]) -> tuple[float, int]:
    """Seconds and peak bytes of one command. Raises RuntimeError with its output when it fails."""
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{output.read().decode(errors='replace')}")
    return seconds, maxrss_bytes(usage.ru_maxrss)


if __name__ == "__main__":
    typer.run(main)
