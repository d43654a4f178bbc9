"""The oracle: projections and all scores in fp32 or better, rounded where a kernel in the same dtype must round."""

from __future__ import annotations

import torch
from torch import Tensor

from attncompiler.blocks.segments import run_numbers
from attncompiler.mechanisms.linformer.documents import last_queries
from attncompiler.mechanisms.linformer.op import OPERATOR, LinformerOptions
from attncompiler.runtime.implementation import Tensors, from_reference

KEYS = ("k", "v", "attention_mask")


def linformer(inputs: Tensors, options: LinformerOptions) -> dict[str, Tensor]:
    """q (B, T, H, D), k (B, S, H, D), v (B, S, H, V) → out (B, T, H, V) in q's dtype: each document by itself."""
    segment_ids, rows = inputs.get("segment_ids"), inputs["q"].shape[0]
    if segment_ids is None:
        return {"out": _documents(inputs)}
    runs = run_numbers(segment_ids, inputs.get("attention_mask"))
    queries = inputs["k"].shape[1] - inputs["q"].shape[1]
    out = []
    for row in range(rows):
        start = 0
        parts = []
        for length in runs[row].unique_consecutive(return_counts=True)[1].tolist():
            stop = start + length
            if stop > queries:
                keys = {name: inputs[name][row : row + 1, start:stop] for name in KEYS if name in inputs}
                asked = inputs["q"][row : row + 1, max(0, start - queries) : stop - queries]
                parts.append(_documents({**inputs, **keys, "q": asked}))
            start = stop
        out.append(torch.cat(parts, 1))
    return {"out": torch.cat(out)}


def _documents(inputs: Tensors) -> Tensor:
    """One document in each row, padded or not."""
    q, mask = inputs["q"], inputs.get("attention_mask")
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = _project(inputs["k"], inputs["key_projection"], mask)
    values = _project(inputs["v"], inputs["value_projection"], mask)
    scores = torch.einsum("bthd,bhrd->bhtr", q.to(wide), keys.to(wide)) * q.shape[-1] ** -0.5
    probabilities = scores.softmax(-1).to(q.dtype)
    out = torch.einsum("bhtr,bhrv->bthv", probabilities.to(wide), values.to(wide))
    if mask is not None:
        out = torch.where(last_queries(mask, q.shape[1])[..., None, None], out, 0)
    return out.to(q.dtype)


def _project(x: Tensor, projection: Tensor, mask: Tensor | None) -> Tensor:
    """x (B, S, H, ·) → (B, H, R, ·), in x's dtype. Column j meets the first real token's j-th successor."""
    wide = torch.promote_types(x.dtype, torch.float32)
    used = projection[..., : x.shape[1]].to(wide)
    letters = "hrs" if projection.dim() == 3 else "rs"
    if mask is not None:
        shifted = torch.arange(x.shape[1], device=x.device) - mask.int().argmax(1, keepdim=True)
        used = used[..., shifted.clamp(0, used.shape[-1] - 1)] * mask
        used = used.movedim(-2, 0)
        letters = "b" + letters
        x = torch.where(mask[..., None, None], x, 0)
    return torch.einsum(f"{letters},bshd->bhrd", used, x.to(wide)).to(x.dtype)


EAGER = from_reference(linformer, OPERATOR.differentiable)
