"""Sparse attention against torch's SDPA: under the pattern as a dense mask, or under plain causal attention.

    python -m attncompiler.bench.sparse
    python -m attncompiler.bench.sparse --seq-len 16384 --pattern '{kind: sliding_window, window: 512}' --peer causal

Time in one process, in turns; with `--memory` the peak memory of each side in a process of its own.
"""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
import yaml
from torch import Tensor

from attncompiler.bench.measure import Work, compare, peak_bytes
from attncompiler.bench.report import Format, FormatOption, ThreadsOption, comparison_row, mib, pattern_label, show
from attncompiler.ops import attention

HEADS, WIDTH = 8, 64
WINDOW = {"kind": "sliding_window", "window": 256}
PATTERNS: tuple[dict[str, Any], ...] = (
    WINDOW,
    # one pair in eight of 4096 tokens, in blocks of 128
    {"kind": "strided", "block_size": 128, "stride": 8, "window": 1, "causal": False},
    {"kind": "random", "block_size": 128, "random_blocks": 1, "local_blocks": 2, "causal": False},
    {"kind": "local_global", "block_size": 128, "local_blocks": 4, "global_blocks": 1},
    {"kind": "strided", "block_size": 128, "stride": 8, "window": 3},
    {"kind": "random", "block_size": 128, "random_blocks": 2, "local_blocks": 2, "global_blocks": 1},
)


class Peer(StrEnum):
    """What SDPA is given: the pattern as a boolean mask, or `is_causal`, which is another function and dense."""

    dense = "dense"
    causal = "causal"


def main(
    seq_len: Annotated[int, typer.Option(help="T")] = 4096,
    patterns: Annotated[
        list[str] | None, typer.Option("--pattern", help="a pattern as in a spec, several times (default: six)")
    ] = None,
    peer: Annotated[Peer, typer.Option(help="SDPA with the pattern as a mask, or causal")] = Peer.dense,
    memory: Annotated[bool, typer.Option(help="also measure the peak memory of each side")] = False,
    repeats: Annotated[int, typer.Option(help="timed turns of each side")] = 9,
    threads: ThreadsOption = None,
    format: FormatOption = Format.text,
) -> None:
    """Compare sparse patterns with SDPA: B1 H8 D64, fp32, forward alone and with backward."""
    if threads is not None:
        torch.set_num_threads(threads)
    chosen = [yaml.safe_load(text) for text in patterns] if patterns else PATTERNS
    rows = [row(seq_len, pattern, peer, way, memory, repeats) for pattern in chosen for way in (False, True)]
    show(f"Sparse attention, T {seq_len}, against SDPA ({peer.value})", rows, format)


def row(
    seq_len: int, pattern: dict[str, Any], peer: Peer, backward: bool, memory: bool, repeats: int
) -> dict[str, object]:
    """The table's row of one pattern."""
    arguments = (seq_len, json.dumps(pattern), backward)
    other = dense if peer is Peer.dense else causal
    comparison = compare(ours(*arguments), other(*arguments), repeats)
    held: dict[str, float] = {}
    if memory:
        small = (256, *arguments[1:])
        held = {f"{side.__name__}, MiB": mib(peak_bytes(side, arguments, small=small)) for side in (ours, other)}
    case = f"{pattern_label(pattern)}: {'forward + backward' if backward else 'forward'}"
    return comparison_row(case, comparison, **{"density, %": 100 * density(pattern, seq_len)}, **held)


def density(pattern: dict[str, Any], seq_len: int) -> float:
    """The share of all T² pairs that see each other."""
    return float(_mask(pattern, seq_len).float().mean())


def ours(seq_len: int, pattern: str, backward: bool) -> Work:
    """One forward, and perhaps backward, of this package's operator."""
    q, k, v, grad = _inputs(seq_len)
    asked = json.loads(pattern)

    def work() -> None:
        out = attention(q, k, v, pattern=asked)
        if backward:
            out.backward(grad)  # type: ignore[union-attr]
            _clear(q, k, v)

    return work


def dense(seq_len: int, pattern: str, backward: bool) -> Work:
    """The same function by SDPA, whose layout is (B, H, T, D). Its mask is made before it is timed."""
    return _sdpa(seq_len, backward, attn_mask=_mask(json.loads(pattern), seq_len))


def causal(seq_len: int, pattern: str, backward: bool) -> Work:
    """Plain causal attention by SDPA: what a model without the pattern runs."""
    return _sdpa(seq_len, backward, is_causal=True)


def _sdpa(seq_len: int, backward: bool, **options: Any) -> Work:
    q, k, v, grad = (tensor.detach().transpose(1, 2).contiguous().requires_grad_() for tensor in _inputs(seq_len))

    def work() -> None:
        out = F.scaled_dot_product_attention(q, k, v, **options)
        if backward:
            out.backward(grad)
            _clear(q, k, v)

    return work


def _mask(pattern: dict[str, Any], seq_len: int) -> Tensor:
    """Which keys a query sees (T, T): those that have a weight where all scores are equal."""
    equal = torch.zeros(1, seq_len, 1, 1)
    weights = attention(equal, equal, torch.eye(seq_len)[None, :, None], pattern=pattern, kernel="eager")
    return weights[0, :, 0] > 0  # type: ignore[index]


def _inputs(seq_len: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(1, seq_len, HEADS, WIDTH, generator=generator) for _ in range(4))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad


def _clear(*tensors: Tensor) -> None:
    for tensor in tensors:
        tensor.grad = None


if __name__ == "__main__":
    typer.run(main)
