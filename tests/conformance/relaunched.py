"""Draws calls of the kernels for Hopper without a GPU, and prints under which names a launch is known that Triton would
compile in more than one way, as JSON.

Run in a process of its own: under Triton's interpreter nothing is compiled.

    python tests/conformance/relaunched.py CALLS
"""

from __future__ import annotations

import json
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
from attncompiler.mechanisms.attention.flash import kernel
from attncompiler.mechanisms.attention.flash.launcher import Launcher
from attncompiler.mechanisms.attention.op import AttentionOptions
from attncompiler.mechanisms.attention.pattern import Causal, Full, SlidingWindow


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


def main(calls: int) -> None:
    triton.runtime.driver.set_active(NoDevice(90))
    kernel.device_of = lambda device: Device(232448, 132, (9, 0))
    asked: list[str] = []
    JITFunction._do_compile = lambda self, key, *_, **__: asked.append(key)
    found: defaultdict[tuple[str, Hashable], set[str]] = defaultdict(set)
    launches = 0

    def launched(self: Launcher, grid: tuple[int, ...], known: Hashable | None, *arguments: Any) -> None:
        nonlocal launches
        asked.clear()
        self.kernel[grid](*arguments, num_warps=4)
        if known is not None:
            launches += 1
            found[self.kernel.__name__, known].update(asked)

    Launcher.__call__ = launched
    draw = random.Random(0)
    for _ in range(calls):
        tensors, options, dout = call(draw)
        kernel.FEW_ROWS = 0  # one query is few: others would serve it
        outputs = kernel.forward(tensors, options)
        kernel.backward({"out": dout}, tensors, outputs, options)
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
    main(int(sys.argv[1]))
