"""The steps from a spec and its plan to a model."""

from __future__ import annotations

import torch
from torch import fx

from attncompiler.emit import weights
from attncompiler.emit.layer import Layer
from attncompiler.emit.model import CompiledModel, Model
from attncompiler.emit.trace import Emitted, trace
from attncompiler.emit.verify import verify
from attncompiler.planning import Plan, PlannedLayer
from attncompiler.planning.planner import not_causal
from attncompiler.runtime.context import Chain, MixerContext
from attncompiler.runtime.site import Site
from attncompiler.spec import ModelSpec, ResolvedLayer


def emit(spec: ModelSpec, plan: Plan, *, device: torch.device | str, draw: bool = True) -> CompiledModel:
    """A model for `plan`, on `device` ("meta": without storage), in the spec's dtype.

    With `draw` its weights come from the spec's seed; without, they are left empty for a loader to fill.
    """
    device = torch.device(device)
    with torch.device("meta"), _default_dtype(getattr(torch, spec.model.dtype)):
        layers = {str(layer.index): _layer(spec, layer, planned) for layer, planned in _pairs(spec, plan)}
        root = Model(spec, layers)
    _tie(spec, root)
    model = _trace(spec, plan, root)
    verify(model)
    if device.type != "meta":
        weights.materialise(model, spec.seed if draw else None, device)
    return model


def _pairs(spec: ModelSpec, plan: Plan) -> list[tuple[ResolvedLayer, PlannedLayer]]:
    return list(zip(spec.resolved_layers, plan.layers, strict=True))


def _layer(spec: ModelSpec, layer: ResolvedLayer, planned: PlannedLayer) -> Emitted:
    context = MixerContext(
        hidden_size=spec.model.hidden_size,
        layer_index=layer.index,
        num_layers=len(spec.resolved_layers),
        max_position_embeddings=spec.model.max_position_embeddings,
        norm_eps=spec.model.norm.eps,
        chain=Chain(f"layers.{layer.index}.mixer", planned.chain, spec.fallback.on_failure, planned.choice.backward),
        deterministic=spec.deterministic,
    )
    module = Layer(spec, layer, context)
    emitted = Emitted(module, trace(module), "Layer")
    for node in emitted.graph.nodes:
        if node.op == "call_module" and isinstance(emitted.get_submodule(node.target), Site):
            node.meta["attncompiler"] = {
                "policy": layer.policy_name,
                "chain": planned.chain,
                "backward": planned.choice.backward,
                "refusals": planned.refusals,
            }
    return emitted


def _tie(spec: ModelSpec, root: Model) -> None:
    if spec.model.head.kind == "lm" and spec.model.head.tie_word_embeddings:
        root.lm_head.weight = root.embed_tokens.weight
    first: dict[str, torch.nn.Module] = {}
    for layer in spec.resolved_layers:
        if layer.share is not None:
            module = root.layers[str(layer.index)]
            weights.tie(first.setdefault(layer.share, module), module)


def _trace(spec: ModelSpec, plan: Plan, root: Model) -> CompiledModel:
    graphs = {}
    if spec.model.head.kind != "none":
        graphs["loss"] = _named(spec, trace(root, "loss"))
    if not not_causal(spec):
        graphs["step"] = _named(spec, trace(root, "step"))
    return CompiledModel(root, _named(spec, trace(root)), spec=spec, plan=plan, graphs=graphs)


def _named(spec: ModelSpec, graph: fx.Graph) -> fx.Graph:
    """The graph with its arguments as users call them: input_ids or inputs_embeds, token types only where they are."""
    for node in list(graph.nodes):
        if node.op != "placeholder":
            continue
        if node.target == "inputs":
            node.target = node.name = "input_ids" if spec.model.input == "tokens" else "inputs_embeds"
        elif node.target == "token_type_ids" and not node.users:
            graph.erase_node(node)
    return graph


class _default_dtype:
    """torch.set_default_dtype for a block."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.before)
