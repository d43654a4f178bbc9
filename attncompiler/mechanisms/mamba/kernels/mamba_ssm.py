"""mamba-ssm's selective scan in CUDA (Gu & Dao 2023), through its extension `selective_scan_cuda`, and its update of a
state in Triton, for one token behind an initial state.

It takes channels first, (B, E, T), so tokens are turned on the way in and out. Its states are fp32 throughout. What it
keeps for its backward, the states at the ends of its chunks, is made again by its forward.

Its backward takes no gradient of the final state. Where there is one, N tokens more read that state: they step by 0,
which neither decays nor writes, and the n-th has C = e_n, so that it gives the n-th number of each channel's state.
A step of 0 cannot be said through a bias, so the steps are then made here, and all is fp32.

Its update of a state has no backward, and reads D and the bias whether they are there or not: it is given zeros. Groups
are its heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attncompiler.mechanisms.mamba.op import MambaOptions
from attncompiler.runtime.implementation import Implementation, Tensors


def forward(inputs: Tensors, options: MambaOptions) -> dict[str, Tensor]:
    """out (B, T, E) in u's dtype and final_state (B, E, N) in fp32."""
    with torch.cuda.device_of(inputs["u"]):
        return _step(inputs, options) if "initial_state" in inputs else _scan(inputs, options)


def backward(grads: Tensors, inputs: Tensors, outputs: Tensors, options: MambaOptions) -> dict[str, Tensor]:
    """The gradient of every differentiable input that is present."""
    import selective_scan_cuda

    with torch.cuda.device_of(inputs["u"]):
        if "final_state" in grads:
            return _with_final_state(grads, inputs, options)
        turned, softplus = _turned(inputs), options.dt_softplus
        read, states, *_ = selective_scan_cuda.fwd(*turned, softplus)
        above = _first(grads["out"])
        kept = read if "z" in inputs else None
        du, ddt, da, db, dc, dd, dbias, *dz = selective_scan_cuda.bwd(
            *turned, above, states, kept, None, softplus, False
        )
    found = {"u": du, "dt": ddt, "b": db, "c": dc, "z": dz[0] if dz else None}
    named = {name: _back(found[name]) for name in found if name in inputs}
    return named | {name: grad for name, grad in (("a", da), ("d", dd), ("dt_bias", dbias)) if name in inputs}


KERNEL = Implementation(forward, backward)


def _with_final_state(grads: Tensors, inputs: Tensors, options: MambaOptions) -> dict[str, Tensor]:
    """The same where the final state has a gradient: the gate and the time steps are computed here, in fp32."""
    import selective_scan_cuda

    u, raw, b, c = (inputs[name].float() for name in ("u", "dt", "b", "c"))
    (_, T, _), (G, N) = u.shape, b.shape[2:]
    raw = raw + inputs["dt_bias"] if "dt_bias" in inputs else raw
    delta = F.softplus(raw, threshold=40) if options.dt_softplus else raw
    reading = torch.eye(N, device=u.device)[None, :, None].expand(u.shape[0], N, G, N)
    longer = {"u": F.pad(u, (0, 0, 0, N)), "dt": F.pad(delta, (0, 0, 0, N)), "b": F.pad(b, (0, 0, 0, 0, 0, N))}
    longer |= {"c": torch.cat([c, reading], 1)} | {name: inputs[name] for name in ("a", "d") if name in inputs}
    turned = _turned(longer)
    read, states, *_ = selective_scan_cuda.fwd(*turned, False)

    d_out = grads["out"].float() if "out" in grads else torch.zeros_like(u)
    named = {}
    if "z" in inputs:
        z = inputs["z"].float()
        sigmoid = torch.sigmoid(z)
        named["z"] = d_out * _back(read)[:, :T] * sigmoid * (1 + z * (1 - sigmoid))
        d_out = d_out * z * sigmoid
    above = _first(torch.cat([d_out, grads["final_state"].transpose(1, 2)], 1))
    du, ddelta, da, db, dc, dd, *_ = selective_scan_cuda.bwd(*turned, above, states, None, None, False, False)
    named |= {name: _back(grad)[:, :T] for name, grad in (("u", du), ("dt", ddelta), ("b", db), ("c", dc))}
    if options.dt_softplus:
        named["dt"] = named["dt"] * torch.sigmoid(raw)
    if "dt_bias" in inputs:
        named["dt_bias"] = named["dt"].sum((0, 1))
    named |= {name: grad for name, grad in (("a", da), ("d", dd)) if name in inputs}
    return {name: grad.to(inputs[name].dtype).contiguous() for name, grad in named.items()}


def _scan(inputs: Tensors, options: MambaOptions) -> dict[str, Tensor]:
    """A whole sequence, from its beginning."""
    import selective_scan_cuda

    read, states, *gated = selective_scan_cuda.fwd(*_turned(inputs), options.dt_softplus)
    out = gated[0] if gated else read
    return {"out": out.transpose(1, 2).contiguous(), "final_state": _last(states)}


def _step(inputs: Tensors, options: MambaOptions) -> dict[str, Tensor]:
    """One token."""
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    u, (G, N) = inputs["u"], inputs["b"].shape[2:]
    nothing = torch.zeros(u.shape[2], dtype=torch.float32, device=u.device)
    state = inputs["initial_state"].clone(memory_format=torch.contiguous_format)
    out = selective_state_update(
        state.view(-1, G, u.shape[2] // G, N),
        u[:, 0].unflatten(1, (G, -1)),
        inputs["dt"][:, 0].unflatten(1, (G, -1)),
        inputs["a"].unflatten(0, (G, -1)),
        inputs["b"][:, 0],
        inputs["c"][:, 0],
        D=inputs.get("d", nothing).unflatten(0, (G, -1)),
        z=inputs["z"][:, 0].unflatten(1, (G, -1)) if "z" in inputs else None,
        dt_bias=inputs.get("dt_bias", nothing).unflatten(0, (G, -1)),
        dt_softplus=options.dt_softplus,
    )
    return {"out": out.reshape(u.shape), "final_state": state}


def _turned(inputs: Tensors) -> tuple[Tensor | None, ...]:
    """What its forward takes: u, dt, A, B, C, D, z and the bias, tokens last."""
    u, dt, b, c = (_first(inputs[name]) for name in ("u", "dt", "b", "c"))
    z = _first(inputs["z"]) if "z" in inputs else None
    d, bias = (inputs[name].contiguous() if name in inputs else None for name in ("d", "dt_bias"))
    return u, dt, inputs["a"].contiguous(), b, c, d, z, bias


def _first(tensor: Tensor) -> Tensor:
    """(B, T, …) → (B, …, T)."""
    return tensor.movedim(1, -1).contiguous()


def _back(tensor: Tensor) -> Tensor:
    """(B, …, T) → (B, T, …)."""
    return tensor.movedim(-1, 1).contiguous()


def _last(states: Tensor) -> Tensor:
    """The state at the end of the last chunk, of (B, E, chunks, 2 · N): what a chunk multiplies by, and its state."""
    return states[:, :, -1, 1::2].contiguous()
