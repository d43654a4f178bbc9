"""attncompiler: sequence models from a YAML file, each layer on the fastest kernel that computes exactly its function.

Public names load on first use, so that `attncompiler check` never imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "build": "attncompiler.pipeline",
    "check": "attncompiler.pipeline",
    "explain": "attncompiler.pipeline",
    "load": "attncompiler.pipeline",
    "plan": "attncompiler.pipeline",
    "save": "attncompiler.pipeline",
    "generate": "attncompiler.generation",
    "verify": "attncompiler.testing.verify",
    "param_groups": "attncompiler.emit.weights",
    "AttnCompilerError": "attncompiler.errors",
    "Diagnostic": "attncompiler.errors",
}

if TYPE_CHECKING:
    from attncompiler import ops as ops
    from attncompiler.emit.weights import param_groups as param_groups
    from attncompiler.errors import AttnCompilerError as AttnCompilerError
    from attncompiler.errors import Diagnostic as Diagnostic
    from attncompiler.generation import generate as generate
    from attncompiler.pipeline import build as build
    from attncompiler.pipeline import check as check
    from attncompiler.pipeline import explain as explain
    from attncompiler.pipeline import load as load
    from attncompiler.pipeline import plan as plan
    from attncompiler.pipeline import save as save
    from attncompiler.testing.verify import verify as verify

__all__ = [*_HOMES, "ops"]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("attncompiler.ops")
    if name not in _HOMES:
        raise AttributeError(f"module 'attncompiler' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
