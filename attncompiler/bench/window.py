"""A sliding window, forward and backward, against torch's SDPA with the window as a dense mask.

    python -m attncompiler.bench.window --seq-len 4096 --window 256

Time in one process, in turns; the peak memory of each side in a process of its own.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from attncompiler.bench.measure import Work, compare, peak_bytes
from attncompiler.bench.report import Format, FormatOption, ThreadsOption, comparison_row, mib, show
from attncompiler.ops import attention

HEADS, WIDTH = 8, 64


def main(
    seq_lens: Annotated[
        list[int] | None, typer.Option("--seq-len", help="T, several times (default 2048 and 4096)")
    ] = None,
    window: Annotated[int, typer.Option(help="keys that a query sees, itself included")] = 256,
    repeats: Annotated[int, typer.Option(help="timed turns of each side")] = 9,
    threads: ThreadsOption = None,
    format: FormatOption = Format.text,
) -> None:
    """Compare a sliding window with SDPA under a dense mask: B1 H8 D64, fp32."""
    if threads is not None:
        torch.set_num_threads(threads)
    rows = [row(seq_len, window, repeats) for seq_len in seq_lens or (2048, 4096)]
    show("Sliding window, forward + backward, against SDPA with a dense mask", rows, format)


def row(seq_len: int, window: int, repeats: int) -> dict[str, object]:
    """The table's row of one length."""
    comparison = compare(ours(seq_len, window), peer(seq_len, window), repeats)
    memory = {
        f"{side.__name__}, MiB": mib(peak_bytes(side, (seq_len, window), small=(window, window)))
        for side in (ours, peer)
    }
    return comparison_row(f"T {seq_len}, window {window}", comparison, **memory)


def ours(seq_len: int, window: int) -> Work:
    """One forward and backward of this package's operator."""
    q, k, v, grad = _inputs(seq_len)
    pattern = {"kind": "sliding_window", "window": window}

    def work() -> None:
        attention(q, k, v, pattern=pattern).backward(grad)  # type: ignore[union-attr]
        _clear(q, k, v)

    return work


def peer(seq_len: int, window: int) -> Work:
    """The same function by SDPA, whose layout is (B, H, T, D). Its mask is made before it is timed."""
    q, k, v, grad = (tensor.detach().transpose(1, 2).contiguous().requires_grad_() for tensor in _inputs(seq_len))
    index = torch.arange(seq_len)
    distance = index[:, None] - index[None, :]
    mask = (distance >= 0) & (distance < window)

    def work() -> None:
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask).backward(grad)
        _clear(q, k, v)

    return work


def _inputs(seq_len: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(1, seq_len, HEADS, WIDTH, generator=generator) for _ in range(4))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad


def _clear(*tensors: Tensor) -> None:
    for tensor in tensors:
        tensor.grad = None


if __name__ == "__main__":
    typer.run(main)
