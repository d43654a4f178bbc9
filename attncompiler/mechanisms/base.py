"""What a mechanism, a kernel and a refusal are. Data only: nothing here imports torch.

A kernel states its needs as data and an entry as text; `refusals` compares the needs with what a layer or a call
asks for (`Request`), with a target's facts, and with the environment. A feature that a kernel does not name is
refused, so an option added to the grammar can never reach a kernel that has not been taught it.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from attncompiler.measured import Bucket, Entry, Order, ordered
from attncompiler.targets.detect import Environment
from attncompiler.targets.target import Target

Value = bool | int | float | str | None
Direction = Literal["forward", "backward"]
NOTHING: tuple[Value, ...] = (None, False, 0, "", "none")
"""values of a feature that ask for nothing"""

NOT_BUILT = "not built in this version of attncompiler"
"""what is said of names and options that the grammar knows and this version does not have"""


class StrictModel(BaseModel):
    """Base of everything a spec may hold: frozen, no unknown keys, no coercion."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, ser_json_inf_nan="constants")


# --- refusals ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a kernel cannot serve: a sentence, and which kind of fact it follows from."""

    source: Literal["target", "environment", "option"]
    reason: str

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True, slots=True)
class Request:
    """What a layer (at plan time) or a call (at run time) asks of a kernel.

    `features` maps the mechanism's feature names to values; a falsy value (False, None, 0, "none") asks for nothing.
    `dtype` is a name such as "float32", or None where it is not yet known.
    """

    mechanism: str
    features: Mapping[str, Value]
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class OneOf:
    """Accepts the listed values of a feature."""

    values: frozenset[Value]

    def __init__(self, *values: Value):
        object.__setattr__(self, "values", frozenset(values))

    def refuses(self, value: Value) -> str | None:
        if value in self.values:
            return None
        return "only " + ", ".join(sorted(map(str, self.values)))


@dataclass(frozen=True, slots=True)
class AtMost:
    """Accepts numbers up to a limit, in the given unit."""

    limit: float
    unit: str = ""

    def refuses(self, value: Value) -> str | None:
        if isinstance(value, (int, float)) and value <= self.limit:
            return None
        return f"at most {self.limit:g}{' ' + self.unit if self.unit else ''}"


ANY = None
"""Accepts every value of a feature."""


@dataclass(frozen=True, slots=True)
class Wrong:
    """Calls that some versions of a package compute wrong, or that were never checked with them."""

    package: str
    """import name, or a distribution's own name"""
    since: tuple[int, ...]
    before: tuple[int, ...]
    because: str
    feature: str | None = None
    """what such a call asks for; None: any call"""
    compute_capability: int | None = None
    """the devices, by the first number of theirs; None: all"""
    backward: bool = False
    """whether it is the backward alone that is refused"""

    def refuses(
        self, request: Request, target: Target, environment: Environment | None, direction: Direction
    ) -> str | None:
        """What is said of such a call; None of another, and where it is not known what is installed."""
        version = environment.packages.get(self.package) if environment is not None else None
        if version is None or not self.since <= version_numbers(version) < self.before:
            return None
        if self.feature is not None and request.features.get(self.feature) in NOTHING:
            return None
        if self.compute_capability not in (None, (target.compute_capability or (0, 0))[0]):
            return None
        if self.backward and direction != "backward":
            return None
        what = "the call" if self.feature is None else self.feature
        return f"{what}{' backward' if self.backward else ''} with {self.package} {version}: {self.because}"


def version_numbers(version: str) -> tuple[int, ...]:
    """The first three numbers of a version, without what may follow them: "3.7.0+git1" and "3.7" are (3, 7, 0)."""
    found = [re.match(r"\d*", part) for part in version.partition("+")[0].split(".")[:3]]
    numbers = [int(each.group() or 0) if each else 0 for each in found]
    return (*numbers, *[0] * (3 - len(numbers)))


