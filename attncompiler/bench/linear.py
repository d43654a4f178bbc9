"""Linear attention, forward and backward, against the plain causal form: every token's φ(k)vᵀ, and their running sum.

    python -m attncompiler.bench.linear --seq-len 2048 --features 128

Time in one process, in turns; the plain form holds T · R · V numbers a head several times. `bench.scaling` has the time
per token at lengths where it does not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from attncompiler import ops
from attncompiler.bench.measure import Work, compare
from attncompiler.bench.report import Format, FormatOption, ThreadsOption, comparison_row, show

HEADS, WIDTH = 8, 64
EPS = 1e-6


def main(
    seq_lens: Annotated[list[int] | None, typer.Option("--seq-len", help="T, several times (default 2048)")] = None,
    features: Annotated[int, typer.Option(help="R, random features of the Performer")] = 128,
    repeats: Annotated[int, typer.Option(help="timed turns of each side")] = 5,
    threads: ThreadsOption = None,
    format: FormatOption = Format.text,
) -> None:
    """Compare the Linear Transformer (elu) and the Performer (favor) with the plain form: B1 H8 D64, causal, fp32."""
    if threads is not None:
        torch.set_num_threads(threads)
    lengths = seq_lens or (2048,)
    rows = [row(name, seq_len, features, repeats) for name in ("elu", "favor") for seq_len in lengths]
    show("Linear attention, forward + backward, against φ(k)vᵀ of every token and its cumsum", rows, format)


def row(feature_map: str, seq_len: int, features: int, repeats: int) -> dict[str, object]:
    """The table's row of one feature map at one length."""
    count = WIDTH if feature_map == "elu" else features
    sides = [side(feature_map, seq_len, features) for side in (ours, peer)]
    return comparison_row(f"{feature_map}, T {seq_len}, R {count}", compare(sides[0], sides[1], repeats))


def ours(feature_map: str, seq_len: int, features: int) -> Work:
    """One forward and backward of this package's operator."""
    q, k, v, grad, projection = _inputs(seq_len, features)
    given = {"projection": projection} if feature_map == "favor" else {}

    def work() -> None:
        out = ops.linear_attention(q, k, v, feature_map=feature_map, eps=EPS, **given)  # type: ignore[arg-type]
        out.backward(grad)  # type: ignore[union-attr]
        _clear(q, k, v)

    return work


def peer(feature_map: str, seq_len: int, features: int) -> Work:
    """The same function as it is written down."""
    q, k, v, grad, projection = _inputs(seq_len, features)

    def favor(x: Tensor) -> Tensor:
        x = x * WIDTH**-0.25
        return (x @ projection.mT - x.square().sum(-1, keepdim=True) / 2).exp() * features**-0.5

    phi: Callable[[Tensor], Tensor] = favor if feature_map == "favor" else lambda x: F.elu(x) + 1

    def work() -> None:
        phi_q, phi_k = phi(q), phi(k)
        states = (phi_k[..., None] * v[..., None, :]).cumsum(1)
        numerator = (phi_q[..., None, :] @ states).squeeze(-2)
        out = numerator / ((phi_q * phi_k.cumsum(1)).sum(-1, keepdim=True) + EPS)
        out.backward(grad)
        _clear(q, k, v)

    return work


def _inputs(seq_len: int, features: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(1, seq_len, HEADS, WIDTH, generator=generator) for _ in range(4))
    projection = torch.randn(features, WIDTH, generator=generator)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad, projection


def _clear(*tensors: Tensor) -> None:
    for tensor in tensors:
        tensor.grad = None


if __name__ == "__main__":
    typer.run(main)
