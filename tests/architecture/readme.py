"""The set-up commands as README.md gives them: the lines of the first bash block under "## Set up"."""

from __future__ import annotations

import sys
from pathlib import Path


def setup_commands(readme: str) -> list[str]:
    """The commands, one per line of the block; comments left out."""
    section = readme.split("## Set up\n", 1)[1]
    block = section.split("```bash\n", 1)[1].split("```", 1)[0]
    return [line.strip() for line in block.splitlines() if line.strip() and not line.strip().startswith("#")]


if __name__ == "__main__":
    print("\n".join(setup_commands(Path(sys.argv[1]).read_text(encoding="utf-8"))))
