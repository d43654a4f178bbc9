"""How long patterns take to become block lists, and what memory that needs.

    python -m attncompiler.bench.blocks
    python -m attncompiler.bench.blocks --seq-len 131072 --pattern '{kind: random, random_blocks: 3}'

The lists of each pattern are made in turns; memory is that of a process of its own.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
import yaml

from attncompiler.bench.measure import Work, interleave, peak_bytes
from attncompiler.bench.report import Format, FormatOption, mib, pattern_label, show
from attncompiler.ops import block_lists

PATTERNS: tuple[dict[str, Any], ...] = (
    {"kind": "sliding_window", "window": 4096, "global_tokens": 64},
    {"kind": "local_global", "block_size": 128, "local_blocks": 4, "global_blocks": 1},
    {"kind": "random", "block_size": 128, "random_blocks": 3, "local_blocks": 2, "global_blocks": 1},
    {"kind": "chunked", "chunk": 8192},
)
SMALL = 2**14
"""tokens of the lists that are made before memory is measured"""


def main(
    seq_len: Annotated[int, typer.Option(help="T")] = 2**20,
    patterns: Annotated[
        list[str] | None, typer.Option("--pattern", help="a pattern as in a spec, several times (default: four)")
    ] = None,
    block: Annotated[int, typer.Option(help="tokens of a tile, either way")] = 128,
    repeats: Annotated[int, typer.Option(help="timed turns of each pattern")] = 9,
    format: FormatOption = Format.text,
) -> None:
    """Make the lists of every pattern, forward and transposed, full and partial tiles apart."""
    chosen = [json.dumps(each) for each in (map(yaml.safe_load, patterns) if patterns else PATTERNS)]
    samples = interleave({pattern: listing(seq_len, pattern, block) for pattern in chosen}, repeats)
    rows = [
        {
            "pattern": pattern_label(json.loads(pattern)),
            "tiles": kept(seq_len, pattern, block),
            "seconds": samples[pattern],
            "MiB": mib(peak_bytes(listing, (seq_len, pattern, block), small=(SMALL, pattern, block))),
        }
        for pattern in chosen
    ]
    show(f"Block lists of {seq_len} tokens, tiles of {block} × {block}", rows, format)


def listing(seq_len: int, pattern: str, block: int) -> Work:
    """What makes the lists once."""
    asked = json.loads(pattern)
    return lambda: block_lists(asked, seq_len, seq_len, tile_q=block, tile_k=block)


def kept(seq_len: int, pattern: str, block: int) -> int:
    """How many tiles are listed."""
    lists = block_lists(json.loads(pattern), seq_len, seq_len, tile_q=block, tile_k=block)
    return len(lists.full) + len(lists.partial)


if __name__ == "__main__":
    typer.run(main)
