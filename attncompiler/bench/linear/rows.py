"""What is measured, as data. Nothing here imports torch.

Symbols: B sequences, T tokens, H heads, D width of queries and keys, V of values, R features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from attncompiler.bench.grid.operands import Operands, Shape, TimedRow

WIDE = frozenset({"projection", "log_decay", "initial_s", "initial_z", "initial_m"})
STATES = frozenset({"initial_s", "initial_z"})


@dataclass(frozen=True)
class Row(TimedRow):
    """One row: a causal call of linear attention; one token is a decoding step from a state.

    Without a normaliser φ is the identity, and out is scaled by D^-½, as fla does unless told otherwise.
    """

    H: int = 16
    D: int = 128
    V: int = 128
    feature_map: Literal["elu", "identity", "favor"] = "elu"
    R: int = 0
    """random features, of favor"""
    decay: Literal["none", "retention", "scalar"] = "none"

    @property
    def normalize(self) -> bool:
        return self.feature_map != "identity"

    @property
    def scale(self) -> float:
        return 1.0 if self.normalize else self.D**-0.5

    @property
    def features(self) -> int:
        """R: the number of features of a query or key."""
        return self.R or self.D

    @property
    def options(self) -> dict[str, Any]:
        """The operator's."""
        return {"feature_map": self.feature_map, "normalize": self.normalize, "scale": self.scale}

    @property
    def operands(self) -> Operands:
        heads = (self.B, self.T, self.H)
        given: dict[str, Shape] = {"q": (*heads, self.D), "k": (*heads, self.D), "v": (*heads, self.V)}
        constant = {"projection", "initial_m"}
        if self.feature_map == "favor":
            given["projection"] = (self.R, self.D)
        if self.decay == "scalar":
            given["log_decay"] = heads
        if self.decay == "retention":
            given["log_decay"] = (self.H,)
            constant.add("log_decay")
        if self.step:
            state = (self.B, self.H)
            given |= {"initial_s": (*state, self.features, self.V), "initial_z": (*state, self.features)}
            given["initial_m"] = state
        states = STATES if self.step else frozenset()
        return Operands(given, (*heads, self.V), WIDE, frozenset(constant), states)


LONG = ((8, 2048), (1, 16384), (1, 131072))


def _shapes(group: str, sizes: tuple[tuple[int, int], ...], **more: Any) -> tuple[Row, ...]:
    return tuple(Row(group, f"b{B}-t{T}", B=B, T=T, **more) for B, T in sizes)


def _equal_states(T: int, R: int, **more: Any) -> tuple[Row, ...]:
    """The Performer, and the Linear Transformer with as many numbers in its state."""
    return (
        Row("favor", f"favor{R}-t{T}", T=T, feature_map="favor", R=R, **more),
        Row("favor", f"elu-r{R}-t{T}", T=T, **{**more, "D": R}),
    )


def _lengths(tokens: int, lengths: tuple[int, ...], **more: Any) -> tuple[Row, ...]:
    """The same number of tokens as sequences of several lengths: a device is as busy with all."""
    return tuple(
        Row("length", f"b{tokens // T}-t{T}", B=tokens // T, T=T, feature_map="identity", **more) for T in lengths
    )


CUDA: tuple[Row, ...] = (
    *_shapes("elu", LONG),
    *_shapes("raw", LONG, feature_map="identity"),
    *_equal_states(131072, 256),
    *_shapes("retention", LONG, feature_map="identity", decay="retention"),
    *_shapes("scalar", LONG, feature_map="identity", decay="scalar"),
    Row("decode", "elu-b64", T=1, B=64),
    Row("decode", "raw-b64", T=1, B=64, feature_map="identity"),
    Row("decode", "scalar-b64", T=1, B=64, feature_map="identity", decay="scalar"),
    # last, so that a device that is lost in the longest row has done the others
    *_lengths(2**20, (2048, 16384, 131072, 2**20)),
)

_SMALL: dict[str, Any] = {"H": 8, "D": 64, "V": 64}

CPU: tuple[Row, ...] = (
    *_shapes("elu", ((1, 512), (1, 2048)), **_SMALL),
    *_shapes("raw", ((1, 512),), **_SMALL, feature_map="identity"),
    *_equal_states(2048, 128, **_SMALL),
    *_shapes("retention", ((1, 512),), **_SMALL, feature_map="identity", decay="retention"),
    *_shapes("scalar", ((1, 512),), **_SMALL, feature_map="identity", decay="scalar"),
    Row("decode", "elu-b4", T=1, B=4, **_SMALL),
    Row("decode", "raw-b4", T=1, B=4, **_SMALL, feature_map="identity"),
    Row("decode", "scalar-b4", T=1, B=4, **_SMALL, feature_map="identity", decay="scalar"),
    *_lengths(8192, (512, 2048, 8192), **_SMALL),
)
