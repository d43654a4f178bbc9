"""The short causal convolution in front of a state space mixer."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attncompiler.blocks.segments import run_numbers


class CausalConv1d(nn.Module):
    """silu(bias + Σ_d weight[:, 0, W−1−d] · x[t − d]), each channel by itself, over the real tokens of one document.

    weight (E, 1, W) and bias (E,) as in torch's depthwise Conv1d. The decode state (B, E, W−1) holds the inputs of the
    last real tokens, oldest first, zeros before the first.
    """

    def __init__(self, channels: int, width: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    @property
    def width(self) -> int:
        return self.weight.shape[-1]

    def initial_value(self, name: str, generator: torch.Generator) -> Tensor:
        """Uniform within ±1/√W, torch's own scheme for a depthwise convolution."""
        shape = self.weight.shape if name == "weight" else self.weight.shape[:1]
        return torch.empty(shape).uniform_(-1 / math.sqrt(self.width), 1 / math.sqrt(self.width), generator=generator)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        state: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, T, E), attention_mask and segment_ids (B, T) → (B, T, E), and the new (B, E, W−1) where there is a state.

        `state` is the layer's decode state, with the convolution's part under "conv". Padding gives 0 to every tap that meets it. Without a state it may stand on either side; with one, anywhere.
        """
        weight, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        mask = None if attention_mask is None else attention_mask != 0
        if state is not None:
            return self._step(x, weight, bias, mask, state["conv"])
        if mask is not None:
            x = x * mask[..., None]
        runs = None if segment_ids is None else run_numbers(segment_ids, mask)
        return _causal_conv_silu(x, weight, bias, runs), None

    def _step(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        kept = self.width - 1
        before = state.transpose(1, 2).to(x.dtype)
        if mask is None:
            extended = torch.cat([before, x], 1)
            last = extended[:, extended.shape[1] - kept :].transpose(1, 2)
            return _causal_conv_silu(extended, weight, bias, None)[:, kept:].contiguous(), last.to(state.dtype).contiguous()
        # real tokens first, so that no tap meets padding; then everything back to its place
        order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
        gathered = x.gather(1, order[..., None].expand_as(x))
        extended = torch.cat([before, gathered], 1)
        out = _causal_conv_silu(extended, weight, bias, None)[:, kept:]
        index = mask.sum(1, keepdim=True) + torch.arange(kept, device=x.device)
        last = extended.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
        restored = out.gather(1, order.argsort(1)[..., None].expand_as(out)) * mask[..., None]
        return restored, last.transpose(1, 2).to(state.dtype).contiguous()

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, width={self.width}, bias={self.bias is not None}, silu"


def _causal_conv_silu(x: Tensor, weight: Tensor, bias: Tensor | None, runs: Tensor | None) -> Tensor:
    out: Tensor = _CausalConvSilu.apply(x, weight, bias, runs)
    return out


def _shifted(x: Tensor, distance: int, runs: Tensor | None) -> Tensor:
    """x[t − distance] for t ≥ distance, 0 where that token is of another document."""
    earlier = x[:, : x.shape[1] - distance]
    if runs is None:
        return earlier
    return earlier * (runs[:, distance:] == runs[:, : runs.shape[1] - distance])[..., None]


class _CausalConvSilu(torch.autograd.Function):
    """As many multiply-adds of the whole tensor as the kernel is wide: several times torch's depthwise Conv1d here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, runs: Tensor | None) -> Tensor:
        taps = weight[:, 0].unbind(-1)
        before = x * taps[-1] if bias is None else torch.addcmul(bias, x, taps[-1])
        for distance in range(1, min(len(taps), x.shape[1])):
            before[:, distance:].addcmul_(_shifted(x, distance, runs), taps[-1 - distance])
        ctx.save_for_backward(x, weight, before, runs)
        ctx.has_bias = bias is not None
        return F.silu(before)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, weight, before, runs = ctx.saved_tensors
        taps = weight[:, 0].unbind(-1)
        d_before = torch.ops.aten.silu_backward(grad, before)
        d_x = d_before * taps[-1]
        wide = torch.promote_types(x.dtype, torch.float32)
        d_taps = [torch.zeros(x.shape[-1], device=x.device, dtype=wide) for _ in taps]
        d_taps[-1] = (d_before * x).sum((0, 1), dtype=wide)
        for distance in range(1, min(len(taps), x.shape[1])):
            later = d_before[:, distance:]
            if runs is not None:
                later = later * (runs[:, distance:] == runs[:, : runs.shape[1] - distance])[..., None]
            d_x[:, : x.shape[1] - distance].addcmul_(later, taps[-1 - distance])
            d_taps[-1 - distance] = (later * x[:, : x.shape[1] - distance]).sum((0, 1), dtype=wide)
        d_weight = torch.stack(d_taps, -1)[:, None].to(weight.dtype)
        return d_x, d_weight, d_before.sum((0, 1), dtype=wide).to(weight.dtype) if ctx.has_bias else None, None
