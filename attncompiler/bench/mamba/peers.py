"""The peers: mamba-ssm, Mamba's scan in CUDA and Mamba-2's passes in Triton, on a GPU; and HF's mixers of both.

mamba-ssm's scan takes channels first, (B, E, T), and is given contiguous tensors of that layout; what it would take to
turn those of a model's projections is in HF's mixers alone. These run mamba-ssm's kernels, and causal-conv1d's where
that is installed; in torch alone they are slow, and a peer on a CPU alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import math

import torch
from torch import Tensor

from attncompiler.bench.grid.contestants import Absent, Call, Contestant
from attncompiler.bench.grid.drawn import on_gpu
from attncompiler.bench.mamba.contestants import EPS, taken
from attncompiler.bench.mamba.inputs import Inputs
from attncompiler.bench.mamba.rows import DualityMixer, Mixer

CHUNK = 256
"""mamba-ssm's default"""
OFFSETS = 2**31
"""elements that its passes in Triton can tell apart"""


def peers(device_type: str) -> tuple[Contestant, ...]:
    """mamba-ssm, and HF's mixer by a name that says what it runs on; each says why where it does not run."""
    if device_type == "cpu":
        name = "hf-slow"
    else:
        name = "hf" if installed("causal_conv1d") else "hf-torch-conv1d"
    return (Contestant("mamba_ssm", "peer", mamba_ssm), Contestant(name, "peer", hf))


def installed(module: str) -> bool:
    """Whether it can be found."""
    return importlib.util.find_spec(module) is not None


def mamba_ssm(inputs: Inputs) -> Call:
    """Its kernel for the row: `selective_scan_fn`, `mamba_chunk_scan_combined`, or for a step its update of a state."""
    if isinstance(inputs.row, Mixer):
        raise Absent("its kernels are measured in HF's mixer there")
    there(inputs)
    scan = inputs.row.mechanism == "mamba"
    if inputs.row.step:
        return scan_step(inputs) if scan else duality_step(inputs)
    return scan_call(inputs) if scan else duality_call(inputs)


def there(inputs: Inputs) -> None:
    """Raises Absent where it cannot run."""
    if not installed("mamba_ssm"):
        raise Absent("mamba-ssm is not installed: pip install mamba-ssm --no-build-isolation")
    if not on_gpu(inputs):
        raise Absent("its kernels run on a GPU alone")


def hf(inputs: Inputs) -> Call:
    """transformers' mixer on the row's parameters.

    Where causal-conv1d is installed too, its training form, which is one function of mamba-ssm; otherwise torch's
    convolution and mamba-ssm's scan. On a CPU all is torch: Mamba's scan is a loop over the tokens.
    """
    row = inputs.row
    if not isinstance(row, Mixer):
        raise Absent("it is measured as a whole mixer")
    if not installed("transformers"):
        raise Absent("transformers is not installed: pip install 'attncompiler[hf]'")
    if on_gpu(inputs):
        there(inputs)
        if row.mechanism == "mamba":
            scan_in_cuda()
    elif installed("mamba_ssm"):
        raise Absent("where mamba-ssm is installed it runs its kernels, on a GPU alone")
    importlib.import_module("transformers").logging.set_verbosity_error()
    kind = "Mamba2" if isinstance(row, DualityMixer) else "Mamba"
    module = importlib.import_module(f"transformers.models.{kind.lower()}.modeling_{kind.lower()}")
    sizes = {"hidden_size": row.M, "num_hidden_layers": 1, "layer_norm_epsilon": EPS, "state_size": row.N}
    if isinstance(row, DualityMixer):
        sizes |= {"num_heads": row.H, "head_dim": row.P, "n_groups": 1, "chunk_size": CHUNK}
    with torch.device("meta"):
        layer = getattr(module, f"{kind}Mixer")(getattr(module, f"{kind}Config")(**sizes), 0)
    hidden, *parameters = taken(inputs, layer.train(installed("causal_conv1d")))
    return Call(lambda: layer(hidden), (hidden, *parameters))


def scan_in_cuda() -> None:
    """Raises Absent where mamba-ssm has no scan."""
    if not installed("selective_scan_cuda"):
        raise Absent("mamba-ssm is installed without its scan in CUDA: build it with MAMBA_KEEP_CUDA_BUILD=TRUE")


def scan_call(inputs: Inputs) -> Call:
    """Mamba's scan, on leaves (B, E, T), B and C (B, G, N, T)."""
    scan_in_cuda()
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
