"""The grammar of specs as a set of elements, and which of them a spec uses: read off the pydantic models.

An element is (model, field, "key") for a key, (model, field, value) for each value of an enum or a bool, and
(model, field, type) for each arm of a union. A key is used where it is set to another value than its default, or set at
all where it has one value alone.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from attncompiler.spec.model import ModelSpec

Element = tuple[str, str, str]


def elements(model: type[BaseModel] = ModelSpec) -> set[Element]:
    """Every element of the grammar below a model."""
    found: set[Element] = set()
    seen: set[type[BaseModel]] = set()

    def walk(model: type[BaseModel]) -> None:
        if model in seen:
            return
        seen.add(model)
        for name, field in model.model_fields.items():
            found.add((model.__name__, name, "key"))
            arms = list(_arms(field.annotation))
            choices = [arm for arm in arms if _is_choice(arm)]
            if len(arms) > 1 or choices:
                found.update((model.__name__, name, _label(arm)) for arm in arms)
            for arm in arms:
                if _is_model(arm):
                    walk(arm)

    walk(model)
    return found


def used(value: Any) -> Iterator[Element]:
    """The elements that a spec, or a part of one, uses."""
    if isinstance(value, BaseModel):
        model = type(value)
        for name, field in model.model_fields.items():
            own = getattr(value, name)
            if name in value.model_fields_set and (own != field.default or _has_one_value(field)):
                yield model.__name__, name, "key"
            yield from ((model.__name__, name, label) for label in _labels(own))
            yield from used(own)
    elif isinstance(value, (tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from used(item)


def _labels(value: Any) -> Iterator[str]:
    """How a value shows among the arms of its field: as a value, by its type, and by what it holds."""
    if value is None or isinstance(value, (bool, str)):
        yield repr(value)
    yield type(value).__name__
    if isinstance(value, dict):
        for item in (*value, *value.values()):
            yield from _labels(item)
    elif isinstance(value, tuple):
        for item in value:
            yield from _labels(item)


def _arms(annotation: Any) -> Iterator[Any]:
    """The members of a (nested) union; literals one by one, a bool as its two values, containers and their items."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _arms(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for arm in get_args(annotation):
            yield from _arms(arm)
    elif origin is Literal:
        yield from (("value", each) for each in get_args(annotation))
    elif annotation is bool:
        yield from (("value", each) for each in (True, False))
    elif annotation is type(None):
        yield "value", None
    elif origin in (tuple, dict):
        yield origin
        for arm in get_args(annotation):
            if arm not in (Ellipsis, Any):
                yield from _arms(arm)
    else:
        yield annotation


def _is_choice(arm: Any) -> bool:
    return isinstance(arm, tuple)


def _label(arm: Any) -> str:
    return repr(arm[1]) if _is_choice(arm) else arm.__name__


def _is_model(arm: Any) -> bool:
    return isinstance(arm, type) and issubclass(arm, BaseModel)


def _has_one_value(field: FieldInfo) -> bool:
    least = next((each.ge for each in field.metadata if getattr(each, "ge", None) is not None), None)
    most = next((each.le for each in field.metadata if getattr(each, "le", None) is not None), None)
    return len(list(_arms(field.annotation))) == 1 and (
        get_origin(field.annotation) is Literal or (least is not None and least == most)
    )