@dataclass(frozen=True, slots=True)
class Needs:
    """What a kernel needs, as data."""

    features: Mapping[str, OneOf | AtMost | None] = field(default_factory=dict)
    device_types: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16", "float64")
    vendor: str | None = None
    min_compute_capability: tuple[int, int] | None = None
    packages: Mapping[str, str] = field(default_factory=dict)
    """import name, or a distribution's own name → the command that installs it"""
    known: Mapping[str, str] = field(default_factory=dict)
    """feature that is not offered, or not at every value → what is known of it, said with the refusal"""
    forward_only: Mapping[str, str] = field(default_factory=dict)
    """feature that its backward does not offer → why"""
    wrong: tuple[Wrong, ...] = ()
    """what of it is refused with versions of packages"""
    on: Mapping[str, Needs] = field(default_factory=dict)
    """device type → all that is needed there, of a kernel that is another one on that device"""
    interpreted: tuple[str, ...] = ()
    """dtypes that Triton's interpreter, which runs a GPU's kernel on a CPU for whoever tests it, computes right"""

    def at(self, device_type: str) -> Needs:
        """What is needed on a device of that type."""
        return self.on.get(device_type, self)

    def device_refusal(self, name: str, target: Target, environment: Environment | None) -> str | None:
        """Why the kernel of that name does not run on such a device; None where it does."""
        if target.device_type not in self.device_types:
            interpreting = environment is not None and environment.interpreting
            if self.interpreted and interpreting and target.device_type == "cpu":
                return None
            return f"{name} runs on {' and '.join(self.device_types)} only"
        needs = self.at(target.device_type)
        if needs.vendor is not None and target.vendor not in (needs.vendor, "any"):
            return f"{name} needs {needs.vendor} hardware, {target.name} is {target.vendor}"
        wanted = needs.min_compute_capability
        if wanted is not None and (target.compute_capability or (0, 0)) < wanted:
            return f"{name} needs compute capability {'.'.join(map(str, wanted))} or later"
        return None

    def refuse(self, feature: str, value: Value) -> str | None:
        """What is said of a feature's value that is not offered; None where it is, or where it asks for nothing."""
        if value in NOTHING:
            return None
        because = f": {self.known[feature]}" if feature in self.known else ""
        if feature not in self.features:
            return (feature if value is True else f"{feature} = {value}") + because
        accepts = self.features[feature]
        limit = accepts.refuses(value) if accepts is not None else None
        return None if limit is None else f"{feature} = {value} ({limit}){because}"


@dataclass(frozen=True, slots=True)
class Kernel:
    """One implementation. `entry` ("module:attribute") is imported only where it runs."""

    name: str
    entry: str
    needs: Needs
    summary: str


def needs_of_triton(features: Mapping[str, OneOf | AtMost | None]) -> Needs:
    """What the built-in kernels need that Triton compiles, beside the features that each offers."""
    return Needs(
        features=features,
        device_types=("cuda",),
        dtypes=("float32", "bfloat16", "float16"),
        vendor="nvidia",
        min_compute_capability=(8, 0),
        packages={"triton": "pip install 'attncompiler[gpu]'"},
        interpreted=("float32", "float16"),
    )


def load_entry(entry: str) -> Any:
    """Import what "module:attribute" names. Entries come from this package's own tables, never from a spec."""
    module, _, attribute = entry.partition(":")
    return getattr(importlib.import_module(module), attribute)


