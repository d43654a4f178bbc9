"""What a model costs: parameters, memory of a training step, time by the roofline, and decode state.

The sizes follow the emitted modules and torch.optim.AdamW: gradients and both moments have their parameter's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from attncompiler.blocks import cost as blocks
from attncompiler.mechanisms.base import Cost, MixerSize
from attncompiler.planning.model import Plan
from attncompiler.planning.planner import ITEMSIZE, mixer_cost, mixer_size, not_causal
from attncompiler.spec.expand import ResolvedLayer
from attncompiler.spec.model import Mlp, ModelSpec
from attncompiler.targets.target import Target

FP32 = 4
NOTHING = Cost()


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the model in the order of the forward: the embedding, a layer, the final norm, the head."""

    name: str
    cost: Cost
    parameter_bytes: int
    """of the parameters that no earlier part has"""
    parameters: int
    mixer: Cost | None = None
    """of a layer: what its mixer costs, which is within `cost`"""
    after: Cost = NOTHING
    """of a layer: what runs after its mixer, which is within `cost`"""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes in one training step: forward, loss, backward, AdamW."""

    parameters: int
    gradients: int
    optimizer: int
    update: int
    """what the optimizer holds beside these while it updates"""
    activations: int
    """kept between forward and backward"""
    working: int
    """the most that activations and workspace are at one moment of the forward and backward"""
    peak: int
    """the most that is live at one moment"""

    @property
    def sharded(self) -> int:
        """What FSDP divides among devices in the forward and backward; in the update, `update` too."""
        return self.parameters + self.gradients + self.optimizer


@dataclass(frozen=True, slots=True)
class Time:
    """Seconds by the roofline (Williams et al. 2009): each part takes its FLOPs or its traffic, whichever is longer.

    A bound from below: the target's full rates, and no time between kernels.
    """

    forward: float
    backward: float
    optimizer: float

    @property
    def step(self) -> float:
        return self.forward + self.backward + self.optimizer


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What a model costs for a batch of B sequences of T tokens on a target."""

    batch: int
    seq_len: int
    parts: tuple[Part, ...]
    parameters: int
    forward_flops: int
    """of the forward with its logits"""
    training_flops: int
    """of forward, loss and backward"""
    memory: Memory
    checkpointed: Memory
    """the same with every layer's activations made again in the backward"""
    time: Time
    state_bytes: int
    """decode state of B sequences of up to T tokens; 0 for a model that cannot decode"""

    @property
    def layers(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.mixer is not None)


def model_cost(spec: ModelSpec, plan: Plan) -> ModelCost:
    """The cost of `spec` as `plan` runs it, for a batch of the plan's size."""
    size = mixer_size(spec, batch=plan.batch, seq_len=plan.seq_len)
    parts = tuple(_parts(spec, plan, size))
    boundary = size.tokens * spec.model.hidden_size * ITEMSIZE[spec.model.dtype]
    total = sum((part.cost for part in parts), NOTHING)
    return ModelCost(
        batch=size.batch,
        seq_len=size.seq_len,
        parts=parts,
        parameters=sum(part.parameters for part in parts),
        forward_flops=total.forward_flops,
        training_flops=total.forward_flops + total.backward_flops,
        memory=_memory(parts, boundary, plan.target, checkpointed=False),
        checkpointed=_memory(parts, boundary, plan.target, checkpointed=True),
        time=_time(parts, plan),
        state_bytes=0 if not_causal(spec) else total.state_bytes,
    )


# --- parts ------------------------------------------------------------------------------------------------------


def _parts(spec: ModelSpec, plan: Plan, size: MixerSize) -> Iterator[Part]:
    model, dtype = spec.model, spec.model.dtype
    embedding = _embedding(spec, size)
    yield _part("embed", embedding, dtype)
    shared: set[str] = set()
    for layer, planned in zip(spec.resolved_layers, plan.layers, strict=True):
        kernel = planned.chain[0] if planned.chain else ""
        mixer = mixer_cost(layer.policy, replace(size, kernel=kernel))
        before, after = _around(spec, layer, size)
        part = _part(f"layers.{layer.index}", before + mixer + after, dtype)
        part = replace(part, mixer=mixer, after=after)
        if layer.share is not None and layer.share in shared:
            part = replace(part, parameters=0, parameter_bytes=0)
        shared |= {layer.share} if layer.share is not None else set()
        yield part
    if model.norm.position != "post":
        yield _part("norm", blocks.norm(model.norm.kind, size.tokens, size.hidden_size, size.itemsize), dtype)
    head = _head(spec, size)
    part = _part("head", head, dtype)
    if model.head.kind == "lm" and model.head.tie_word_embeddings:
        own = head.parameters - _vocabulary(spec) * size.hidden_size
        part = replace(part, parameters=own, parameter_bytes=own * size.itemsize)
    yield part


def _part(name: str, cost: Cost, dtype: str) -> Part:
    wide = max(FP32, ITEMSIZE[dtype])
    stored = (cost.parameters - cost.fp32_parameters) * ITEMSIZE[dtype] + cost.fp32_parameters * wide
    return Part(name, cost, stored, cost.parameters)


