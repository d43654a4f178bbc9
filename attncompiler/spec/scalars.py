"""YAML 1.2 core scalars: what a plain scalar means, and how a value is written so that it reads back the same."""

from __future__ import annotations

import math
import re

Scalar = bool | int | float | str | None


class Unreadable:
    """Stands for a scalar that means no value. The loader has said so; no option takes it."""


UNREADABLE = Unreadable()

NULL = frozenset({"", "~", "null", "Null", "NULL"})
BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", re.ASCII)
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", re.ASCII)
INFINITY = re.compile(r"([-+]?)\.(inf|Inf|INF)")
NAN = frozenset({".nan", ".NaN", ".NAN"})
MAX_DIGITS = 400

PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_.+/-]*", re.ASCII)
ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t"}


def resolve(text: str) -> Scalar:
    """The value of a plain (unquoted) scalar by the core schema: `1e-5` is a float, `no` and `1_000` are text.

    Raises ValueError for a number longer than `MAX_DIGITS`, which no option can mean.
    """
    if text in NULL:
        return None
    if text in BOOLEANS:
        return BOOLEANS[text]
    if INTEGER.fullmatch(text):
        return _integer(text)
    if FLOAT.fullmatch(text):
        return float(_short(text))
    if sign := INFINITY.fullmatch(text):
        return -math.inf if sign[1] == "-" else math.inf
    return math.nan if text in NAN else text


def _integer(text: str) -> int:
    if text.startswith("0o"):
        return int(_short(text)[2:], 8)
    if text.startswith("0x"):
        return int(_short(text)[2:], 16)
    return int(_short(text))


def _short(text: str) -> str:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits is too long")
    return text


def write(value: Scalar) -> str:
    """`value` as a YAML scalar that `resolve` (or a double-quoted scalar) reads back as the same value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _write_float(value)
    if isinstance(value, int):
        return str(value)
    if PLAIN.fullmatch(value) and isinstance(resolve(value), str):
        return value
    return '"' + "".join(map(_escape, value)) + '"'


def _write_float(value: float) -> str:
    if math.isnan(value):
        return ".nan"
    if math.isinf(value):
        return ".inf" if value > 0 else "-.inf"
    return repr(value)


def _escape(character: str) -> str:
    if character in ESCAPES:
        return ESCAPES[character]
    if " " <= character <= "~":
        return character
    return f"\\U{ord(character):08x}"
