"""What every emitted model must be, checked before it leaves emit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from attncompiler.runtime.site import Site

if TYPE_CHECKING:
    from attncompiler.emit.model import CompiledModel


def verify(model: CompiledModel) -> None:
    """Raises AssertionError, an error of this package and not of its user, when the model is not sound.

    Every graph is well formed, every layer has exactly one site, and the site's node says its policy and chain.
    """
    for graph in (model.graph, *model.graphs.values()):
        graph.owning_module = model
        graph.lint()
    for name, layer in model.layers.items():
        if not isinstance(layer, fx.GraphModule):
            raise AssertionError(f"layers.{name} is not a GraphModule")
        layer.graph.lint()
        sites = [
            node
            for node in layer.graph.nodes
            if node.op == "call_module" and isinstance(layer.get_submodule(node.target), Site)
        ]
        if len(sites) != 1 or "attncompiler" not in sites[0].meta:
            raise AssertionError(f"layers.{name} must have one site that says its policy, and has {len(sites)}")
