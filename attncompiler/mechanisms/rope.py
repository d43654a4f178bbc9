"""Rotary position embedding as a policy asks for it: its fields, and what of them does not fit together. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import Field

from attncompiler.mechanisms.base import Fault, Length, StrictModel

Positive = Annotated[float, Field(gt=1e-30, lt=1e30)]
"""A positive number whose powers and ratios a float holds."""
Stretch = Annotated[float, Field(ge=1, lt=1e30)]
"""By how much a context is made longer than the one that a model was trained with."""


class RopeParameters(StrictModel, allow_inf_nan=False):
    """Rotary position embedding, with the field names of HF's `rope_parameters`.

    `original_max_position_embeddings` is the length that the model was trained with; where it may be left out it is the
    model's `max_position_embeddings`. `interleaved` pairs neighbouring channels, as GPT-J and Cohere do.
    """

    rope_type: Literal["default", "linear", "dynamic", "yarn", "llama3"] = "default"
    rope_theta: Positive = 10000.0
    factor: Stretch | None = None
    original_max_position_embeddings: Length | None = None
    partial_rotary_factor: float = Field(default=1.0, gt=0, le=1)
    interleaved: bool = False
    attention_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    mscale: Positive | None = None
    mscale_all_dim: Positive | None = None
    truncate: bool | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None


BETA_FAST, BETA_SLOW = 32.0, 1.0
"""yarn's bounds where they are not said: turns over the original length (Peng et al. 2023, section 3.2, for Llama)"""

_YARN = (
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
)
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE_OPTIONS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ("factor",)),
    "dynamic": (("factor",), ("factor", "original_max_position_embeddings")),
    "yarn": (("factor",), _YARN),
    "llama3": (_LLAMA3, _LLAMA3),
}
"""rope_type → the options it needs, and those it takes."""


def rope_faults(rope: RopeParameters | None) -> Iterator[Fault]:
    """Rotary options that their type needs and that are not there, that it does not take, or that contradict."""
    if rope is None:
        return
    needed, taken = ROPE_OPTIONS[rope.rope_type]
    for option in needed:
        if getattr(rope, option) is None:
            yield Fault(("rope_parameters",), f"rope_type {rope.rope_type!r} needs {option!r}", code="E105")
    for option in dict.fromkeys((*_YARN, *_LLAMA3)):
        if getattr(rope, option) is not None and option not in taken:
            message = f"{option!r} means nothing to rope_type {rope.rope_type!r}"
            yield Fault(("rope_parameters", option), message, code="E105", remedy="remove it, or change rope_type")
    if rope.rope_type == "yarn":
        yield from _yarn_faults(rope)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    if rope.rope_type == "llama3" and low is not None and high is not None and low >= high:
        message = f"low_freq_factor {low:g} must be less than high_freq_factor {high:g}"
        yield Fault(("rope_parameters", "low_freq_factor"), message, code="E105")


def _yarn_faults(rope: RopeParameters) -> Iterator[Fault]:
    if rope.rope_theta <= 1:
        message = f"yarn needs frequencies that fall from pair to pair, and with rope_theta {rope.rope_theta:g} none do"
        yield Fault(("rope_parameters", "rope_theta"), message, code="E105", remedy="give a rope_theta above 1")
    fast, slow = rope.beta_fast or BETA_FAST, rope.beta_slow or BETA_SLOW
    if fast < slow:
        place = "beta_fast" if rope.beta_fast is not None else "beta_slow"
        message = f"beta_fast {fast:g} must not be less than beta_slow {slow:g}"
        yield Fault(("rope_parameters", place), message, code="E105")
    scales = [name for name in ("mscale", "mscale_all_dim") if getattr(rope, name) is not None]
    if scales and rope.attention_factor is not None:
        message = f"attention_factor is given, and {scales[0]!r} would say it again"
        yield Fault(("rope_parameters", scales[0]), message, code="E105", remedy="remove one of the two")
    elif len(scales) == 1:
        message = f"{scales[0]!r} means something only with both mscale and mscale_all_dim"
        yield Fault(("rope_parameters", scales[0]), message, code="E105", remedy="give the other too, or neither")


def rotary_width(rope: RopeParameters, head_dim: int) -> float:
    """How many of a head's channels are turned: a whole number where the factor means one, rounding of floats aside."""
    width = head_dim * rope.partial_rotary_factor
    return round(width) if abs(width - round(width)) < 1e-6 else width


def rotary_width_faults(rope: RopeParameters | None, head_dim: int) -> Iterator[Fault]:
    """A rotary part of a head that does not fall into pairs, or into too few of them for its type."""
    if rope is None:
        return
    rotary = rotary_width(rope, head_dim)
    if not rotary or rotary % 2:
        message = f"the rotary part of a head is {rotary:g} wide, and must be a positive even number"
        yield Fault(("rope_parameters",), message, remedy="change head_dim or partial_rotary_factor")
    elif rotary == 2 and rope.rope_type == "dynamic":
        message = "rope_type 'dynamic' stretches the slowest pair and keeps the fastest, and a head has one pair alone"
        yield Fault(("rope_parameters",), message, remedy="change head_dim or partial_rotary_factor")
