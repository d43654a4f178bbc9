"""Follow a pydantic error's location through the grammar: which value it is about, and which model holds it.

Pydantic puts the branch it took at a union into the location, beside keys and indices; only the types tell them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from attncompiler.spec.nodes import Path


@dataclass(frozen=True, slots=True)
class Trace:
    """`path` is the place in the data; `owner` the model whose key the last step is, where it is one's.

    `union` is the path of the outermost untagged union passed, whose branches each report on the same value. `kinds`
    are the tags that may stand at the place, where it holds a tagged union.
    """

    path: Path
    owner: type[BaseModel] | None
    union: Path | None = None
    kinds: tuple[str, ...] = ()


def trace(grammar: Any, location: Sequence[str | int], base: Path = ()) -> Trace:
    """Where `location`, of an error of validating the data at `base` with the type `grammar`, leads."""
    at, owner, union = grammar, None, None
    path = list(base)
    for step in location:
        branches = _branches(at)
        if len(branches) > 1:
            chosen = next((branch for branch in branches if _is_labelled(branch, step)), None)
            if union is None and not (chosen is not None and _tags(chosen)):
                union = tuple(path)
            at = chosen
            continue
        at, owner = _descend(branches[0] if branches else None, step)
        path.append(step)
    return Trace(tuple(path), owner, union, tuple(tag for branch in _branches(at) for tag in _tags(branch)))


def _branches(annotation: Any) -> list[Any]:
    """The alternatives of a union, None left out; of anything else, itself."""
    bare = _bare(annotation)
    if get_origin(bare) not in (Union, UnionType):
        return [bare]
    return [branch for branch in get_args(bare) if branch is not type(None)]


def _bare(annotation: Any) -> Any:
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return annotation


def _tags(branch: Any) -> tuple[Any, ...]:
    """The labels of a branch of a tagged union: the values of its `kind`, or its Tag."""
    if get_origin(branch) is Annotated:
        return tuple(extra.tag for extra in get_args(branch)[1:] if hasattr(extra, "tag"))
    field = branch.model_fields.get("kind") if _is_model(branch) else None
    return get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()


def _is_labelled(branch: Any, step: str | int) -> bool:
    if tags := _tags(branch):
        return step in tags
    bare = _bare(branch)
    if isinstance(bare, type) and get_origin(bare) is None:
        return step == bare.__name__
    return isinstance(step, str) and step.startswith(getattr(get_origin(bare), "__name__", "literal"))


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and get_origin(annotation) is None and issubclass(annotation, BaseModel)


def _descend(annotation: Any, step: str | int) -> tuple[Any, type[BaseModel] | None]:
    """The type under `step`, and the model whose field it is."""
    bare = _bare(annotation)
    if _is_model(bare):
        field = bare.model_fields.get(step)
        return (field.annotation if field is not None else None), bare
    arguments = get_args(bare)
    if get_origin(bare) is dict:
        return arguments[1], None
    if get_origin(bare) is tuple:
        fixed = len(arguments) != 2 or arguments[1] is not Ellipsis
        return (arguments[step] if fixed and isinstance(step, int) and step < len(arguments) else arguments[0]), None
    return None, None
