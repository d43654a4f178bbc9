"""The peers: flash-linear-attention's kernels on a GPU, and on a CPU the function as it is written down in torch.

fla takes features, not a feature map: what makes them is counted in its time, as its users have it. Its normaliser has
an eps of 1e-10 where ours has 1e-6, beside sums of at least hundreds, and keeps the running sum of the keys in their
dtype.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attncompiler.bench.grid.contestants import Absent, Call, Contestant
from attncompiler.bench.grid.drawn import on_gpu
from attncompiler.bench.linear.inputs import Inputs

EPS = 1e-6
"""our operator's default"""
PLAIN_NUMBERS = 2**27
"""the most that the plain form is asked to hold: a state for every token, half a GiB in fp32"""
WRONG_GATES = ((3, 4, 0), (3, 7, 1))
"""from and before which version of triton fla's gated backward is wrong on Hopper"""


def peers(device_type: str) -> tuple[Contestant, ...]:
    """Those that run on a device, and fla's kernels, which say why where they do not."""
    prepared: dict[str, Callable[[Inputs], Call]] = {"fla": fla, "fla-fused": fla_fused}
    if device_type == "cpu":
        prepared = {"plain": plain, **prepared}
    return tuple(Contestant(name, "peer", prepare) for name, prepare in prepared.items())


# --- fla ----------------------------------------------------------------------------------------------------------


def fla(inputs: Inputs) -> Call:
    """Its `chunk_linear_attn`, `chunk_retention` or `chunk_simple_gla`, and for a step its recurrent kernels."""
    _ask_for_fla(inputs)
    row = inputs.row
    if row.step:
        return _call(inputs, _step(inputs))
    if row.decay == "retention":
        run = importlib.import_module("fla.ops.retention").chunk_retention
        return _call(inputs, lambda q, k: run(q, k, inputs.tensors["v"], scale=row.scale)[0])
    if row.decay == "scalar":
        run = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
        given = inputs.tensors["v"], inputs.tensors["log_decay"]
        return _call(inputs, lambda q, k: run(q, k, *given, scale=row.scale)[0], _wrong_gates(inputs))
    return _call(inputs, _undecayed(inputs, "chunk_linear_attn"))


def fla_fused(inputs: Inputs) -> Call:
    """Its `fused_chunk_linear_attn`, which keeps no states."""
    _ask_for_fla(inputs)
    if inputs.row.step or inputs.row.decay != "none":
        raise Absent("it is measured on whole sequences without a decay")
    return _call(inputs, _undecayed(inputs, "fused_chunk_linear_attn"))


Attend = Callable[[Tensor, Tensor], Tensor]
"""features of queries and of keys → out"""


def _undecayed(inputs: Inputs, name: str) -> Attend:
    run, row = getattr(importlib.import_module("fla.ops.linear_attn"), name), inputs.row
    return lambda q, k: run(q, k, inputs.tensors["v"], scale=row.scale, normalize=row.normalize)[0]


def _step(inputs: Inputs) -> Attend:
    """One token from a state, which gives the state after it; their sum of keys is (B, 1, H, R)."""
    row, given = inputs.row, inputs.tensors
    more: dict[str, Any] = {"scale": row.scale, "output_final_state": True, "initial_state": given["initial_s"]}
    if row.decay == "none":
        run = importlib.import_module("fla.ops.linear_attn").fused_recurrent_linear_attn
        more["normalize"] = row.normalize
        if row.normalize:
            more["initial_state"] = given["initial_s"], given["initial_z"][:, None]
    else:
        run = importlib.import_module("fla.ops.simple_gla").fused_recurrent_simple_gla
        more["g" if row.decay == "scalar" else "g_gamma"] = given["log_decay"]
    return lambda q, k: run(q, k, given["v"], **more)[0]


def _call(inputs: Inputs, attend: Attend, no_backward: str | None = None) -> Call:
    q, k = inputs.tensors["q"], inputs.tensors["k"]
    phi = feature_map(inputs)
    return Call(lambda: attend(phi(q), phi(k)), inputs.leaves, no_backward=no_backward)


def _ask_for_fla(inputs: Inputs) -> None:
    if importlib.util.find_spec("fla") is None:
        raise Absent("flash-linear-attention is not installed: pip install flash-linear-attention")
    if not on_gpu(inputs):
        raise Absent("its kernels run on a GPU alone")


def _wrong_gates(inputs: Inputs) -> str | None:
    """Why fla's gated backward is not asked for; with tilelang it has another kernel for it."""
    if torch.cuda.get_device_capability(inputs.device)[0] != 9 or importlib.util.find_spec("tilelang") is not None:
        return None
    version = importlib.import_module("triton").__version__
    if not WRONG_GATES[0] <= _numbers(version) < WRONG_GATES[1]:
        return None
    return f"fla refuses its gated backward on Hopper with triton {version}, where it is wrong (fla #640)"


def _numbers(version: str) -> tuple[int, ...]:
    """The first three of a version, without what may follow them."""
    parts = version.partition("+")[0].split(".")[:3]
    return tuple(int("".join(digit for digit in part if digit.isdigit()) or 0) for part in parts)


# --- plain --------------------------------------------------------------------------------------------------------


def plain(inputs: Inputs) -> Call:
    """φ(k)vᵀ of every token and its running sum, which holds B · T · H · R · V numbers several times."""
    row = inputs.row
    if row.decay != "none" or row.step:
        raise Absent("a running sum has neither decays nor a state to go on from")
    held = row.B * row.T * row.H * row.features * row.V
    if held > PLAIN_NUMBERS:
        raise Absent(f"it holds a state for every token, {held:,} numbers")
    q, k, v = (inputs.tensors[name] for name in "qkv")
    phi = feature_map(inputs)

    def forward() -> Tensor:
        phi_q, phi_k = phi(q), phi(k)
        states = (phi_k[..., None] * v[..., None, :]).cumsum(1)
        out = row.scale * (phi_q[..., None, :] @ states).squeeze(-2)
        return out / ((phi_q * phi_k.cumsum(1)).sum(-1, keepdim=True) + EPS) if row.normalize else out

    return Call(forward, inputs.leaves)


def feature_map(inputs: Inputs) -> Callable[[Tensor], Tensor]:
    """(B, T, H, D) → the row's features (B, T, H, R) in the same dtype, as torch computes them.

    Those of favor are exponentials, of numbers that are computed in fp32.
    """
    row = inputs.row
    if row.feature_map == "identity":
        return lambda x: x
    if row.feature_map == "elu":
        return lambda x: F.elu(x) + 1
    projection = inputs.tensors["projection"]

    def favor(x: Tensor) -> Tensor:
        wide = x.to(projection.dtype) * row.D**-0.25
        features = (wide @ projection.mT - wide.square().sum(-1, keepdim=True) / 2).exp() * row.R**-0.5
        return features.to(x.dtype)

    return favor
