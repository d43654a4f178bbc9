"""The second pass: pieces that are valid one by one and do not fit together.

Each relation reads the parts it needs; one that meets a part which is itself wrong says nothing about it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from attncompiler import targets
from attncompiler.mechanisms.base import Fault, Mechanism, Policy, Route, discover
from attncompiler.spec.diagnose import did_you_mean, dotted, faults
from attncompiler.spec.expand import MAX_LAYERS, MergeError, count, merge
from attncompiler.spec.model import Group, Layer, Mlp, NoMlp
from attncompiler.spec.nodes import Path
from attncompiler.spec.parts import Parts, UnknownError
from attncompiler.spec.when import FIXED_BY_LENGTH, ConditionError, condition

Found = tuple[Fault, bool]
"""A fault, and whether it is about the key rather than the value."""

FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)
RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.ASCII | re.IGNORECASE)
POLICY = re.compile(r"[A-Za-z0-9_-]{1,100}", re.ASCII)


def check(parts: Parts) -> list[Found]:
    """Every relation that does not hold."""
    found: list[Found] = []
    for relation in RELATIONS:
        found += _known(relation(parts))
    for name, policy in parts.policies.items():
        if policy is not None:
            found += _known(_policy(("policies", name), policy, discover()[policy.kind], parts))
    return found


def _known(relation: Iterator[Found]) -> Iterator[Found]:
    try:
        yield from relation
    except UnknownError:
        return


def _name(parts: Parts) -> Iterator[Found]:
    name = parts.name
    if name is not None and (not FOLDER.fullmatch(name) or RESERVED.fullmatch(name) or name.endswith(".")):
        remedy = "use up to 100 letters, digits, dots, dashes and underscores, with a letter or digit first"
        yield Fault(("name",), f"name {name[:120]!r} is not usable as a folder name", "E104", remedy), False


def _policy_names(parts: Parts) -> Iterator[Found]:
    for name in parts.policies:
        if not POLICY.fullmatch(name):
            message = f"the policy name {name[:120]!r} may hold only letters, digits, dashes and underscores"
            yield Fault(("policies", name), message, "E014"), True


def _vocabulary(parts: Parts) -> Iterator[Found]:
    model = parts.model
    if model.input == "tokens" and model.vocab_size is None:
        yield Fault(("model",), "'vocab_size' is missing in model: its input is tokens", "E010"), True
    if model.input == "embeds" and model.vocab_size is not None:
        remedy = "remove vocab_size, or write input: tokens"
        yield Fault(("model", "vocab_size"), "a model fed with embeds has no vocabulary", "E105", remedy), True


def _head(parts: Parts) -> Iterator[Found]:
    if parts.model.head.kind == "lm" and parts.model.input == "embeds":
        tied = " to tie" if parts.model.head.tie_word_embeddings else ""
        message = f"a head of kind lm needs a vocabulary{tied}, and a model fed with embeds has none"
        remedy = "write head: {kind: none} or a classifier, or input: tokens"
        yield Fault(("model", "head"), message, "E105", remedy), False


def _layers(parts: Parts) -> Iterator[Found]:
    if parts.layers is None:
        return
    complete = [entry for entry in parts.layers if entry is not None]
    if not parts.layers or (len(complete) == len(parts.layers) and count(complete) == 0):
        yield Fault(("layers",), "the model has no layers", "E103"), False
    if count(complete) > MAX_LAYERS:
        yield Fault(("layers",), f"the layers are {count(complete):,}; at most {MAX_LAYERS:,} are taken", "E004"), False
    for path, entry in _walk(("layers",), parts.layers):
        if entry.policy not in parts.policies:
            hint = did_you_mean(entry.policy, parts.policies) or f"policies: {', '.join(parts.policies) or 'none'}"
            yield Fault((*path, "policy"), f"unknown policy {entry.policy!r}", "E102", hint), False


def _walk(path: Path, entries: Sequence[Layer | Group | None]) -> Iterator[tuple[Path, Layer]]:
    """Every layer entry, once, with its place in the document."""
    for index, entry in enumerate(entries):
        if isinstance(entry, Group):
            yield from _walk((*path, index, "layers"), entry.layers)
        elif entry is not None:
            yield (*path, index), entry


def _mlps(parts: Parts) -> Iterator[Found]:
    for path, entry in _walk(("layers",), parts.layers or ()):
        try:
            merge(parts.model.mlp, entry.mlp)
        except MergeError as error:
            yield Fault((*path, "mlp"), str(error), "E105"), False


def _shared(parts: Parts) -> Iterator[Found]:
    first: dict[str, tuple[Policy | None, Mlp | NoMlp, Path]] = {}
    for path, entry in _walk(("layers",), parts.layers or ()):
        if entry.share is None:
            continue
        try:
            mlp = merge(parts.model.mlp, entry.mlp)
        except MergeError:
            continue
        policy = parts.policies.get(entry.policy)
        other, other_mlp, place = first.setdefault(entry.share, (policy, mlp, path))
        if policy is not None and other is not None and (policy, mlp) != (other, other_mlp):
            message = f"layers that share {entry.share!r} must be equal, and this one differs from {dotted(place)}"
            yield Fault((*path, "share"), message, "E105"), False


def _targets(parts: Parts) -> Iterator[Found]:
    if parts.targets is None:
        return
    if not parts.targets:
        yield Fault(("targets",), "the spec lists no target", "E014", "leave targets out for cpu"), False
    seen = set()
    for index, target in enumerate(parts.targets):
        if target is None:
            continue
        name = target if isinstance(target, str) else target.name
        path: Path = ("targets", index)
        if isinstance(target, str) and target not in targets.names():
            remedy = did_you_mean(target, targets.names()) or f"known targets: {', '.join(targets.names())}"
            yield Fault(path, f"unknown target {target!r}", "E107", remedy), False
        if not isinstance(target, str) and name in targets.names():
            message = f"the target {name!r} is built in, and other facts are given for it"
            yield Fault((*path, "name"), message, "E105", "give it a name of its own"), False
        if name in seen:
            yield Fault(path, f"the target {name!r} is listed twice", "E105"), False
        seen.add(name)


def _order(parts: Parts) -> Iterator[Found]:
    for name, order in parts.fallback.order.items() if parts.fallback is not None else ():
        path: Path = ("fallback", "order", name)
        if name not in discover():
            hint = did_you_mean(name, discover()) or f"mechanisms: {', '.join(discover())}"
            yield Fault(path, f"unknown mechanism {name!r}", "E012", hint), True
        elif order != "auto":
            yield from _kernels(path, order, discover()[name])


RELATIONS: tuple[Callable[[Parts], Iterator[Found]], ...] = (
    _name,
    _policy_names,
    _vocabulary,
    _head,
    _layers,
    _mlps,
    _shared,
    _targets,
    _order,
)


# --- policies ---------------------------------------------------------------------------------------------------


def _policy(path: Path, policy: Policy, mechanism: Mechanism, parts: Parts) -> Iterator[Found]:
    yield from _kernels((*path, "kernel"), policy.kernel, mechanism)
    for index, route in enumerate(policy.routes):
        yield from _route((*path, "routes", index), route, mechanism)
    for fault in mechanism.relations(policy, parts.model):
        yield Fault((*path, *fault.path), fault.message, fault.code, fault.remedy), False


def _kernels(path: Path, kernels: str | Sequence[str], mechanism: Mechanism) -> Iterator[Found]:
    """`auto`, a name, or a list of names."""
    if kernels == "auto":
        return
    single = isinstance(kernels, str)
    names: Iterable[str] = (kernels,) if isinstance(kernels, str) else kernels
    if not kernels:
        yield Fault(path, f"{dotted(path)} lists no kernel", "E014"), False
    for index, name in enumerate(names):
        place = path if single else (*path, index)
        if name not in mechanism.names:
            hint = did_you_mean(name, mechanism.names) or f"{mechanism.name} has {', '.join(mechanism.names)}"
            yield Fault(place, f"unknown kernel {name!r} of {mechanism.name}", "E106", hint), False
        elif not single and name in kernels[:index]:
            yield Fault(place, f"the kernel {name!r} is listed twice", "E105"), False


def _route(path: Path, route: Route, mechanism: Mechanism) -> Iterator[Found]:
    if route.kernel is not None:
        yield from _kernels((*path, "kernel"), route.kernel, mechanism)
    if route.pattern is None and route.kernel is None and route.packing is None:
        yield Fault(path, "a route changes pattern, kernel or packing, and this one nothing", "E105"), False
    if route.pattern is not None:
        yield from _pattern((*path, "pattern"), route.pattern, mechanism)
    try:
        names = condition(route.when).names
    except ConditionError as error:
        yield Fault((*path, "when"), str(error), "E108"), False
        return
    outside = sorted(names - FIXED_BY_LENGTH)
    if route.pattern is not None and outside:
        message = f"a route that changes the pattern may test only seq_len and training, not {', '.join(outside)}"
        remedy = "what decides the pattern must be known before decoding starts"
        yield Fault((*path, "when"), message, "E108", remedy), False


def _pattern(path: Path, pattern: object, mechanism: Mechanism) -> Iterator[Found]:
    """A route's pattern must be one of the mechanism's own."""
    field = mechanism.policy.model_fields.get("pattern")
    if field is None:
        yield Fault(path, f"{mechanism.name} has no pattern to change", "E105"), True
        return
    grammar: Any = Annotated[field.annotation, Field(discriminator=field.discriminator)]
    try:
        TypeAdapter(grammar).validate_python(pattern, strict=True)
    except ValidationError as error:
        yield from faults(error, grammar, path)
