"""The language of a route's `when`: comparisons, and/or/not and arithmetic over a few names.

The text is parsed to Python's syntax tree and walked by the visitor here; nothing is ever evaluated by Python.
"""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["number", "truth", "text"]

NAMES: dict[str, Kind] = {
    "seq_len": "number",
    "training": "truth",
    "batch_size": "number",
    "padding_fraction": "number",
    "dtype": "text",
    "device_type": "text",
}
FIXED_BY_LENGTH = frozenset({"seq_len", "training"})
"""The only names for a route that changes the pattern, so that prefill and decoding take the same one."""

WORDS: dict[Kind, str] = {"number": "a number", "truth": "true or false", "text": "text"}

MAX_LENGTH = 200
MAX_NUMBER = 2**53

ARITHMETIC: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
COMPARISONS: dict[type[ast.AST], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


class ConditionError(ValueError):
    """The text is not a condition of this language."""


@dataclass(frozen=True, slots=True)
class Condition:
    """A checked condition. `names` are those it reads; calling it with their values gives true or false."""

    text: str
    names: frozenset[str]
    tree: ast.expr

    def __call__(self, values: Mapping[str, bool | int | float | str]) -> bool:
        return bool(_evaluate(self.tree, values))


def condition(text: str) -> Condition:
    """Parse and check `text`. Raises ConditionError with a sentence that says what is not allowed."""
    if len(text) > MAX_LENGTH:
        raise ConditionError(f"a condition has at most {MAX_LENGTH} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's advice on its own syntax is not about this language
            tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ConditionError(f"{text!r} is not a condition: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError):
        raise ConditionError(f"{text!r} is not a condition") from None
    if _kind(tree) != "truth":
        raise ConditionError(f"{text!r} is not true or false; compare it with something")
    return Condition(text, frozenset(node.id for node in ast.walk(tree) if isinstance(node, ast.Name)), tree)


def _kind(node: ast.expr) -> Kind:
    """What the expression gives, after checking every part of it."""
    match node:
        case ast.Constant(value=value):
            return _constant(value)
        case ast.Name(id=name):
            if name not in NAMES:
                raise ConditionError(f"unknown name {name!r}; the names are {', '.join(NAMES)}")
            return NAMES[name]
        case ast.BoolOp(values=parts):
            return _all(parts, "truth", "truth")
        case ast.UnaryOp(op=ast.Not(), operand=part):
            return _all([part], "truth", "truth")
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=part):
            return _all([part], "number", "number")
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
            if isinstance(op, (ast.Div, ast.FloorDiv, ast.Mod)) and not _is_nonzero(right):
                raise ConditionError("only a number other than 0 can be divided by")
            return _all([left, right], "number", "number")
        case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in COMPARISONS for op in ops):
            kind = _kind(left)
            ordered = any(not isinstance(op, (ast.Eq, ast.NotEq)) for op in ops)
            if ordered and kind != "number":
                raise ConditionError(f"{ast.unparse(left)} has no order; compare it with == or !=")
            _all(others, kind, kind)
            return "truth"
    raise ConditionError(f"{ast.unparse(node)!r} is not allowed: only comparisons, and, or, not and + - * / // %")


def _constant(value: object) -> Kind:
    if isinstance(value, bool):
        return "truth"
    if isinstance(value, str):
        return "text"
    if isinstance(value, (int, float)) and abs(value) <= MAX_NUMBER:
        return "number"
    raise ConditionError("a constant is true, false, a text or a number up to 2**53")


def _is_nonzero(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and node.value != 0


def _all(nodes: list[ast.expr], wanted: Kind, result: Kind) -> Kind:
    for node in nodes:
        if _kind(node) != wanted:
            raise ConditionError(f"{ast.unparse(node)} is not {WORDS[wanted]}")
    return result


def _evaluate(node: ast.expr, values: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return values[name]
        case ast.BoolOp(op=op, values=parts):
            return (all if isinstance(op, ast.And) else any)(_evaluate(part, values) for part in parts)
        case ast.UnaryOp(op=op, operand=part):
            value = _evaluate(part, values)
            return (not value) if isinstance(op, ast.Not) else -value if isinstance(op, ast.USub) else value
        case ast.BinOp(left=left, op=op, right=right):
            return ARITHMETIC[type(op)](_evaluate(left, values), _evaluate(right, values))
        case ast.Compare(left=left, ops=ops, comparators=others):
            terms = [_evaluate(term, values) for term in (left, *others)]
            return all(COMPARISONS[type(op)](a, b) for op, a, b in zip(ops, terms, terms[1:], strict=False))
    raise AssertionError(f"{ast.dump(node)} passed the check of `condition`")
