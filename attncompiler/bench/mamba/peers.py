"""The peer: mamba-ssm, Mamba's scan in CUDA and Mamba-2's passes in Triton, on a GPU.

Its scan takes channels first, (B, E, T), and is given contiguous tensors of that layout; what it would take to turn
those of a model's projections is not in its time.
"""

from __future__ import annotations

import importlib
import importlib.util
import math

from torch import Tensor

from attncompiler.bench.grid.contestants import Absent, Call, Contestant
from attncompiler.bench.grid.drawn import on_gpu
from attncompiler.bench.mamba.inputs import Inputs

CHUNK = 256
"""mamba-ssm's default"""
OFFSETS = 2**31
"""elements that its passes in Triton can tell apart"""


def peers(device_type: str) -> tuple[Contestant, ...]:
    """mamba-ssm, which says why where it does not run."""
    return (Contestant("mamba_ssm", "peer", mamba_ssm),)


def mamba_ssm(inputs: Inputs) -> Call:
    """Its kernel for the row: `selective_scan_fn`, `mamba_chunk_scan_combined`, or for a step its update of a state."""
    if importlib.util.find_spec("mamba_ssm") is None:
        raise Absent("mamba-ssm is not installed: pip install mamba-ssm --no-build-isolation")
    if not on_gpu(inputs):
        raise Absent("its kernels run on a GPU alone")
    scan = inputs.row.mechanism == "mamba"
    if inputs.row.step:
        return scan_step(inputs) if scan else duality_step(inputs)
    return scan_call(inputs) if scan else duality_call(inputs)


def scan_call(inputs: Inputs) -> Call:
    """Mamba's scan, on leaves (B, E, T), B and C (B, G, N, T)."""
    if importlib.util.find_spec("selective_scan_cuda") is None:
        raise Absent("mamba-ssm is installed without its scan in CUDA: build it with MAMBA_KEEP_CUDA_BUILD=TRUE")
    run = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn

    def leaf(name: str) -> Tensor:
        tensor = inputs.tensors[name].detach()
        turned = {"b": (0, 2, 3, 1), "c": (0, 2, 3, 1), "u": (0, 2, 1), "dt": (0, 2, 1), "z": (0, 2, 1)}
        tensor = tensor.permute(turned[name]).contiguous() if name in turned else tensor.clone()
        return tensor.requires_grad_(inputs.row.backward)

    u, dt, a, b, c, d, z, bias = leaves = tuple(leaf(name) for name in ("u", "dt", "a", "b", "c", "d", "z", "dt_bias"))

    def forward() -> Tensor:
        out: Tensor = run(u, dt, a, b, c, d, z=z, delta_bias=bias, delta_softplus=True)
        return out

    return Call(forward, leaves, lambda out: out.transpose(1, 2))


def duality_call(inputs: Inputs) -> Call:
    """Mamba-2, in our layout."""
    elements = math.prod(inputs.row.operands.out)
    if elements >= OFFSETS:
        raise Absent(f"its passes count a tensor's elements in 32 bits, and x has {elements:,}")
    run = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    given = inputs.tensors
    arguments = [given[name] for name in ("x", "dt", "a", "b", "c")]

    def forward() -> Tensor:
        out: Tensor = run(*arguments, CHUNK, D=given["d"], dt_bias=given["dt_bias"], dt_softplus=True)
        return out

    return Call(forward, inputs.leaves)


def scan_step(inputs: Inputs) -> Call:
    """One token of Mamba. The state is put in the place of the one before: each turn goes on from the last one's."""
    run = importlib.import_module("mamba_ssm.ops.triton.selective_state_update").selective_state_update
    given, state = inputs.tensors, inputs.tensors["initial_state"].clone()
    u, dt, z = (given[name][:, 0] for name in ("u", "dt", "z"))
    b, c = (given[name][:, 0, 0] for name in ("b", "c"))
    more = {"D": given["d"], "z": z, "dt_bias": given["dt_bias"], "dt_softplus": True}

    def forward() -> Tensor:
        out: Tensor = run(state, u, dt, given["a"], b, c, **more)
        return out

    return Call(forward, (), lambda out: out[:, None])


def duality_step(inputs: Inputs) -> Call:
    """One token of Mamba-2, likewise. What is the same for all of a head's channels is given without a copy."""
    run = importlib.import_module("mamba_ssm.ops.triton.selective_state_update").selective_state_update
    given, state = inputs.tensors, inputs.tensors["initial_state"].clone()
    _, _, P, N = state.shape
    x, b, c = (given[name][:, 0] for name in ("x", "b", "c"))
    dt = given["dt"][:, 0, :, None].expand(-1, -1, P)
    a = given["a"][:, None, None].expand(-1, P, N)
    d, bias = (given[name][:, None].expand(-1, P) for name in ("d", "dt_bias"))

    def forward() -> Tensor:
        out: Tensor = run(state, x, dt, a, b, c, D=d, dt_bias=bias, dt_softplus=True)
        return out

    return Call(forward, (), lambda out: out[:, None])
