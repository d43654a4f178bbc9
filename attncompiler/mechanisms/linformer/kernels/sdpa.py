"""Keys and values projected by one matrix product each, then torch's fused attention for the CPU.

The backward projects again, rather than keep what the inputs give, and sums the projections' gradients in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attncompiler.mechanisms.linformer.op import LinformerOptions
from attncompiler.mechanisms.linformer.padding import columns, query_mask
from attncompiler.runtime.implementation import Implementation, Tensors

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(inputs: Tensors, options: LinformerOptions) -> dict[str, Tensor]:
    """q, k, v (B, ·, H, D) → out (B, T, H, D) and lse (B, H, T)."""
    q, mask = inputs["q"], inputs.get("attention_mask")
    keys = _project(_moved(inputs["k"], mask), inputs["key_projection"])
    values = _project(_moved(inputs["v"], mask), inputs["value_projection"])
    out, lse = _attend(_heads_first(q), keys, values)
    out = out.transpose(1, 2).contiguous()
    if mask is not None:
        out.mul_(query_mask(mask, q.shape[1])[..., None, None])
    return {"out": out, "lse": lse.contiguous()}


def backward(grads: Tensors, inputs: Tensors, outputs: Tensors, options: LinformerOptions) -> dict[str, Tensor]:
    """Gradients of q, k, v and of both projections; columns that were not read have 0."""
    q, mask = inputs["q"], inputs.get("attention_mask")
    grad = grads["out"]
    if mask is not None:
        grad = grad * query_mask(mask, q.shape[1])[..., None, None]
    k, v = _moved(inputs["k"], mask), _moved(inputs["v"], mask)
    keys, values = _project(k, inputs["key_projection"]), _project(v, inputs["value_projection"])
    dq, dkeys, dvalues = _attend_backward(
        _heads_first(grad),
        _heads_first(q),
        keys,
        values,
        _heads_first(outputs["out"]),
        outputs["lse"],
        0.0,
        False,
    )
    dk, dkey_projection = _project_backward(dkeys, k, inputs["key_projection"])
    dv, dvalue_projection = _project_backward(dvalues, v, inputs["value_projection"])
    return {
        "q": dq.transpose(1, 2).contiguous(),
        "k": _moved_back(dk, mask),
        "v": _moved_back(dv, mask),
        "key_projection": dkey_projection,
        "value_projection": dvalue_projection,
    }


KERNEL = Implementation(forward, backward)


def _heads_first(x: Tensor) -> Tensor:
    """(B, T, H, D) → (B, H, T, D), a view; torch's kernel reads rows of D as contiguous without a check."""
    return (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _moved(x: Tensor, mask: Tensor | None) -> Tensor:
    """x (B, S, H, D) with the first real token at column 0, and zeros on padding."""
    if mask is None:
        return x
    index, real = columns(mask)
    return x.gather(1, index[..., None, None].expand_as(x)).mul_(real[..., None, None])


def _moved_back(grad: Tensor, mask: Tensor | None) -> Tensor:
    """The gradient behind `_moved`."""
    if mask is None:
        return grad
    index, real = columns(mask)
    # columns beyond the last token share its index, and add 0 to it
    return torch.zeros_like(grad).scatter_add_(
        1, index[..., None, None].expand_as(grad), grad.mul_(real[..., None, None])
    )


def _project(x: Tensor, projection: Tensor) -> Tensor:
    """x (B, S, H, D), projection ([H,] R, P) → (B, H, R, D) in x's dtype."""
    B, S, H, D = x.shape
    used = _wide(projection[..., :S])
    if projection.dim() == 3:
        return (used @ _wide(x).transpose(1, 2)).to(x.dtype)
    return (used @ _wide(x).reshape(B, S, H * D)).to(x.dtype).unflatten(-1, (H, D)).transpose(1, 2)


def _project_backward(grad: Tensor, x: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    """grad (B, H, R, D) → the gradients of x (B, S, H, D) and of the projection, in their dtypes."""
    B, S, H, D = x.shape
    grad, used, values = _wide(grad), _wide(projection[..., :S]), _wide(x)
    into = torch.zeros_like(projection, memory_format=torch.contiguous_format)
    if projection.dim() == 3:
        dx = (used.mT @ grad).transpose(1, 2).contiguous()
        into[..., :S] = torch.einsum("bhrd,bshd->hrs", grad, values)
    else:
        flat = grad.transpose(1, 2).reshape(B, -1, H * D)
        dx = (used.mT @ flat).unflatten(-1, (H, D))
        into[..., :S] = torch.einsum("brm,bsm->rs", flat, values.reshape(B, S, H * D))
    return dx.to(x.dtype), into
