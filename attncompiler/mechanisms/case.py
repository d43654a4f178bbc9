"""Cases: inputs and options drawn for a mechanism, for the conformance suite, the fuzzer and the benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from attncompiler.mechanisms.rope import ROPE_OPTIONS
from attncompiler.runtime.implementation import Tensors
from attncompiler.runtime.operator import Operator

VALUE_KINDS = ("normal", "large", "outliers", "constant", "one_hot")
LARGE_KINDS = ("large", "outliers")


def one_large(*kinds: str) -> list[str]:
    """Of large kinds the first alone, and normal in the place of others: the budget allows for one product to amplify
    what is rounded, and the wider a call is, the more there are that amplify it twice."""
    first = next((n for n, kind in enumerate(kinds) if kind in LARGE_KINDS), None)
    return ["normal" if kind in LARGE_KINDS and n != first else kind for n, kind in enumerate(kinds)]


def values(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """An fp64 tensor of one of `VALUE_KINDS`: Gaussian and not, since Gaussians hide faults."""
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "large":
        return base * 8
    if kind == "outliers":
        return torch.where(torch.rand(shape, generator=generator) < 0.02, base * 50, base)
    if kind == "constant":
        return torch.full(shape, 0.5, dtype=torch.float64)
    if kind == "one_hot":
        hot = torch.randint(shape[-1], shape[:-1], generator=generator)
        return torch.nn.functional.one_hot(hot, shape[-1]).double()
    return base


@dataclass(frozen=True, repr=False)
class Case:
    """One call of an operator: fp64 inputs on the CPU by name, options, and whether the call is causal."""

    operator: Operator
    tensors: Mapping[str, Tensor]
    options: Any
    causal: bool

    def __repr__(self) -> str:
        """Shapes instead of values: a failing example is read, and drawn again from its seed."""
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in self.tensors.items())
        return f"Case({self.operator.name}: {shapes}; {self.options!r})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """For hypothesis, which would print a dataclass field by field."""
        printer.text(repr(self))

    def cast(self, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
        """The inputs for a kernel of `dtype`: low-precision inputs rounded to it, other floats to fp32 or better."""
        wide = torch.promote_types(dtype, torch.float32)

        def convert(name: str, tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor.to(device)
            return tensor.to(device, dtype if name in self.operator.low_precision else wide)

        return {name: convert(name, tensor) for name, tensor in self.tensors.items()}

    def slice(self, start: int, stop: int) -> Case:
        """The case of tokens start to stop alone."""
        return self.map(lambda tensor, axis: tensor.narrow(axis, start, stop - start))

    def map(self, change: Callable[[Tensor, int], Tensor]) -> Case:
        """The case with `change(tensor, axis)` applied to every input that runs along the sequence."""
        changed = {
            name: change(tensor, self.operator.sequence[name]) if name in self.operator.sequence else tensor
            for name, tensor in self.tensors.items()
        }
        return replace(self, tensors=changed)

    def given(self, **tensors: Tensor | None) -> Case:
        """The case with inputs added, replaced, or (None) taken away."""
        merged = {**self.tensors, **tensors}
        return replace(self, tensors={name: tensor for name, tensor in merged.items() if tensor is not None})


# --- policies -----------------------------------------------------------------------------------------------------

Options = dict[str, Any]
"""Of a policy or of a part of one, as a spec holds them."""


@dataclass(frozen=True)
class Wanted:
    """What a policy is drawn for: a model `hidden_size` wide.

    `built(options)` says whether this version builds a policy of these options: what it does not build is not drawn.
    `like` holds the options of a policy that draws stay near to, sizes aside; with none they are free.
    """

    hidden_size: int
    built: Callable[[Mapping[str, Any]], bool]
    like: Mapping[str, Any] = field(default_factory=dict)

    def group(self, names: Iterable[str], drawn: st.SearchStrategy[Options]) -> st.SearchStrategy[Options]:
        """Options that depend on one another and on no others: as drawn, or all as in `like`."""
        kept = {name: self.like[name] for name in names if name in self.like}
        return st.one_of(st.just(kept), drawn) if self.like else drawn

    def offered(self, least: Mapping[str, Any], name: str, values: Iterable[Any]) -> list[Any]:
        """Those of an option's values that are built, in a policy that has the options `least` beside it."""
        return [value for value in values if self.built({**least, name: value})]


def perhaps(**options: st.SearchStrategy[Any]) -> st.SearchStrategy[Options]:
    """Each option, or its default by being absent. Shrinks to none of them."""
    return st.fixed_dictionaries({}, optional=options)


