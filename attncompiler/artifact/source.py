"""The generated code of a model as one readable file. Nothing imports it."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable

from torch import fx

from attncompiler.emit import CompiledModel
from attncompiler.planning.explanation import ranges

HEADER = '"""A model\'s generated code, for reading only: nothing imports this file, and editing it changes nothing."""'
_RELEASED = re.compile(r";  [\w = ]+ = None$", re.MULTILINE)
"""names that generated code lets go of after their last use: right for memory, in the way of reading"""


def source(model: CompiledModel) -> str:
    """A class for the model with its forward, step and loss, then one for each kind of layer, told apart by code."""
    kinds: dict[str, list[str]] = {}
    layers = model.get_submodule("layers")
    for name, layer in layers.named_children():
        assert isinstance(layer, fx.GraphModule)
        kinds.setdefault(_method(layer.graph, "forward"), []).append(name)
    methods = [_method(graph, name) for name, graph in (("forward", model.graph), *model.graphs.items())]
    classes = [_class("Model", "the whole", methods)]
    for number, (code, names) in enumerate(kinds.items()):
        classes.append(_class(f"Layer{number}", f"layers {ranges(map(int, names))}", [code]))
    return "\n\n\n".join([HEADER, *classes]) + "\n"


def _class(name: str, what: str, methods: Iterable[str]) -> str:
    body = "\n\n".join(textwrap.indent(method, "    ") for method in methods)
    return f"class {name}:  # {what}\n{body}"


def _method(graph: fx.Graph, name: str) -> str:
    code = _RELEASED.sub("", graph.python_code("self").src.strip())
    return code.replace("def forward(", f"def {name}(", 1)
