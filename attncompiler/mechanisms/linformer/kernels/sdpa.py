"""Keys and values projected by one matrix product each, then torch's fused attention.

The backward projects again, and takes the softmax's gradient from the probabilities themselves, made again for some
queries at a time: by way of the output, as fused backwards do, rounding would be multiplied by the keys' size once
more in the gradient of the projection.

Padded and packed rows are taken apart into documents first, which stand at the projections' first column.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from attncompiler.blocks.underflow import flush_
from attncompiler.mechanisms.linformer.cost import SCORES
from attncompiler.mechanisms.linformer.documents import documents, last_queries
from attncompiler.mechanisms.linformer.op import LinformerOptions
from attncompiler.runtime.implementation import Implementation, Tensors


def forward(inputs: Tensors, options: LinformerOptions) -> dict[str, Tensor]:
    """q (B, T, H, D), k (B, S, H, D), v (B, S, H, V) → out (B, T, H, V)."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    parts = documents(inputs.get("segment_ids"), inputs.get("attention_mask"))
    if parts is None:
        return {"out": _attend(q, k, v, inputs)}
    out = torch.zeros_like(v, memory_format=torch.contiguous_format)
    q = _beside_keys(q, k)
    for part in parts:
        part.add_to(out, _attend(part.taken(q), part.taken(k), part.taken(v), inputs))
    return {"out": _of_queries(out, inputs["q"].shape[1])}


def _attend(q: Tensor, k: Tensor, v: Tensor, inputs: Tensors) -> Tensor:
    keys, values = _project(k, inputs["key_projection"]), _project(v, inputs["value_projection"])
    # torch's kernel for CPUs reads rows of D as contiguous without a check
    q = q if q.stride(-1) == 1 else q.contiguous()
    return scaled_dot_product_attention(q.transpose(1, 2), keys, values).transpose(1, 2).contiguous()


def backward(grads: Tensors, inputs: Tensors, outputs: Tensors, options: LinformerOptions) -> dict[str, Tensor]:
    """Gradients of q, k, v and of both projections; columns that were not read have 0."""
    grad, q, k, v = grads["out"], inputs["q"], inputs["k"], inputs["v"]
    # of every document, summed in fp32 or better
    projections = {name: torch.zeros_like(_wide(inputs[name])) for name in ("key_projection", "value_projection")}
    parts = documents(inputs.get("segment_ids"), inputs.get("attention_mask"))
    if parts is None:
        dq, dk, dv = _attend_backward(grad, q, k, v, inputs, projections)
    else:
        T, grad, q = q.shape[1], _beside_keys(grad, v), _beside_keys(q, k)
        dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        for part in parts:
            taken = (part.taken(grad), part.taken(q), part.taken(k), part.taken(v))
            for into, rows in zip((dq, dk, dv), _attend_backward(*taken, inputs, projections), strict=True):
                part.add_to(into, rows)
        dq = _of_queries(dq, T)
    summed = {name: dprojection.to(inputs[name].dtype) for name, dprojection in projections.items()}
    return {"q": dq, "k": dk, "v": dv, **summed}


def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, inputs: Tensors, projections: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q (B, T, H, D), k (B, S, H, D), v (B, S, H, V) for grad (B, T, H, V); adds to those of the
    projections."""
    names = ("key_projection", "value_projection")
    keys, values = (_project(x, inputs[name]) for x, name in zip((k, v), names, strict=True))
    dq, dkeys, dvalues = _meet_backward(grad, q, _wide(keys), _wide(values))
    dk, dv = (
        _project_backward(rows, x, inputs[name], projections[name])
        for rows, x, name in zip((dkeys, dvalues), (k, v), names, strict=True)
    )
    return dq, dk, dv


def _meet_backward(grad: Tensor, q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """grad (B, T, H, V), q (B, T, H, D) → dq in q's dtype; keys (B, H, R, D), values (B, H, R, V) → theirs, wide."""
    B, T, H, D = q.shape
    scale = D**-0.5
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
    rows = max(1, SCORES // (B * H * keys.shape[2]))
    for start in range(0, T, rows):
        part = slice(start, start + rows)
        q_part, grad_part = _wide(q[:, part]).transpose(1, 2), _wide(grad[:, part]).transpose(1, 2)
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


def _beside_keys(x: Tensor, keys: Tensor) -> Tensor:
    """x (B, T, H, ·) behind S − T rows of zeros: the last query stands at the last key."""
    return pad(x, (0, 0, 0, 0, keys.shape[1] - x.shape[1], 0))


def _of_queries(x: Tensor, queries: int) -> Tensor:
    """What `_beside_keys` put behind zeros, in memory of its own."""
    if x.shape[1] == queries:
        return x
    return last_queries(x, queries).clone(memory_format=torch.contiguous_format)


def _project(x: Tensor, projection: Tensor) -> Tensor:
    """x (B, S, H, D), projection ([H,] R, P) → (B, H, R, D) in x's dtype."""
    B, S, H, D = x.shape
    used = _wide(projection[..., :S])
    if projection.dim() == 3:
        return (used @ _wide(x).transpose(1, 2)).to(x.dtype)
    return (used @ _wide(x).reshape(B, S, H * D)).to(x.dtype).unflatten(-1, (H, D)).transpose(1, 2)


def _project_backward(grad: Tensor, x: Tensor, projection: Tensor, into: Tensor) -> Tensor:
    """grad (B, H, R, D) → the gradient of x (B, S, H, D), in its dtype; adds the projection's to `into`, wide."""
    B, S, H, D = x.shape
    grad, used, values = _wide(grad), _wide(projection[..., :S]), _wide(x)
    if projection.dim() == 3:
        dx = (used.mT @ grad).transpose(1, 2).contiguous()
        into[..., :S] += torch.einsum("bhrd,bshd->hrs", grad, values)
    else:
        flat = grad.transpose(1, 2).reshape(B, -1, H * D)
        dx = (used.mT @ flat).unflatten(-1, (H, D))
        into[..., :S] += torch.einsum("brm,bsm->rs", flat, values.reshape(B, S, H * D))
    return dx.to(x.dtype)
