"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864) and its forms for longer contexts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attncompiler.blocks.inference import differentiable
from attncompiler.blocks.positions import sequence_lengths
from attncompiler.mechanisms.rope import BETA_FAST, BETA_SLOW, RopeParameters, rotary_width


class Rotary(nn.Module):
    """Turns pairs of a head's channels by position · frequency, the first `partial_rotary_factor` of the channels.

    Pairs are (i, i + width/2) as in HF's Llama, or (2i, 2i + 1) when interleaved, as in GPT-J. Frequencies are HF's for
    each rope_type, see `frequencies` and `attention_factor`. There is no table to grow, to move or to round: angles
    follow from the positions on their device, in fp64 up to whole turns, so that a position of a million is as exact as
    the first.

    `dynamic` has other frequencies for each length beyond the original one (`stretched`). HF takes the longest row of
    the batch for all of it, padding and packed documents included, and in decoding the length so far, so that the keys
    in its cache were turned otherwise than the query is. Here each token has those of its own sequence, whatever else
    is in the batch; in decoding those of the length that the state was made for, as the length to come is not known.
    So a batch of plain sequences of one length is HF's, and decoding with max_length = T is the forward of T tokens.
    """

    def __init__(self, head_dim: int, rope: RopeParameters, max_position_embeddings: int):
        super().__init__()
        self.width = int(rotary_width(rope, head_dim)) // 2 * 2
        self.rope = rope
        self.original = rope.original_max_position_embeddings or max_position_embeddings
        self.factor = attention_factor(rope)
        self.angles = f"{self.width} of {self.original}, {rope.model_dump_json()}"  # equal where all angles are

    def forward(
        self, q: Tensor, k: Tensor, position_ids: Tensor | None = None, state: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """q (B, T, H, D), k (B, T, K, D), position_ids (B or 1, T), default 0 … T−1 → q, k, turned, in their dtypes.

        `state` is the mixer's decode state, with what `init_state` put there.
        """
        if position_ids is None:
            position_ids = torch.arange(q.shape[1], device=q.device)[None]
        cos, sin = self._cos_sin(position_ids, q.dtype, state)
        if self.width == q.shape[-1]:
            return differentiable(_Turn, q, k, cos, sin, self.rope.interleaved)
        q, k, q_rest, k_rest = (x[..., part] for part in (slice(self.width), slice(self.width, None)) for x in (q, k))
        q, k = differentiable(_Turn, q, k, cos, sin, self.rope.interleaved)
        return torch.cat([q, q_rest], -1), torch.cat([k, k_rest], -1)

    def _cos_sin(
        self, position_ids: Tensor, dtype: torch.dtype, state: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Of every signed angle, (B or 1, T, 1, width) in `dtype`.

        Where gradients are off they stay with the positions they are of: each layer of a step asks for the same.
        """
        alone = torch.is_grad_enabled() or torch.compiler.is_compiling() or self.rope.rope_type == "dynamic"
        if alone or position_ids.is_inference():
            return self._made_cos_sin(position_ids, dtype, state)
        key = self.angles, dtype, position_ids._version
        kept = vars(position_ids).setdefault("_cos_sin", {})
        if key not in kept:
            kept[key] = self._made_cos_sin(position_ids, dtype, state)
        found: tuple[Tensor, Tensor] = kept[key]
        return found

    def _made_cos_sin(
        self, position_ids: Tensor, dtype: torch.dtype, state: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        angles = (
            self._turns(position_ids, state)
            .frac_()
            .mul_(math.tau)
            .to(torch.promote_types(dtype, torch.float32))[:, :, None]
        )
        cos, sin = angles.cos(), angles.sin()
        if self.factor != 1:
            cos, sin = cos * self.factor, sin * self.factor
        return cos.to(dtype), sin.to(dtype)

    def init_state(self, batch: int, max_length: int, device: torch.device) -> dict[str, Tensor]:
        """What the mixer's decode state must hold for B sequences of up to `max_length` tokens: for `dynamic` alone
        rope_length (B,), the length that frequencies follow from."""
        if self.rope.rope_type != "dynamic":
            return {}
        return {"rope_length": torch.full((batch,), max_length, dtype=torch.int64, device=device)}

    def _turns(self, position_ids: Tensor, state: Mapping[str, Tensor] | None) -> Tensor:
        """By how many turns each channel is turned, fp64 (B or 1, T, width); of a pair the first is turned back."""
        frequency = frequencies(self.rope, self.width, self.original, position_ids.device)
        if self.rope.rope_type == "dynamic":
            lengths = sequence_lengths(position_ids) if state is None else state["rope_length"][:, None]
            frequency = frequency * stretched(lengths, self.original, self.rope.factor or 1.0, self.width)
        turns = frequency / math.tau
        if self.rope.interleaved:
            turns = torch.stack([-turns, turns], -1).flatten(-2)
        else:
            turns = torch.cat([-turns, turns], -1)
        return position_ids.double()[..., None] * turns

    def extra_repr(self) -> str:
        said = self.rope.model_dump(exclude_defaults=True, exclude={"rope_theta", "partial_rotary_factor"})
        return ", ".join([f"{self.width}, theta={self.rope.rope_theta:g}", *(f"{k}={v}" for k, v in said.items())])


def frequencies(rope: RopeParameters, width: int, original: int, device: torch.device | None = None) -> Tensor:
    """By how many radians a token turns each pair of the `width` rotary channels, fp64 (width/2,).

    θ^(−2i/width), divided by `factor` but for the share that is kept: all of it for default (and for dynamic within the
    original length), none for linear (Chen et al. 2023, https://arxiv.org/abs/2306.15595); for yarn and llama3 more of
    it the more turns the pair makes over the `original` length.
    """
    slowest = (2 / width - 1) * math.log2(rope.rope_theta)
    plain = torch.logspace(0, slowest, width // 2, base=2, dtype=torch.float64, device=device)
    factor = rope.factor or 1.0
    match rope.rope_type:
        case "linear":
            return plain / factor
        case "yarn":
            kept = _kept_by_yarn(rope, width, original, device)
        case "llama3":
            kept = _kept_by_llama3(rope, plain, original)
        case _:
            return plain
    return plain * (kept + (1 - kept) / factor)


def _kept_by_yarn(rope: RopeParameters, width: int, original: int, device: torch.device | None) -> Tensor:
    """Falling along the pairs, from the one that makes beta_fast turns over the original length to that of beta_slow.

    "NTK by parts" of Peng et al. 2023 (https://arxiv.org/abs/2309.00071, section 3.2), in the form of its authors' code
    and HF's: the ramp is linear in the pair's number, between whole numbers unless `truncate` is false, and where it
    would end before it begins, what is kept is what that code makes of it.
    """

    def pair_of(turns: float) -> float:
        # the order of HF's operations too, so that no rounding puts the floor or ceiling elsewhere
        return (width * math.log(original / (turns * 2 * math.pi))) / (2 * math.log(rope.rope_theta))

    low, high = pair_of(rope.beta_fast or BETA_FAST), pair_of(rope.beta_slow or BETA_SLOW)
    if rope.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    pairs = torch.arange(width // 2, dtype=torch.float64, device=device)
    return 1 - ((pairs - low) / (high - low or 0.001)).clamp(0, 1)


def _kept_by_llama3(rope: RopeParameters, plain: Tensor, original: int) -> Tensor:
    """Rising with the turns over the original length, from low_freq_factor to high_freq_factor (Llama 3.1's code)."""
    low, high = rope.low_freq_factor, rope.high_freq_factor
    assert low is not None
    assert high is not None
    return ((plain * (original / math.tau) - low) / (high - low)).clamp(0, 1)


def stretched(lengths: Tensor, original: int, factor: float, width: int) -> Tensor:
    """What frequencies are multiplied with in sequences of these lengths (…): (…, width/2), fp64.

    "Dynamic NTK" (Peng et al. 2023, section 3.3): θ grows by s^(width/(width−2)) with s = factor · length/original −
    (factor − 1), so that the slowest pair is slowed s times and the fastest not at all; within the original length s
    is 1.
    """
    stretch = (factor * (lengths.double() / original - 1) + 1).clamp(min=1)
    pairs = torch.arange(width // 2, dtype=torch.float64, device=lengths.device)
    return torch.pow(stretch[..., None], pairs * (-2 / (width - 2)))


def attention_factor(rope: RopeParameters) -> float:
    """What cosines and sines are multiplied with: 1 but for yarn, whose longer contexts make softmax flatter.

    0.1 ln(factor) + 1 (Peng et al. 2023, section 3.4) unless it is given, with `mscale` times the logarithm, over the
    same with `mscale_all_dim`, where a model has these (DeepSeek-V2's code).
    """
    if rope.rope_type != "yarn" or rope.attention_factor is not None:
        return rope.attention_factor or 1.0
    growth = 0.1 * math.log(rope.factor or 1.0)
    if rope.mscale is not None and rope.mscale_all_dim is not None:
        return (growth * rope.mscale + 1) / (growth * rope.mscale_all_dim + 1)
    return growth + 1


class _Turn(torch.autograd.Function):
    """x · cos + swap(x) · sin of both q and k, where `swap` exchanges the two of each pair.

    Angles are signed: the first of a pair has that of the turn back. A turn's gradient is the turn back, so nothing but
    the angles is kept.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turned(q, cos, sin, interleaved), _turned(k, cos, sin, interleaved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        back = -sin
        return *(_turned(grad, cos, back, ctx.interleaved) for grad in grads), None, None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return torch.addcmul(_swap(x, interleaved).mul_(sin), x, cos)


def _swap(x: Tensor, interleaved: bool) -> Tensor:
    """A copy in which the two of each pair have changed places."""
    if interleaved:
        return x.unflatten(-1, (-1, 2)).roll(1, -1).flatten(-2)
    return x.roll(x.shape[-1] // 2, -1)