def _embedding(spec: ModelSpec, size: MixerSize) -> Cost:
    model, n, M = spec.model, size.tokens, size.hidden_size
    total = NOTHING
    if model.input == "tokens":
        total += blocks.embedding(n, _vocabulary(spec), M, size.itemsize)
    if model.embedding.positions == "learned":
        total += blocks.embedding(n, model.max_position_embeddings, M, size.itemsize)
    if model.embedding.token_types:
        total += blocks.embedding(n, model.embedding.token_types, M, size.itemsize)
    if model.embedding.norm:
        total += blocks.norm(model.norm.kind, n, M, size.itemsize)
    return total


def _around(spec: ModelSpec, layer: ResolvedLayer, size: MixerSize) -> tuple[Cost, Cost]:
    """A layer without its mixer: one norm that runs before it, and norms, residual sums and the MLP after it."""
    model, n, M = spec.model, size.tokens, size.hidden_size
    has_mlp = layer.mlp.kind != "none"
    one = blocks.norm(model.norm.kind, n, M, size.itemsize)
    norms = 1 if has_mlp and model.block == "sequential" else 0
    if model.norm.position == "sandwich":
        norms += 2 if has_mlp else 1
    after = sum((one for _ in range(norms)), NOTHING)
    if isinstance(layer.mlp, Mlp):
        mlp = layer.mlp
        fed = blocks.mlp(mlp.kind, n, M, mlp.intermediate_size, mlp.hidden_act, mlp.bias, size.itemsize)
        if model.block == "parallel":
            # its input is the mixer's, which is counted there
            fed = replace(fed, saved_bytes=fed.saved_bytes - n * M * size.itemsize)
        after += fed
    moved = (2 if has_mlp else 1) * n * M * size.itemsize
    return one, after + Cost(forward_bytes=3 * moved, backward_bytes=2 * moved)


def _vocabulary(spec: ModelSpec) -> int:
    return spec.model.vocab_size or 0


def _head(spec: ModelSpec, size: MixerSize) -> Cost:
    head, n, M = spec.model.head, size.tokens, size.hidden_size
    if head.kind == "lm":
        capped = head.final_logit_softcapping is not None
        return blocks.lm_head(n, M, _vocabulary(spec), head.bias, size.itemsize, capped)
    if head.kind == "classifier":
        return blocks.classifier_head(size.batch, n, M, head.num_labels, head.pooling, size.itemsize)
    return NOTHING


# --- memory -----------------------------------------------------------------------------------------------------


def _memory(parts: Sequence[Part], boundary: int, target: Target, *, checkpointed: bool) -> Memory:
    """The peak over the moments of a step: the end of the forward, each part's backward, the optimizer.

    `boundary` is the size of the hidden states between two layers, and of their gradient.
    """
    parameters = sum(part.parameter_bytes for part in parts)
    optimizer = 2 * parameters
    saved = [boundary if checkpointed and part.mixer is not None else part.cost.saved_bytes for part in parts]
    activations = kept = sum(saved)
    gradients, moments = 0, [(0, kept + parts[-1].cost.workspace_bytes)]
    for part, part_saved in zip(reversed(parts), reversed(saved), strict=True):
        again = part.cost.saved_bytes if checkpointed and part.mixer is not None else 0
        gradients += part.parameter_bytes
        moments += [(gradients, kept + again + boundary + beside) for beside in _beside(part)]
        kept -= part_saved
    # the update holds the square roots of the second moments: of all parameters at once where they are updated together
    largest = max(part.parameter_bytes for part in parts)
    update = parameters if target.device_type == "cuda" else largest
    resting = parameters + optimizer
    return Memory(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        update=update,
        activations=activations,
        working=max(working for _, working in moments),
        peak=resting + max(*(made + working for made, working in moments), gradients + update),
    )


def _beside(part: Part) -> tuple[int, ...]:
    """What the backward of a part needs beside what was kept, at each of its moments: after a mixer, and in it."""
    if part.mixer is None:
        return (part.cost.workspace_bytes,)
    return part.after.workspace_bytes, part.mixer.workspace_bytes - part.after.saved_bytes


# --- time -------------------------------------------------------------------------------------------------------


def _time(parts: Sequence[Part], plan: Plan) -> Time:
    target = plan.target
    matrix = target.matrix_flops.get(plan.dtype, target.vector_flops)  # type: ignore[call-overload]

    def seconds(flops: int, vector: int, moved: int) -> float:
        return max((flops - vector) / matrix + vector / target.vector_flops, moved / target.bandwidth)

    def both(cost: Cost) -> tuple[float, float]:
        return (
            seconds(cost.forward_flops, cost.forward_vector_flops, cost.forward_bytes),
            seconds(cost.backward_flops, cost.backward_vector_flops, cost.backward_bytes),
        )

    directions = [both(part.cost) for part in parts]
    # the update reads parameter, gradient and both moments, and writes all but the gradient
    update = 7 * sum(part.parameter_bytes for part in parts) / target.bandwidth
    return Time(sum(f for f, _ in directions), sum(b for _, b in directions), update)


def layer_time(part: Part, plan: Plan) -> Time:
    """The time of one part of the model, its parameters' update included."""
    return _time((part,), plan)
