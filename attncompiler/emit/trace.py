"""Modules → graphs: what is a node, what is seen through, and a GraphModule that keeps its modules as they are."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable
from typing import Any

from torch import fx, nn

from attncompiler.runtime.site import Site


class Emitted(fx.GraphModule):
    """A GraphModule whose children are the modules it was made from.

    fx copies only what the graph calls, into bare containers; here the originals are put back, so that a ModuleDict
    keeps its `.items()`, a mixer its methods, and ties survive `copy.deepcopy`.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str | None = None):
        super().__init__(root, graph, class_name or type(self).__name__)
        for name, child in root.named_children():
            setattr(self, name, child)
        self.train(root.training)

    def recompile(self) -> Any:
        """Generate the code again after the graph was changed: of this module alone."""
        if self.__dict__.pop("shares_class", False):
            self.__class__ = type("GraphModuleImpl", (Emitted,), {})
        return super().recompile()

    def _copy_of_children(self, memo: dict[int, Any]) -> nn.Module:
        holder = nn.Module()
        for name, child in self.named_children():
            holder.add_module(name, child)
        holder = copy.deepcopy(holder, memo)
        holder.train(self.training)
        return holder

    def __deepcopy__(self, memo: dict[int, Any]) -> Emitted:
        made = Emitted(self._copy_of_children(memo), copy.deepcopy(self.graph), self._get_name())
        memo[id(self)] = made
        return made


_TRACING = threading.RLock()
"""fx patches nn.Module while it traces, for the whole process: one trace at a time"""


class LayerTracer(fx.Tracer):
    """Sees through a layer, its mixer and its MLP; everything of torch.nn, of blocks, and sites are nodes.

    Modules that other threads call meanwhile run as if nothing were traced.
    """

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if isinstance(module, (Site, Emitted)):
            return True
        home = type(module).__module__
        if home.startswith("attncompiler.blocks.mlp"):
            return False
        return home.startswith(("torch.nn", "attncompiler.blocks"))


def trace(module: nn.Module, method: str = "forward") -> fx.Graph:
    """The graph of one method of `module`. Optional arguments stay placeholders with their default None."""
    tracer = LayerTracer()
    tracer.traced_func_name = method
    with _TRACING:
        graph = tracer.trace(module)
    for node in graph.nodes:
        node.type = None  # annotations are text here, which fx would turn into names that mean nothing
    graph.lint()
    return graph


def share_classes(layers: Iterable[nn.Module]) -> None:
    """Give layers whose generated code is the same text one class, so that Dynamo compiles them once for all.

    A layer that is recompiled later gets a class of its own again, so the others stay as they are.
    """
    seen: dict[str, type] = {}
    for layer in layers:
        if isinstance(layer, Emitted):
            layer.__class__ = seen.setdefault(layer.code, type(layer))
            layer.__dict__["shares_class"] = True


def free_method(root: nn.Module, graph: fx.Graph) -> Any:
    """The function `(self, …)` that fx generates for `graph`, to be bound to any module with root's children."""
    return type(fx.GraphModule(root, graph)).forward
