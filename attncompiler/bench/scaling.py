"""Time per token of each linear-time mixer as the length grows.

    python -m attncompiler.bench.scaling --lengths 2048 --lengths 8192 --lengths 32768

It is flat when the mixer is linear. The lengths take turns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
import typer
from torch import Tensor

from attncompiler import ops
from attncompiler.bench.measure import Work, interleave
from attncompiler.bench.report import Format, FormatOption, ThreadsOption, show

LENGTHS = (2048, 4096, 8192, 16384, 32768)
Mixer = Callable[..., Tensor]


def main(
    lengths: Annotated[list[int] | None, typer.Option(help="T, several times")] = None,
    mixers: Annotated[list[str] | None, typer.Option(help="of those named here: all by default")] = None,
    repeats: Annotated[int, typer.Option(help="timed turns of each length")] = 3,
    forward_only: Annotated[bool, typer.Option("--forward-only", help="leave the backward pass out")] = False,
    threads: ThreadsOption = None,
    format: FormatOption = Format.text,
) -> None:
    """Time per token in µs of each mixer at each length (B1, fp32), and the largest over the smallest."""
    if threads is not None:
        torch.set_num_threads(threads)
    chosen = mixers or list(MIXERS)
    unknown = [name for name in chosen if name not in MIXERS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(MIXERS)}")
    rows = [row(name, tuple(lengths or LENGTHS), repeats, forward_only) for name in chosen]
    what = "forward" if forward_only else "forward + backward"
    show(f"Time per token, µs, {what}, by length", rows, format)


def row(name: str, lengths: tuple[int, ...], repeats: int, forward_only: bool) -> dict[str, object]:
    """The table's row of one mixer."""
    sides = {str(length): work(MIXERS[name], length, forward_only) for length in lengths}
    samples = interleave(sides, repeats)
    per_token = {length: samples[str(length)].scaled(1e6 / length) for length in lengths}
    medians = [taken.median for taken in per_token.values()]
    return {
        "mixer": name,
        **{f"T {length}": taken for length, taken in per_token.items()},
        "largest / smallest": max(medians) / min(medians),
    }


def work(mixer: Mixer, length: int, forward_only: bool) -> Work:
    """One call on inputs of that length, made once, with the gradients of all of them unless `forward_only`."""
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES[mixer](length).items()}
    for name, tensor in inputs.items():
        if name in ("key_projection", "value_projection"):
            tensor.mul_(len(tensor) ** -0.5)  # as a layer's start
    if not forward_only:
        inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}

    def call() -> None:
        out = mixer(**inputs)
        if not forward_only:
            out.backward(torch.ones_like(out))
        for tensor in inputs.values():
            tensor.grad = None

    return call


def sliding_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Window 256, H8 D64."""
    return ops.attention(q, k, v, pattern={"kind": "sliding_window", "window": 256})  # type: ignore[return-value]


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """elu + 1, normalised, causal, H8 D64."""
    return ops.linear_attention(q, k, v)  # type: ignore[return-value]


def performer(q: Tensor, k: Tensor, v: Tensor, random_projection: Tensor) -> Tensor:
    """favor, 128 random features, normalised, causal, H8 D64."""
    projection = random_projection.detach()
    return ops.linear_attention(q, k, v, feature_map="favor", projection=projection)  # type: ignore[return-value]


def linformer(q: Tensor, k: Tensor, v: Tensor, key_projection: Tensor, value_projection: Tensor) -> Tensor:
    """256 projected positions, H8 D64."""
    return ops.linformer(q, k, v, key_projection, value_projection)


def mamba(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor) -> Tensor:
    """512 channels, N16."""
    return ops.selective_scan(u, dt, -A.exp(), B, C, D, z=z, dt_bias=dt_bias)  # type: ignore[return-value]


def mamba2(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor) -> Tensor:
    """H16 P32 N64, one group."""
    return ops.ssd(x, dt, -A.exp(), B, C, D, z=z, dt_bias=dt_bias)  # type: ignore[return-value]


MIXERS: dict[str, Mixer] = {
    "sliding_window": sliding_window,
    "linear_attention": linear_attention,
    "performer": performer,
    "linformer": linformer,
    "mamba": mamba,
    "mamba2": mamba2,
}

_Shapes = Callable[[int], dict[str, tuple[int, ...]]]


def _heads(T: int) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(("q", "k", "v"), (1, T, 8, 64))


SHAPES: dict[Mixer, _Shapes] = {
    sliding_window: _heads,
    linear_attention: _heads,
    performer: lambda T: {**_heads(T), "random_projection": (128, 64)},
    linformer: lambda T: {**_heads(T), "key_projection": (256, T), "value_projection": (256, T)},
    mamba: lambda T: {
        **dict.fromkeys(("u", "dt", "z"), (1, T, 512)),
        **dict.fromkeys(("B", "C"), (1, T, 16)),
        **{"A": (512, 16), "D": (512,), "dt_bias": (512,)},
    },
    mamba2: lambda T: {
        **dict.fromkeys(("x", "z"), (1, T, 16, 32)),
        **dict.fromkeys(("B", "C"), (1, T, 1, 64)),
        **{"dt": (1, T, 16), "A": (16,), "D": (16,), "dt_bias": (16,)},
    },
}


if __name__ == "__main__":
    typer.run(main)
