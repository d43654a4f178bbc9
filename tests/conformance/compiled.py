"""Compiles the built-in kernels for GPUs that are not there, and prints what each needs of its device, as JSON.

Run in a process of its own: under Triton's interpreter nothing is compiled.

    python tests/conformance/compiled.py CAPABILITY SHARED_MEMORY_BYTES MECHANISM|streaming [few]
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import triton
from machine_code import unset_reads
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from attncompiler.blocks.gpu import Device
from attncompiler.blocks.recurrence import launch
from attncompiler.blocks.streaming import convolution, norm
from attncompiler.mechanisms.attention.flash import kernel
from attncompiler.mechanisms.attention.op import AttentionOptions
from attncompiler.mechanisms.attention.pattern import Causal, LocalGlobal, Random, SlidingWindow, Strided
from attncompiler.mechanisms.linear_attention.op import LinearAttentionOptions
from attncompiler.mechanisms.linear_attention.recurrence import favor
from attncompiler.mechanisms.linear_attention.recurrence import kernel as linear
from attncompiler.mechanisms.mamba.op import MambaOptions
from attncompiler.mechanisms.mamba.recurrence import kernel as mamba
from attncompiler.mechanisms.mamba2.op import Mamba2Options
from attncompiler.mechanisms.mamba2.recurrence import kernel as mamba2
from attncompiler.mechanisms.mamba2.recurrence import launch as mamba2_launch


class NoDevice:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling(found: list[Any]) -> Iterator[None]:
    """Launches only compile meanwhile, and leave what was compiled in `found`."""
    run = JITFunction.run

    def compiled(self: JITFunction, *args: Any, **options: Any) -> None:
        found.append((self.__name__, run(self, *args, **{**options, "warmup": True})))

    JITFunction.run = compiled
    try:
        yield
    finally:
        JITFunction.run = run


@functools.cache  # one kernel serves several rows
def read_from(cubin: bytes) -> dict[str, Any]:
    """Registers and bytes of stack of a thread, and what reads registers that nothing has set; a stack holds what
    registers do not."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = [str(triton.knobs.nvidia.cuobjdump.path), "--dump-resource-usage", file.name]
        text = subprocess.run(tool, check=True, capture_output=True, text=True).stdout
    found = {name.lower(): int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {**found, "unset": unset_reads(cubin)}


def calls(capability: int) -> Iterator[tuple[dict[str, torch.Tensor], AttentionOptions]]:
    """One call of every way through the kernels of an architecture, at every width and dtype, each of few tokens."""
    if capability == 90:
        for width in (64, 128):
            for asked in ({"softcap": 30.0}, {"deterministic": True}):
                yield call(torch.bfloat16, width, 256, Causal(), **asked)
            both = {"softcap": 30.0, "deterministic": True}
            yield call(torch.bfloat16, width, 256, SlidingWindow(window=100, global_tokens=3), **both)
        for width in (64, 128):
            for pattern in (Causal(), SlidingWindow(window=100, global_tokens=3)):
                tensors, options = call(torch.bfloat16, width, 256, pattern)
                yield tensors | {"segment_ids": torch.zeros(1, 256, dtype=torch.int64)}, options
        yield call(torch.bfloat16, 64, 256, Strided(block_size=8, stride=4, window=2))
        for width in (64, 128):
            yield call(torch.bfloat16, width, 256, LocalGlobal(block_size=8, local_blocks=2, global_blocks=1))
            yield call(torch.bfloat16, width, 256, Random(block_size=128, random_blocks=1, local_blocks=1))
    for dtype in (torch.float32, torch.bfloat16):
        for width in (64, 128, 256):
            yield call(dtype, width, 256, Causal())
        yield call(dtype, 128, 1, Causal())
    yield call(torch.float16, 32, 256, Causal())
    yield call(torch.bfloat16, 32, 256, Causal(), values=16)
    for pattern in (
        SlidingWindow(window=100, global_tokens=3),
        Random(block_size=16, random_blocks=2, causal=False),
        Strided(block_size=8, stride=4, window=2),
    ):
        yield call(torch.bfloat16, 128, 256, pattern)
    everything = call(torch.bfloat16, 128, 256, Causal())
    tensors = everything[0] | {
        "segment_ids": torch.zeros(1, 256, dtype=torch.int64),
        "attention_mask": torch.ones(1, 256, dtype=torch.bool),
        "alibi_slopes": torch.rand(4),
        "sinks": torch.rand(4),
        "dropout_seed": torch.zeros(1, dtype=torch.int64),
    }
    yield tensors, AttentionOptions(softcap=30.0, dropout=0.1)


def call(
    dtype: torch.dtype, width: int, T: int, pattern: Any, *, values: int = 0, **asked: Any
) -> tuple[dict[str, torch.Tensor], AttentionOptions]:
    sizes = {"q": (T, 4, width), "k": (256, 2, width), "v": (256, 2, values or width)}
    tensors = {name: torch.zeros(1, *size, dtype=dtype) for name, size in sizes.items()}
    return tensors, AttentionOptions(pattern=pattern, **asked)


def recurrent_rows(mechanism: str, few: bool) -> Iterator[dict[str, Any]]:
    """The passes of a recurrence, forward and backward, plain and with all that a token may count by."""
    dtypes = (torch.float32, torch.bfloat16) if few else (torch.float32, torch.bfloat16, torch.float16)
    calls, module, first = {
        "linear_attention": ((linear_call, favor_call), linear, 64),
        "mamba": ((mamba_call,), mamba, 16),
        "mamba2": ((mamba2_call,), mamba2, 64),
    }[mechanism]
    # the wider, the fuller: of fp16 the widest alone, whose operands take fp32's room
    widths = {torch.bfloat16: (first, 128, 256), torch.float32: (128, 256), torch.float16: (256,)}
    for makes, dtype in itertools.product(calls, dtypes):
        for width in (first,) if few else widths[dtype]:
            rows = ((2048, True), (16, True), (1, True))
            plain = () if few or dtype != torch.bfloat16 else ((2048, False), (1, False))  # which need less of all
            for tokens, more in (*rows, *plain):
                tensors, options, states = makes(dtype, width, tokens, more)
                if more:
                    tensors["segment_ids"] = torch.zeros(1, tokens, dtype=torch.int64)
                    tensors["attention_mask"] = torch.ones(1, tokens, dtype=torch.bool)
                if more and tokens < 2048:  # one group or one token, and what a state brings
                    tensors |= {f"initial_{name}": state for name, state in states.items()}
                found: list[Any] = []
                with compiling(found):
                    outputs = module.forward(tensors, options)
                    if tokens > 1:  # of one token the backward runs what it runs of many
                        module.backward({"out": outputs["out"]}, tensors, outputs, options)
                for name, made in found:
                    yield {**row_of(name, made, dtype, width), "tokens": tokens, "options": sorted(tensors)}


def linear_call(dtype: torch.dtype, width: int, tokens: int, more: bool) -> tuple[dict[str, torch.Tensor], Any, Any]:
    tensors = {name: torch.zeros(1, tokens, 2, width, dtype=dtype) for name in "qkv"}
    if more:
        tensors["log_decay"] = torch.zeros(1, tokens, 2)
    states = {"s": torch.zeros(1, 2, width, width), "z": torch.zeros(1, 2, width), "m": torch.zeros(1, 2)}
    return tensors, LinearAttentionOptions(), states


def favor_call(dtype: torch.dtype, width: int, tokens: int, more: bool) -> tuple[dict[str, torch.Tensor], Any, Any]:
    tensors, _, states = linear_call(dtype, width, tokens, more)
    heads = {name: torch.zeros(1, tokens, 2, width // 2, dtype=dtype) for name in "qk"}
    tensors |= {**heads, "projection": torch.zeros(width, width // 2)}
    if tokens == 16:  # keys count by marks there, as they do without documents
        tensors.pop("log_decay", None)
    return tensors, LinearAttentionOptions(feature_map="favor", normalize=tokens > 16), states


def mamba_call(dtype: torch.dtype, width: int, tokens: int, more: bool) -> tuple[dict[str, torch.Tensor], Any, Any]:
    tensors = {name: torch.zeros(1, tokens, 1, width, dtype=dtype) for name in "bc"}
    tensors |= {name: torch.zeros(1, tokens, 128, dtype=dtype) for name in ("u", "dt", "z")}
    tensors |= {"a": torch.zeros(128, width), "d": torch.zeros(128), "dt_bias": torch.zeros(128)}
    if more:
        tensors["initial_state"] = torch.zeros(1, 128, width)
    return tensors, MambaOptions(), {"state": torch.zeros(1, 128, width)}


def mamba2_call(dtype: torch.dtype, width: int, tokens: int, more: bool) -> tuple[dict[str, torch.Tensor], Any, Any]:
    tensors = {name: torch.zeros(1, tokens, 1, width, dtype=dtype) for name in "bc"}
    tensors |= {name: torch.zeros(1, tokens, 2, 64, dtype=dtype) for name in ("x", *(["z"] if more else []))}
    tensors |= {"dt": torch.zeros(1, tokens, 2, dtype=dtype), "a": torch.zeros(2), "d": torch.zeros(2)}
    return tensors, Mamba2Options(chunk_size=256), {"state": torch.zeros(1, 2, 64, width)}


def streaming_rows() -> Iterator[dict[str, Any]]:
    """The blocks around mechanisms: of many tokens and of one, plain and with all that a call may have."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for tokens in (2048, 1):
            for more in (False, True):
                found: list[Any] = []
                with compiling(found):
                    convolve(dtype, tokens, more)
                for name, made in found:
                    yield {**row_of(name, made, dtype, 0), "tokens": tokens, "more": more}
        for width, groups, gate, first in NORMS:
            found = []
            with compiling(found):
                normalise(dtype, width, groups, gate, first)
            for name, made in found:
                yield {**row_of(name, made, dtype, width), "groups": groups, "gate": gate, "first": first}


NORMS = [
    *((128, 1, False, False), (4096, 1, False, False), (16384, 1, False, False)),
    *((4096, 1, True, False), (5120, 1, True, True), (4096, 8, True, False), (8192, 1, True, False)),
]
"""width, groups, whether there is a gate, whether the norm is before it"""


def normalise(dtype: torch.dtype, width: int, groups: int, gate: bool, first: bool) -> None:
    x, z, grad = torch.zeros(8, 512, 3 * width, dtype=dtype).chunk(3, -1)
    weight, opened = torch.zeros(width), z if gate else None
    _, scales = norm.forward(x, opened, weight, 1e-5, groups, first)
    norm.backward(grad, x, opened, weight, scales, groups, first)


def convolve(dtype: torch.dtype, tokens: int, more: bool) -> None:
    B, E, W = 8, 2048, 4
    x, grad = torch.zeros(B, tokens, 2 * E, dtype=dtype).chunk(2, -1)
    given: list[torch.Tensor | None] = [x, torch.zeros(E, 1, W), None, None, None, None]
    if more:
        runs, real = torch.zeros(B, tokens, dtype=torch.int64), torch.ones(B, tokens, dtype=torch.bool)
        given[2:] = torch.zeros(E), runs, real, torch.zeros(B, E, W - 1, dtype=dtype)
    convolution.forward(*given)
    convolution.backward(grad, *given)


def row_of(name: str, made: Any, dtype: torch.dtype, width: int) -> dict[str, Any]:
    """What one compiled kernel needs, and what is in its code."""
    return {
        "kernel": name,
        "dtype": str(dtype).removeprefix("torch."),
        "width": width,
        "shared": made.metadata.shared,
        "tf32": ".tf32" in made.asm["ptx"],
        "wgmma": "wgmma" in made.asm["ptx"],
        **read_from(made.asm["cubin"]),
    }


def main(capability: int, shared_memory: int, mechanism: str, few: bool) -> None:
    triton.runtime.driver.set_active(NoDevice(capability))
    device = Device(shared_memory, 132, divmod(capability, 10))
    for module in (kernel, launch, favor, mamba, mamba2_launch, convolution, norm):
        module.device_of = lambda _: device
    if mechanism == "streaming":
        rows = streaming_rows()
    else:
        rows = attention_rows(capability) if mechanism == "attention" else recurrent_rows(mechanism, few)
    print(json.dumps(list(rows)))


def attention_rows(capability: int) -> Iterator[dict[str, Any]]:
    """Attention's kernels, every way through them."""
    for tensors, options in calls(capability):
        found: list[Any] = []
        with compiling(found):
            outputs = kernel.forward(tensors, options)
            if tensors["q"].shape[1] > 1:
                kernel.backward({"out": outputs["out"]}, tensors, outputs, options)
        for name, made in found:
            yield {
                **row_of(name, made, tensors["q"].dtype, tensors["q"].shape[-1]),
                "tokens": tensors["q"].shape[1],
                "pattern": options.pattern.kind,
                "softcap": options.softcap is not None,
                "deterministic": options.deterministic,
                "options": sorted(tensors.keys() - {"q", "k", "v"}),
            }


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], "few" in sys.argv)
