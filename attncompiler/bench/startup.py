"""How long commands take from nothing: `build --device meta` of a large spec, and `check`.

    python -m attncompiler.bench.startup --large specs/hybrid_13b.yaml --small specs/hybrid_tiny.yaml

Each runs in a process of its own, whose imports count.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from attncompiler.bench.measure import Samples
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


LAUNCHER = """
import resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def run(command: list[str]) -> tuple[float, int]:
    """Seconds and peak bytes of one command. Raises RuntimeError with its output when it fails.

    A small process launches it: on Linux a process's peak begins at what its parent held, and this one holds torch.
    """
    launched = subprocess.run(
        [sys.executable, "-I", "-S", "-c", LAUNCHER, *command], capture_output=True, text=True, check=False
    )
    if launched.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{launched.stderr}")
    seconds, peak = launched.stdout.split()
    return float(seconds), int(peak) * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    typer.run(main)
