"""Strategies of policies and patterns: the union of what the mechanisms' cases draw, and the gate of what is built."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from hypothesis import strategies as st
from pydantic import TypeAdapter

from attncompiler.errors import PlanError
from attncompiler.mechanisms.base import Mechanism, Policy, discover, load_entry
from attncompiler.mechanisms.case import Cases, Options, Wanted
from attncompiler.planning import plan
from attncompiler.spec.model import ModelSpec
from attncompiler.spec.when import FIXED_BY_LENGTH

Built = Callable[[Mapping[str, Any]], bool]
HIDDEN_SIZES = (16, 8, 24, 32, 48, 64)
"""each a multiple of 8, as the mechanisms' policies ask"""


def policies(hidden_size: int = 32) -> st.SearchStrategy[Policy]:
    """Policies of every mechanism, for a model `hidden_size` wide, a multiple of 8."""
    mechanisms = list(discover().values())
    drawn = st.sampled_from(mechanisms).flatmap(
        lambda mechanism: policy_options(mechanism, Wanted(hidden_size, built)).map(mechanism.policy.model_validate)
    )
    return drawn


def patterns() -> st.SearchStrategy[Any]:
    """Visibility patterns of every mechanism that has some, as `pattern=` of its operator takes them."""
    return st.one_of([_patterns(mechanism) for mechanism in discover().values() if cases(mechanism).patterns])


def _patterns(mechanism: Mechanism) -> st.SearchStrategy[Any]:
    annotation: Any = mechanism.policy.model_fields["pattern"].annotation
    grammar: TypeAdapter[Any] = TypeAdapter(annotation)
    drawn = cases(mechanism).patterns
    assert drawn is not None
    return drawn(Wanted(HIDDEN_SIZES[0], built)).map(grammar.validate_python)


def policy_options(mechanism: Mechanism, wanted: Wanted) -> st.SearchStrategy[Options]:
    """A policy as a spec holds it, `kernel` aside; with routes where those are built."""
    drawn: st.SearchStrategy[Options] = cases(mechanism).policies(wanted)
    return drawn.flatmap(lambda options: _routed(mechanism, wanted, options))


def _routed(mechanism: Mechanism, wanted: Wanted, options: Options) -> st.SearchStrategy[Options]:
    if not wanted.built({**options, "routes": ({"when": "seq_len > 64", "packing": True},)}):
        return st.just(options)
    drawn = cases(mechanism).patterns
    parts = {"kernel": _names(mechanism), "packing": st.booleans()}
    names = sorted(FIXED_BY_LENGTH)
    if drawn is not None and "pattern" not in wanted.like:
        parts["pattern"] = drawn(wanted)
    conditions = st.sampled_from([f"{names[0]} > 64", *(["training"] if "training" in names else [])])
    one = st.sampled_from(sorted(parts)).flatmap(
        lambda name: st.fixed_dictionaries({"when": conditions, name: parts[name]})
    )
    return st.lists(one, max_size=2).map(lambda routes: {**options, "routes": tuple(routes)} if routes else options)


def _names(mechanism: Mechanism) -> st.SearchStrategy[Any]:
    """A kernel name, or a list of some."""
    name = st.sampled_from(mechanism.names)
    return st.one_of(name, st.lists(name, min_size=1, max_size=3, unique=True).map(tuple))


def cases(mechanism: Mechanism) -> Cases:
    """What the mechanism's cases.py offers."""
    loaded: Cases = load_entry(mechanism.cases)
    return loaded


def built(options: Mapping[str, Any]) -> bool:
    """Whether this version builds a policy of these options: the planner is asked (E203)."""
    return _built(json.dumps(options, sort_keys=True))


@cache
def _built(options: str) -> bool:
    data = {
        "name": "probe",
        "model": {"vocab_size": 2, "hidden_size": 64, "mlp": {"kind": "none"}},
        "policies": {"asked": json.loads(options)},
        "layers": ({"policy": "asked"},),
    }
    try:
        plan(ModelSpec.model_validate(data), "cpu")
    except PlanError as error:
        return all(fault.code != "E203" for fault in error.diagnostics)
    return True


def everything(options: Mapping[str, Any]) -> bool:
    """The gate that lets the whole grammar through, for tests of what is refused."""
    return True