def refusals(
    kernel: Kernel,
    request: Request,
    target: Target,
    environment: Environment | None = None,
    direction: Direction = "forward",
) -> tuple[Refusal, ...]:
    """Every reason why `kernel` cannot serve `request` on `target`; empty when it can.

    What a backward alone is refused for counts in that direction: a plan is of forwards, and where a kernel of its
    chain does not serve the backward of a call, that goes on to the next.

    With `environment=None` (a listed target that is not this machine) only target and option refusals count, so
    that the plan for a listed target does not depend on where it was made.
    """
    needs, found = kernel.needs.at(target.device_type), []
    refused = kernel.needs.device_refusal(kernel.name, target, environment)
    if refused is not None:
        found.append(Refusal("target", refused))
    interpreted = refused is None and target.device_type not in kernel.needs.device_types
    if request.dtype is not None and request.dtype not in (needs.interpreted if interpreted else needs.dtypes):
        found.append(Refusal("option", f"{kernel.name} does not take {request.dtype}"))
    for name, value in request.features.items():
        refused = needs.refuse(name, value)
        if refused is not None:
            found.append(Refusal("option", f"{kernel.name} does not offer {refused}"))
    for name, because in needs.forward_only.items() if direction == "backward" else ():
        if request.features.get(name) not in NOTHING:
            found.append(Refusal("option", f"{kernel.name} does not offer {name} backward: {because}"))
    if environment is not None:
        for package, install in needs.packages.items():
            if package not in environment.packages:
                found.append(Refusal("environment", f"{package} is not installed: {install}"))
    for wrong in needs.wrong:
        refused = wrong.refuses(request, target, environment, direction)
        if refused is not None:
            found.append(Refusal("environment", f"{kernel.name} does not offer {refused}"))
    return tuple(found)


# --- mechanisms -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fault:
    """Options that are valid one by one and do not fit together. `path` leads to one of them, from the policy."""

    path: tuple[str | int, ...]
    message: str
    code: str = "E101"
    remedy: str | None = None


def no_faults(policy: Any, model: Any) -> tuple[Fault, ...]:
    """For a mechanism whose options always fit together."""
    return ()


def nothing_more(policy: Any, size: MixerSize) -> Mapping[str, Value]:
    """For a mechanism that asks the same at every size."""
    return {}


@dataclass(frozen=True, slots=True)
class MixerSize:
    """At what size a mixer is costed: a batch of B sequences of T tokens, M wide, on one kernel of its chain."""

    hidden_size: int
    max_position_embeddings: int
    batch: int
    seq_len: int
    itemsize: int
    """bytes of an element of the compute dtype"""
    kernel: str

    @property
    def tokens(self) -> int:
        return self.batch * self.seq_len


@dataclass(frozen=True, slots=True)
class Cost:
    """What a part of a model costs in one training step, for a batch of B sequences of T tokens.

    FLOPs are counted as torch's FlopCounterMode counts them (a matmul 2·m·n·k, an operator by its registered
    formula). The sum of two costs is that of the parts one after the other.
    """

    parameters: int = 0
    fp32_parameters: int = 0
    """those of the parameters that stay in fp32 whatever the model's dtype"""
    forward_flops: int = 0
    backward_flops: int = 0
    forward_vector_flops: int = 0
    """those of the FLOPs that run outside the matrix units"""
    backward_vector_flops: int = 0
    forward_bytes: int = 0
    """memory traffic, each operand and result once"""
    backward_bytes: int = 0
    saved_bytes: int = 0
    """what autograd keeps between forward and backward"""
    workspace_bytes: int = 0
    """the largest transient beside that, in either direction"""
    state_bytes: int = 0
    """decode state for B sequences of up to T tokens"""

    def __add__(self, other: Cost) -> Cost:
        sums = {name: getattr(self, name) + getattr(other, name) for name in self.__slots__}
        return Cost(**{**sums, "workspace_bytes": max(self.workspace_bytes, other.workspace_bytes)})


