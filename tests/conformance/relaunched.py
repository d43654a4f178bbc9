"""Draws calls of the GPU's kernels without one, and prints under which names a launch is known that Triton would
compile in more than one way, as JSON.

Run in a process of its own: under Triton's interpreter nothing is compiled.

    python tests/conformance/relaunched.py attention|recurrence|streaming CALLS
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections import defaultdict
from collections.abc import Hashable
from typing import Any

import torch
import triton
from compiled import NoDevice
from triton.runtime.jit import JITFunction

from attncompiler.blocks.gpu import Device
from attncompiler.blocks.launching.launcher import Launcher
from attncompiler.blocks.recurrence import launch
from attncompiler.blocks.streaming import convolution, norm
from attncompiler.mechanisms.attention.flash import kernel
from attncompiler.mechanisms.attention.op import AttentionOptions
from attncompiler.mechanisms.attention.pattern import Causal, Full, SlidingWindow
from attncompiler.mechanisms.linear_attention.op import LinearAttentionOptions
from attncompiler.mechanisms.linear_attention.recurrence import favor
from attncompiler.mechanisms.linear_attention.recurrence import kernel as linear
from attncompiler.mechanisms.mamba.op import MambaOptions
from attncompiler.mechanisms.mamba.recurrence import kernel as mamba
from attncompiler.mechanisms.mamba2.op import Mamba2Options
from attncompiler.mechanisms.mamba2.recurrence import kernel as mamba2
from attncompiler.mechanisms.mamba2.recurrence import launch as mamba2_launch


def heads(draw: random.Random, B: int, T: int, H: int, D: int, dtype: torch.dtype) -> torch.Tensor:
    """(B, T, H, D), laid out in one of the ways that users do."""
    way = draw.choice(["plain"] * 12 + ["heads first", "packed", "misaligned", "wider"])
    if way == "heads first":
        return torch.zeros(B, H, T, D, dtype=dtype).transpose(1, 2)
    if way == "packed":
        return torch.zeros(B, T, 3 * H, D, dtype=dtype)[:, :, H : 2 * H]
    if way == "wider":
        return torch.zeros(B, T, H, D + 8, dtype=dtype)[..., :D]
    if way == "misaligned":
        return torch.zeros(B * T * H * D + 1, dtype=dtype)[1:].view(B, T, H, D)
    return torch.zeros(B, T, H, D, dtype=dtype)


def attend(draw: random.Random) -> None:
    tensors, options, dout = call(draw)
    outputs = kernel.forward(tensors, options)
    kernel.backward({"out": dout}, tensors, outputs, options)


def recur(draw: random.Random) -> None:
    """Linear attention, mamba2 or mamba, forward and backward."""
    if draw.random() < 0.4:
        scan(draw)
        return
    B, T, D = 2, draw.choice([1, 100]), draw.choice([1, 16])
    dtype = draw.choice([torch.bfloat16, torch.bfloat16, torch.float16])

    def drawn(*shape: int) -> torch.Tensor:
        """Numbers in fp32, at an address that a wide load may have, or not."""
        return torch.zeros(*shape[:-1], shape[-1] + 1)[..., draw.choice([0] * 9 + [1]) :][..., : shape[-1]]

    tensors: dict[str, torch.Tensor] = {}
    if draw.random() < 0.1:
        tensors["segment_ids"] = torch.zeros(B, T, dtype=torch.int64)
    if draw.random() < 0.1:
        tensors["attention_mask"] = torch.ones(B, T, dtype=torch.bool)
    if draw.random() < 0.5:
        tensors |= {name: heads(draw, B, T, 2, D, dtype) for name in "qkv"}
        if draw.random() < 0.5:
            tensors["log_decay"] = drawn(B, T, 2)
        if draw.random() < 0.2:
            tensors |= {"initial_s": drawn(B, 2, D, D), "initial_z": drawn(B, 2, D), "initial_m": drawn(B, 2)}
        feature_map = draw.choice(["elu", "identity", "favor"])
        if feature_map == "favor":
            tensors["projection"] = drawn(D, D)
        linear_options = LinearAttentionOptions(
            feature_map=feature_map,
            causal="log_decay" in tensors or "initial_s" in tensors or draw.random() < 0.8,
            normalize=draw.random() < 0.9,
        )
        outputs = linear.forward(tensors, linear_options)
        linear.backward({"out": heads(draw, B, T, 2, D, dtype)}, tensors, outputs, linear_options)
        return
    groups = draw.choice([1, 1, 2])
    tensors |= {name: heads(draw, B, T, groups, D, dtype) for name in "bc"}
    tensors |= {"x": heads(draw, B, T, 2, 16, dtype), "dt": drawn(B, T, 2).to(dtype), "a": drawn(2)}
    if draw.random() < 0.5:
        tensors["d"] = drawn(2) if draw.random() < 0.8 else drawn(2, 16)
    if draw.random() < 0.2:
        tensors["z"] = heads(draw, B, T, 2, 16, dtype)
    if draw.random() < 0.2:
        tensors["initial_state"] = drawn(B, 2, 16, D)
    options = Mamba2Options(chunk_size=draw.choice([16, 64, 64]))
    outputs = mamba2.forward(tensors, options)
    mamba2.backward({"out": heads(draw, B, T, 2, 16, dtype)}, tensors, outputs, options)


def scan(draw: random.Random) -> None:
    """Mamba, forward and backward, of one group of tokens or of several."""
    B, T, E, G = 2, draw.choice([1, 100, 100]), draw.choice([2, 32, 32]), draw.choice([1, 1, 2])
    N = draw.choice([1, 16, 16])
    dtype = draw.choice([torch.bfloat16, torch.bfloat16, torch.float16])

    def drawn(*shape: int) -> torch.Tensor:
        """Numbers in fp32 side by side, at an address that a wide load may have, or not."""
        return torch.zeros(math.prod(shape) + 1)[draw.choice([0] * 9 + [1]) :][: math.prod(shape)].view(shape)

    def rows() -> torch.Tensor:
        return heads(draw, B, T, 1, E, dtype)[:, :, 0]

    tensors = {name: heads(draw, B, T, G, N, dtype) for name in "bc"}
    tensors |= {"u": rows(), "dt": rows(), "a": drawn(E, N)}
    optional = {
        "z": rows,
        "d": lambda: drawn(E),
        "dt_bias": lambda: drawn(E),
        "initial_state": lambda: drawn(B, E, N),
        "segment_ids": lambda: torch.zeros(B, T, dtype=torch.int64),
        "attention_mask": lambda: torch.ones(B * T + 1, dtype=torch.bool)[draw.choice([0, 1]) :][: B * T].view(B, T),
    }
    tensors |= {name: make() for name, make in optional.items() if draw.random() < 0.15}
    options = MambaOptions(dt_softplus=draw.random() < 0.9)
    outputs = mamba.forward(tensors, options)
    grads = {"out": rows()} | ({"final_state": drawn(B, E, N)} if draw.random() < 0.15 else {})
    mamba.backward(grads, tensors, outputs, options)


def beside(draw: random.Random, *shape: int) -> torch.Tensor:
    """Numbers side by side, at an address that a wide load may have, or not."""
    return torch.zeros(math.prod(shape) + 1)[draw.choice([0] * 9 + [1]) :][: math.prod(shape)].view(shape)


def stream(draw: random.Random) -> None:
    """The causal convolution or a norm, forward and backward."""
    if draw.random() < 0.5:
        normalise(draw)
        return
    B, T, E, W = 2, draw.choice([1, 100, 2048]), draw.choice([1, 32, 40]), draw.choice([1, 4])
    dtype = draw.choice([torch.bfloat16, torch.bfloat16, torch.float32])

    def rows() -> torch.Tensor:
        return heads(draw, B, T, 1, E, dtype)[:, :, 0]

    optional = {
        "bias": lambda: beside(draw, E),
        "runs": lambda: torch.zeros(B, T, dtype=torch.int64),
        "real": lambda: torch.ones(B * T + 1, dtype=torch.bool)[draw.choice([0, 1]) :][: B * T].view(B, T),
        "before": lambda: beside(draw, B, E, W - 1),
    }
    given = [make() if draw.random() < 0.2 else None for make in optional.values()]
    x, weight = rows(), beside(draw, E, 1, W)
    convolution.forward(x, weight, *given)
    convolution.backward(rows(), x, weight, *given)


def normalise(draw: random.Random) -> None:
    B, T, H, D = 2, draw.choice([1, 100]), draw.choice([1, 4]), draw.choice([1, 24, 64])
    dtype = draw.choice([torch.bfloat16, torch.bfloat16, torch.float32])
    if draw.random() < 0.5:  # of heads
        given = heads(draw, B, T, H, D, dtype), None, beside(draw, D)
        grad, groups, first = heads(draw, B, T, H, D, dtype), 1, False
    else:
        x, z, grad = (heads(draw, B, T, 1, H * D, dtype)[:, :, 0] for _ in "xzg")
        given = x, draw.choice([None, z]), beside(draw, H * D)
        groups, first = draw.choice([1, H]), draw.random() < 0.3
    _, scales = norm.forward(*given, 1e-5, groups, first)
    norm.backward(grad, *given, scales, groups, first)


def call(draw: random.Random) -> tuple[dict[str, torch.Tensor], AttentionOptions, torch.Tensor]:
    B, T, D, K = 2, draw.choice([1, 16, 100]), draw.choice([64, 128]), draw.choice([1, 2])
    S, dtype = draw.choice([T, T + 1]), draw.choice([torch.bfloat16, torch.float16])
    tensors = {
        "q": heads(draw, B, T, 2, D, dtype),
        "k": heads(draw, B, S, K, D, dtype),
        "v": heads(draw, B, S, K, D, dtype),
    }
    if draw.random() < 0.3:
        tensors["sinks"] = torch.zeros(3)[draw.choice([0, 1]) :][:2]
    patterns = (Full(), Causal(), SlidingWindow(window=1), SlidingWindow(window=16, global_tokens=draw.choice([0, 1])))
    options = AttentionOptions(
        pattern=draw.choice(patterns),
        softcap=draw.choice([None, None, None, 30.0]),
        deterministic=draw.random() < 0.2,
    )
    return tensors, options, heads(draw, B, T, 2, D, dtype)


def main(mechanism: str, calls: int) -> None:
    triton.runtime.driver.set_active(NoDevice(90))
    device = Device(232448, 132, (9, 0))
    for module in (kernel, launch, favor, mamba, mamba2_launch, convolution, norm):
        module.device_of = lambda _: device
    launch.FEWEST_CHUNKS = 1  # short sequences have several groups
    kernel.FEW_ROWS = 0  # one query is few: others would serve it
    asked: list[str] = []
    JITFunction._do_compile = lambda self, key, *_, **__: asked.append(key)
    found: defaultdict[tuple[str, Hashable], set[str]] = defaultdict(set)
    launches = 0

    def launched(
        self: Launcher, grid: tuple[int, ...], known: Hashable | None, *arguments: Any, **options: Any
    ) -> None:
        nonlocal launches
        asked.clear()
        self.kernel[grid](*arguments, **{"num_warps": 4, **options})
        if known is not None:
            launches += 1
            found[self.kernel.__name__, known].update(asked)

    Launcher.__call__ = launched
    draw = random.Random(0)
    for _ in range(calls):
        {"attention": attend, "recurrence": recur, "streaming": stream}[mechanism](draw)
    print(
        json.dumps(
            {
                "launches": launches,
                "names": len(found),
                "ways": len(set.union(*found.values())),
                "in more than one way": [str(place) for place, ways in found.items() if len(ways) != 1],
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
