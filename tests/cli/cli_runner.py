"""Running verbs, in this process and in one of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from attncompiler.cli import app

ROOT = Path(__file__).parents[2]
SPEC = """
name: small
model:
  vocab_size: 31
  hidden_size: 16
  mlp: {kind: gated, intermediate_size: 24}
policies:
  near: {kind: attention, num_attention_heads: 2, pattern: {kind: sliding_window, window: 4}}
layers: [{policy: near, repeat: 2}]
targets: [h200, cpu]
"""


def run(*arguments: object) -> Any:
    """The result of a verb run in this process; an error without a code is raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def fresh(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The entry point in a process of its own."""
    command = [sys.executable, "-c", "from attncompiler.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)
