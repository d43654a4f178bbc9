"""What is measured, as data. Nothing here imports torch.

Symbols: B sequences, T tokens, M hidden size, E = 2·M channels, N state size, H heads, P their width, G groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from attncompiler.bench.grid.operands import Operands, Shape, TimedRow

WIDE = frozenset({"a", "d", "dt_bias", "initial_state", "A_log", "D", "dt_proj.bias"})
STATES = frozenset({"initial_state"})
TAPS = 4
"""of a mixer's convolution"""


@dataclass(frozen=True)
class Row(TimedRow):
    """One row: a call of Mamba's scan or of Mamba-2, or of a whole mixer; one token is a decoding step from a state."""

    N: int = 16

    @property
    def mechanism(self) -> str:
        """Whose call it is."""
        raise NotImplementedError


@dataclass(frozen=True)
class Scan(Row):
    """Mamba's (S6), with D, z, dt_bias and softplus."""

    E: int = 4096

    @property
    def mechanism(self) -> str:
        return "mamba"

    @property
    def operands(self) -> Operands:
        channels, groups = (self.B, self.T, self.E), (self.B, self.T, 1, self.N)
        given: dict[str, Shape] = {
            **dict.fromkeys(("u", "dt", "z"), channels),
            **dict.fromkeys(("b", "c"), groups),
            "a": (self.E, self.N),
            **dict.fromkeys(("d", "dt_bias"), (self.E,)),
        }
        return _operands(given, channels, (self.B, self.E, self.N) if self.step else None)


@dataclass(frozen=True)
class Duality(Row):
    """Mamba-2's (SSD), with D, dt_bias and softplus, without a gate."""

    N: int = 128
    H: int = 64
    P: int = 64
    G: int = 1

    @property
    def mechanism(self) -> str:
        return "mamba2"

    @property
    def operands(self) -> Operands:
        heads, groups = (self.B, self.T, self.H), (self.B, self.T, self.G, self.N)
        given: dict[str, Shape] = {
            "x": (*heads, self.P),
            "dt": heads,
            **dict.fromkeys(("b", "c"), groups),
            **dict.fromkeys(("a", "d", "dt_bias"), (self.H,)),
        }
        return _operands(given, (*heads, self.P), (self.B, self.H, self.P, self.N) if self.step else None)


@dataclass(frozen=True)
class Mixer(Row):
    """A whole mixer: its projections, the causal convolution, and the scan or the duality in between.

    Its operands are the hidden states and the layer's parameters, by their names in the layer.
    """

    M: int = 2048

    @property
    def fields(self) -> dict[str, Any]:
        """Its policy, as a spec has it."""
        return {"kind": self.mechanism, "state_size": self.N, "expand": 2, "conv_kernel": TAPS}

    @property
    def inner(self) -> Row:
        """The call of the operator inside."""
        raise NotImplementedError

    def _layer(self, projected: int, mixed: int, **more: Shape) -> Operands:
        """`projected` is the width of the first projection, `mixed` how many channels the convolution has."""
        hidden, E = (self.B, self.T, self.M), 2 * self.M
        given: dict[str, Shape] = {
            "hidden": hidden,
            "in_proj.weight": (projected, self.M),
            "conv1d.weight": (mixed, 1, TAPS),
            "conv1d.bias": (mixed,),
            "out_proj.weight": (self.M, E),
        }
        return _operands({**given, **more}, hidden, None)


@dataclass(frozen=True)
class ScanMixer(Mixer):
    """Mamba's: in_proj, the convolution, x_proj, dt_proj, the scan with its gate, out_proj."""

    @property
    def mechanism(self) -> str:
        return "mamba"

    @property
    def inner(self) -> Row:
        return Scan(self.group, self.name, self.T, self.B, N=self.N, E=2 * self.M)

    @property
    def operands(self) -> Operands:
        E, R = 2 * self.M, math.ceil(self.M / 16)
        more: dict[str, Shape] = {
            "x_proj.weight": (R + 2 * self.N, E),
            "dt_proj.weight": (E, R),
            "dt_proj.bias": (E,),
            "A_log": (E, self.N),
            "D": (E,),
        }
        return self._layer(2 * E, E, **more)