@dataclass(frozen=True, slots=True, eq=False)
class Mechanism:
    """A mechanism, as data. One folder per mechanism; `discover` finds them."""

    name: str
    policy: type[Policy]
    kernels: tuple[Kernel, ...]
    names: tuple[str, ...]
    """every kernel name a spec may use; one without a Kernel is reserved: known, and not built yet"""
    order: Callable[[str, Mapping[str, Value]], tuple[str, ...]]
    """(device type, requested features) → kernel names, best first"""
    causal: Callable[[Any], bool]
    """policy → whether no token depends on a later one, so that the layer can be run step by step"""
    features: Callable[[Any, Any], Mapping[str, Value]]
    """(policy, the spec's model section) → what a layer of that policy asks of every kernel"""
    cost: str
    """entry of (policy, MixerSize) → Cost, projections included; imports no torch"""
    layer: str
    """entry of the nn.Module"""
    operator: str
    """entry of the runtime Operator"""
    function: str
    """entry of the public function; its name there is its name in `attncompiler.ops`"""
    reference: str
    """entry of the oracle"""
    cases: str
    """entry of the hypothesis strategy and bench shapes"""
    relations: Callable[[Any, Any], Iterable[Fault]] = no_faults
    """(policy, the spec's model section) → what does not fit together, checked before planning"""
    sized: Callable[[Any, MixerSize], Mapping[str, Value]] = nothing_more
    """(policy, size) → what its layers ask beside `features` on a batch of that size"""
    bounded: bool = False
    """whether it cannot take more tokens than the model's max_position_embeddings"""
    sees: Callable[[Any, int], tuple[str, float]] | None = None
    """(policy, tokens T) → what a token sees of the others, in a word, and the share of all T² pairs that meet"""
    shapes: Callable[[Any, MixerSize], Mapping[str, tuple[int, ...]]] | None = None
    """(policy, size) → the shapes of the operator's inputs in its layers, as far as `bucket` reads them"""
    bucket: Callable[[Mapping[str, tuple[int, ...]], Any, str], Bucket] | None = None
    """(shapes of the operator's inputs, its options or a policy, dtype) → the bucket of measured tables that it is in;
    None, and no `shapes`, for a mechanism that is not measured"""
    helpers: tuple[str, ...] = ()
    """entries of public functions about the mechanism that run no kernel, in `attncompiler.ops` too"""
    places: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """feature → where the policy asks for it, for features that are not named as a field is"""

    def kernel(self, name: str) -> Kernel | None:
        """The kernel of that name, or None when the name is reserved for one that is not built yet."""
        return next((kernel for kernel in self.kernels if kernel.name == name), None)


def auto_order(
    mechanism: Mechanism,
    device_type: str,
    features: Mapping[str, Value],
    entries: Sequence[Entry],
    bucket: Callable[[], Bucket],
    serves: Callable[[str], bool],
) -> Order:
    """The order of `kernel: auto`, at plan time and at run time: the mechanism's own, refined by what was measured of
    the kernels that serve.

    `bucket` and `serves` are asked only where there is something to look up.
    """
    static = mechanism.order(device_type, features)
    if mechanism.bucket is None or not any(entry.mechanism == mechanism.name for entry in entries):
        return Order(static)
    return ordered(static, mechanism.name, bucket(), entries, serves)


@cache
def discover() -> Mapping[str, Mechanism]:
    """Every mechanism, by name: each folder beside this file that has a mechanism.py with a `MECHANISM`."""
    package = importlib.import_module("attncompiler.mechanisms")
    found = {}
    for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda module: module.name):
        if module.ispkg:
            mechanism = importlib.import_module(f"{package.__name__}.{module.name}.mechanism").MECHANISM
            found[mechanism.name] = mechanism
    return found


# --- spec fields that mechanisms share --------------------------------------------------------------------------

Size = Annotated[int, Field(ge=1, lt=2**20)]
"""A number of heads, channels, ranks or features: the product of three, in bytes, is still a size of a tensor."""
Length = Annotated[int, Field(ge=1, lt=2**40)]
"""A number of tokens or of blocks of them."""
Factor = Annotated[float, Field(gt=0, lt=1e30)]
"""A positive number that fp32 holds with room to spare."""


Names = Annotated[tuple[str, ...], Field(strict=False)]
"""A list of names, as YAML gives it, held frozen."""
FILLED = Field(json_schema_extra={"minItems": 1})
"""Of a list that a relation refuses when it is empty: editors are told so too."""
KernelNames = Annotated[Names, FILLED]
"""Kernels, best first."""


class Route(StrictModel):
    """One dynamic route: when the condition holds, the layer runs with these changes."""

    when: str
    pattern: dict[str, Any] | None = None
    kernel: str | KernelNames | None = None
    packing: bool | None = None


class Policy(StrictModel, allow_inf_nan=False):
    """Fields every mixer kind has. A mechanism's own policy narrows `kind` to its name and adds its options."""

    kind: str
    kernel: str | KernelNames = "auto"
    routes: tuple[Route, ...] = Field(default=(), strict=False)
