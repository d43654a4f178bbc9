"""The oracle: projections and all scores in fp32 or better, rounded where a kernel in the same dtype must round."""

from __future__ import annotations

import torch
from torch import Tensor

from attncompiler.mechanisms.linformer.op import OPERATOR, LinformerOptions
from attncompiler.mechanisms.linformer.padding import columns, query_mask
from attncompiler.runtime.implementation import Tensors, from_reference


def linformer(inputs: Tensors, options: LinformerOptions) -> dict[str, Tensor]:
    """q (B, T, H, D), k (B, S, H, D), v (B, S, H, V) → out (B, T, H, V) in q's dtype."""
    q, mask = inputs["q"], inputs.get("attention_mask")
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = _project(inputs["k"], inputs["key_projection"], mask)
    values = _project(inputs["v"], inputs["value_projection"], mask)
    scores = torch.einsum("bthd,bhrd->bhtr", q.to(wide), keys.to(wide)) * q.shape[-1] ** -0.5
    probabilities = scores.softmax(-1).to(q.dtype)
    out = torch.einsum("bhtr,bhrv->bthv", probabilities.to(wide), values.to(wide))
    if mask is not None:
        out = torch.where(query_mask(mask, q.shape[1])[..., None, None], out, 0)
    return {"out": out.to(q.dtype)}


def _project(x: Tensor, projection: Tensor, mask: Tensor | None) -> Tensor:
    """x (B, S, H, ·) → (B, H, R, ·), in x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if mask is not None:
        index, real = columns(mask)
        moved = x.gather(1, index[..., None, None].expand_as(x))
        x = torch.where(real[..., None, None], moved, 0)
    used = projection[..., : x.shape[1]].to(wide)
    letters = "hrs" if projection.dim() == 3 else "rs"
    return torch.einsum(f"{letters},bshd->bhrd", used, x.to(wide)).to(x.dtype)


EAGER = from_reference(linformer, OPERATOR.differentiable)