@dataclass(frozen=True)
class DualityMixer(Mixer):
    """Mamba-2's, of one group: in_proj, the convolution over x, B and C, the duality, the gated norm, out_proj."""

    N: int = 128
    P: int = 64

    @property
    def mechanism(self) -> str:
        return "mamba2"

    @property
    def H(self) -> int:
        return 2 * self.M // self.P

    @property
    def fields(self) -> dict[str, Any]:
        return {**super().fields, "head_dim": self.P}

    @property
    def inner(self) -> Row:
        return Duality(self.group, self.name, self.T, self.B, N=self.N, H=self.H, P=self.P)

    @property
    def operands(self) -> Operands:
        E, heads = 2 * self.M, (self.H,)
        mixed = E + 2 * self.N
        return self._layer(E + mixed + self.H, mixed, A_log=heads, D=heads, dt_bias=heads, **{"norm.weight": (E,)})


def _operands(given: dict[str, Shape], out: Shape, state: Shape | None) -> Operands:
    if state is None:
        return Operands(given, out, WIDE)
    return Operands({**given, "initial_state": state}, out, WIDE, states=STATES)


def _lengths(kind: type[Row], group: str, tokens: int, lengths: tuple[int, ...], **more: Any) -> tuple[Row, ...]:
    """The same number of tokens as sequences of several lengths: a device is as busy with all."""
    return tuple(kind(group, f"b{tokens // T}-t{T}", B=tokens // T, T=T, **more) for T in lengths)


LENGTHS = (2048, 16384, 131072, 2**20)

CUDA: tuple[Row, ...] = (
    Scan("s6", "b8-t2048-e4096", B=8, T=2048),
    Scan("s6", "b1-t16384-e4096", T=16384),
    Scan("s6", "b1-t131072-e2048", T=131072, E=2048),
    *(Duality("ssd", f"b{B}-t{T}", B=B, T=T) for B, T in ((8, 2048), (1, 16384), (1, 131072))),
    *(
        kind("mixer", f"{what}-b{B}-t{T}-m2048", B=B, T=T)
        for kind, what in ((ScanMixer, "s6"), (DualityMixer, "ssd"))
        for B, T in ((8, 2048), (1, 16384))
    ),
    Scan("decode", "s6-b64-e4096", T=1, B=64),
    Duality("decode", "ssd-b64", T=1, B=64),
    # last, so that a device that is lost in the longest rows has done the others
    *_lengths(Scan, "s6-length", 2**20, LENGTHS, E=2048),
    *_lengths(Duality, "ssd-length", 2**20, LENGTHS, forward_only=True),
)

_HEADS: dict[str, Any] = {"H": 16, "P": 32, "N": 64}

CPU: tuple[Row, ...] = (
    Scan("s6", "b1-t256-e512", T=256, E=512),
    Scan("s6", "b1-t2048-e512", T=2048, E=512),
    *(Duality("ssd", f"b1-t{T}-h16-p32-n64", T=T, **_HEADS) for T in (256, 2048)),
    ScanMixer("mixer", "s6-b1-t128-m128", T=128, M=128),
    DualityMixer("mixer", "ssd-b1-t512-m256", T=512, M=256, P=32, N=64),
    Scan("decode", "s6-b4-e512", T=1, B=4, E=512),
    Duality("decode", "ssd-b4-h16-p32-n64", T=1, B=4, **_HEADS),
    *_lengths(Scan, "s6-length", 8192, (512, 2048, 8192), E=256),
    *_lengths(Duality, "ssd-length", 8192, (512, 2048, 8192), **_HEADS),
)