def among(name: str, values: Iterable[Any]) -> st.SearchStrategy[Options]:
    """One option with one of the values, or absent; always absent where there are none."""
    listed = list(values)
    return perhaps(**{name: st.sampled_from(listed)}) if listed else st.just({})


def heads(hidden_size: int) -> st.SearchStrategy[Options]:
    """A number of heads that divides a hidden size (a multiple of 4), and perhaps a head_dim, which is even."""
    return st.fixed_dictionaries(
        {"num_attention_heads": st.sampled_from([1, 2, 4])}, optional={"head_dim": st.sampled_from([8, 4, 20, 64])}
    )


def head_width(options: Mapping[str, Any], hidden_size: int) -> int:
    """D of options that `heads` gave."""
    return options.get("head_dim") or hidden_size // options["num_attention_heads"]


ROPE_VALUES: Mapping[str, tuple[Any, ...]] = {
    "factor": (2.0, 8.0),
    "original_max_position_embeddings": (16, 64),
    "truncate": (False, True),
    "beta_fast": (32.0, 16.0),
    "beta_slow": (1.0, 2.0),
    "low_freq_factor": (1.0,),
    "high_freq_factor": (4.0, 8.0),
}
ROPE_SCALES = ({"attention_factor": 1.5}, {"mscale": 1.0, "mscale_all_dim": 0.5})
"""options of a rope_type that go together, and not with one another"""


@st.composite
def rotary(draw: st.DrawFn, wanted: Wanted, least: Mapping[str, Any], head_dim: int) -> Options:
    """`rope_parameters` of a type that is built, or none; of the type of `wanted.like` where that has one."""
    like = wanted.like.get("rope_parameters")
    if not (like is not None if wanted.like else draw(st.booleans())):
        return {}
    kinds = [like.get("rope_type", "default")] if like else list(ROPE_OPTIONS)

    def needed(kind: str) -> Options:
        return {"rope_type": kind, **{name: ROPE_VALUES[name][0] for name in ROPE_OPTIONS[kind][0]}}

    # dynamic keeps the fastest pair of channels and stretches the slowest: it needs two
    kinds = [kind for kind in kinds if kind != "dynamic" or head_dim >= 4]
    offered = wanted.offered(least, "rope_parameters", map(needed, kinds))
    if not offered:
        return {}
    rope = dict(draw(st.sampled_from(offered)))
    least_width = 4 if rope["rope_type"] == "dynamic" else 2
    must, may = ROPE_OPTIONS[rope["rope_type"]]
    rope |= {name: draw(st.sampled_from(ROPE_VALUES[name])) for name in must}
    free = [name for name in may if name not in must and name in ROPE_VALUES]
    rope |= draw(perhaps(**{name: st.sampled_from(ROPE_VALUES[name]) for name in free}))
    rope |= draw(st.sampled_from([{}, *(scale for scale in ROPE_SCALES if scale.keys() <= set(may))]))
    turned = [width / head_dim for width in range(least_width, head_dim + 1, 2)]
    rope |= draw(
        perhaps(
            rope_theta=st.sampled_from([100.0, 1e6]),
            interleaved=st.booleans(),
            partial_rotary_factor=st.sampled_from(turned),
        )
    )
    return {"rope_parameters": rope}


@dataclass(frozen=True)
class Cases:
    """What a mechanism's cases.py offers: hypothesis strategies of calls and policies, and shapes for benchmarks.

    `draw()` gives calls without segments, padding or initial state, of up to some 70 tokens; the laws add those.
    `extras()` gives calls with every optional input and option the mechanism has, in all combinations; `wide()` such
    calls with heads or states as wide as kernels take, for which a GPU's have other tiles, and other faults.
    `policies(wanted)` gives valid policies of tiny sizes as a spec holds them, with every option that is built, for
    models whose hidden size is a multiple of 8 and whose sequences may have 64 tokens; `patterns(wanted)` gives the
    visibility patterns of a mechanism that has them.
    """

    draw: Callable[[], Any]
    extras: Callable[[], Any]
    wide: Callable[[], Any]
    policies: Callable[[Wanted], st.SearchStrategy[Options]]
    patterns: Callable[[Wanted], st.SearchStrategy[Options]] | None = None
    bench: tuple[Mapping[str, Any], ...] = ()


def run(case_inputs: Tensors, case: Case) -> dict[str, Tensor]:
    """Run the operator (no site) on inputs made by `case.cast`, with the case's options."""
    from attncompiler.runtime.operator import options_text

    return case.operator(dict(case_inputs), options_text(case.options))
