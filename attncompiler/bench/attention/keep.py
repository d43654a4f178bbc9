"""A row's result as an entry of the measured tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attncompiler.bench.attention.contestants import mechanism, policy
from attncompiler.bench.grid.cells import Measured, median
from attncompiler.bench.grid.contestants import AUTO
from attncompiler.measured import Entry, Run, Times


def entries(results: Sequence[Measured], run: Run, dtype: str) -> Iterator[Entry]:
    """An entry for each row in which a kernel ran, by its bucket.

    Rows of documents are left out: buckets know neither segments nor padding.
    """
    bucket = mechanism().bucket
    assert bucket is not None
    for result in results:
        if result.row.layout != "plain" or result.lost:
            continue
        kernels = {
            name: Times(forward=forward, both=median(cell, "both"))
            for name, cell in result.cells.items()
            if cell.role == "member" and name != AUTO and (forward := median(cell, "forward"))
        }
        if kernels:
            where = bucket(result.row.shapes, policy(result.row), dtype)
            yield Entry(mechanism=mechanism().name, bucket=where, run=run, kernels=kernels)
