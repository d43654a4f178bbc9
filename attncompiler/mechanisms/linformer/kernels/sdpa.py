"""Keys and values projected by one matrix product each, then torch's fused attention.

The backward projects again, and takes the softmax's gradient from the probabilities themselves, made again for some
queries at a time: by way of the output, as fused backwards do, rounding would be multiplied by the keys' size once
more in the gradient of the projection.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attncompiler.blocks.underflow import flush_
from attncompiler.mechanisms.linformer.cost import SCORES
from attncompiler.mechanisms.linformer.op import LinformerOptions
from attncompiler.mechanisms.linformer.padding import columns, query_mask
from attncompiler.runtime.implementation import Implementation, Tensors


def forward(inputs: Tensors, options: LinformerOptions) -> dict[str, Tensor]:
    """q (B, T, H, D), k (B, S, H, D), v (B, S, H, V) → out (B, T, H, V)."""
    q, mask = inputs["q"], inputs.get("attention_mask")
    keys = _project(_moved(inputs["k"], mask), inputs["key_projection"])
    values = _project(_moved(inputs["v"], mask), inputs["value_projection"])
    # torch's kernel for CPUs reads rows of D as contiguous without a check
    q = q if q.stride(-1) == 1 else q.contiguous()
    out = scaled_dot_product_attention(q.transpose(1, 2), keys, values).transpose(1, 2).contiguous()
    if mask is not None:
        out.masked_fill_(~query_mask(mask, q.shape[1])[..., None, None], 0)
    return {"out": out}


def backward(grads: Tensors, inputs: Tensors, outputs: Tensors, options: LinformerOptions) -> dict[str, Tensor]:
    """Gradients of q, k, v and of both projections; columns that were not read have 0."""
    mask = inputs.get("attention_mask")
    k, v = _moved(inputs["k"], mask), _moved(inputs["v"], mask)
    keys, values = _project(k, inputs["key_projection"]), _project(v, inputs["value_projection"])
    dq, dkeys, dvalues = _attend_backward(grads["out"], inputs["q"], _wide(keys), _wide(values), mask)
    dk, dkey_projection = _project_backward(dkeys, k, inputs["key_projection"])
    dv, dvalue_projection = _project_backward(dvalues, v, inputs["value_projection"])
    return {
        "q": dq,
        "k": _moved_back(dk, mask),
        "v": _moved_back(dv, mask),
        "key_projection": dkey_projection,
        "value_projection": dvalue_projection,
    }


def _attend_backward(
    grad: Tensor, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """grad (B, T, H, V), q (B, T, H, D) → dq in q's dtype; keys (B, H, R, D), values (B, H, R, V) → theirs, wide."""
    B, T, H, D = q.shape
    scale = D**-0.5
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
    rows = max(1, SCORES // (B * H * keys.shape[2]))
    for start in range(0, T, rows):
        part = slice(start, start + rows)
        q_part, grad_part = _wide(q[:, part]).transpose(1, 2), _wide(grad[:, part]).transpose(1, 2)
        if mask is not None:
            grad_part = grad_part * query_mask(mask, T)[:, None, part, None]
        probabilities = flush_((q_part @ keys.mT).mul_(scale).softmax(-1))
        dvalues += probabilities.mT @ grad_part
        dprobabilities = grad_part @ values.mT
        dscores = torch._softmax_backward_data(dprobabilities, probabilities, -1, probabilities.dtype).mul_(scale)
        dq[:, part] = (dscores @ keys).transpose(1, 2)
        dkeys += dscores.mT @ q_part
    return dq, dkeys, dvalues


KERNEL = Implementation(forward, backward)


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
