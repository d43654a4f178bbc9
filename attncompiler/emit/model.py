"""The whole model: before tracing as modules with a forward, a step and a loss; after it as a GraphModule."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from attncompiler.blocks.embedding import LearnedPositions, Tokens, TokenTypes
from attncompiler.blocks.head import ClassifierLoss, LMLoss, Pool, SoftCap
from attncompiler.blocks.norm import make_norm
from attncompiler.blocks.positions import Positions, StepPositions, no_position
from attncompiler.emit.trace import Emitted, free_method, share_classes
from attncompiler.emit.weights import described
from attncompiler.errors import InputError, fail
from attncompiler.planning import Plan
from attncompiler.planning.planner import not_causal
from attncompiler.runtime.inputs import whole
from attncompiler.spec.model import ModelSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Model(nn.Module):
    """What is traced. `layers` are GraphModules already; `forward`, `step` and `loss` become one graph each."""

    def __init__(self, spec: ModelSpec, layers: Mapping[str, nn.Module]):
        super().__init__()
        model, width = spec.model, spec.model.hidden_size
        self.embedding, self.head = model.embedding, model.head
        self.takes_tokens = model.input == "tokens"
        self.positions, self.step_positions = Positions(_learned_positions(spec)), StepPositions()
        if model.vocab_size is not None:
            self.embed_tokens = Tokens(model.vocab_size, width)
        if self.embedding.positions == "learned":
            self.embed_positions = LearnedPositions(model.max_position_embeddings, width)
        if self.embedding.token_types:
            self.embed_token_types = TokenTypes(self.embedding.token_types, width)
        if self.embedding.norm:
            self.embed_norm = make_norm(model.norm.kind, width, model.norm.eps)
        self.layers = nn.ModuleDict(layers)
        if model.norm.position != "post":
            self.norm = make_norm(model.norm.kind, width, model.norm.eps)
        if self.head.kind == "lm":
            assert model.vocab_size is not None
            self.lm_head = nn.Linear(width, model.vocab_size, bias=self.head.bias)
            if self.head.final_logit_softcapping is not None:
                self.softcap = SoftCap(self.head.final_logit_softcapping)
            self.lm_loss = LMLoss(self.head.final_logit_softcapping)
        elif self.head.kind == "classifier":
            self.pool = Pool(self.head.pooling)
            self.score = nn.Linear(width, self.head.num_labels, bias=False)
            self.classifier_loss = ClassifierLoss()

    def embed(self, inputs: Tensor, position_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        hidden = self.embed_tokens(inputs) if self.takes_tokens else inputs
        if self.embedding.multiplier != 1.0:
            hidden = hidden * self.embedding.multiplier
        if self.embedding.positions == "learned":
            hidden = hidden + self.embed_positions(position_ids)
        if self.embedding.token_types:
            hidden = hidden + self.embed_token_types(inputs, token_type_ids)
        return self.embed_norm(hidden) if self.embedding.norm else hidden

    def backbone(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        segment_ids: Tensor | None,
        token_type_ids: Tensor | None,
    ) -> Tensor:
        position_ids = self.positions(inputs, attention_mask, position_ids, segment_ids)
        hidden = self.embed(inputs, position_ids, token_type_ids)
        for layer in self.layers.values():
            hidden = layer(hidden, position_ids, segment_ids, attention_mask)[0]
        return self.norm(hidden) if hasattr(self, "norm") else hidden

    def apply_head(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        if self.head.kind == "lm":
            logits = self.lm_head(hidden)
            return self.softcap(logits) if self.head.final_logit_softcapping is not None else logits
        if self.head.kind == "classifier":
            return self.score(self.pool(hidden, attention_mask))
        return hidden

    def forward(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        hidden = self.backbone(inputs, attention_mask, position_ids, segment_ids, token_type_ids)
        return self.apply_head(hidden, attention_mask)

    def step(
        self, inputs: Tensor, state: dict[str, Any], attention_mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        header = self.step_positions(inputs, state, attention_mask)
        position_ids = header["position_ids"]
        hidden = self.embed(inputs, position_ids)
        states = {}
        for name, layer in self.layers.items():
            hidden, states[name] = layer(hidden, position_ids, None, attention_mask, state["layers"][name])
        if hasattr(self, "norm"):
            hidden = self.norm(hidden)
        after = {key: header[key] for key in ("position", "seen", "max_length")}
        return self.apply_head(hidden, attention_mask), {**after, "layers": states}

    def loss(
        self,
        inputs: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        hidden = self.backbone(inputs, attention_mask, position_ids, segment_ids, token_type_ids)
        if self.head.kind == "lm":
            return self.lm_loss(hidden, self.lm_head.weight, self.lm_head.bias, labels)
        return self.classifier_loss(self.apply_head(hidden, attention_mask), labels)


class CompiledModel(Emitted):
    """An emitted model: a GraphModule with `layers`, a `loss` for training and a `step` for decoding.

    `forward(input_ids, attention_mask=None, position_ids=None, segment_ids=None)` gives logits (B, T, vocabulary),
    class scores (B, num_labels), or hidden states (B, T, M), as `model.head` says. input_ids (B, T), any integers
    (`inputs_embeds` (B, T, M) for `input: embeds`); attention_mask (B, T) non-zero for real tokens, on either side;
    position_ids (B, T) replace the counted ones in rotary and learned positions; segment_ids (B, T) keep packed
    documents apart. On a CPU an id that is no token is refused (E403); on a GPU, as in compiled code, nothing is read.

    `spec` and `plan` say what it is; `graphs` holds the graphs of `step` and `loss` beside `graph`; `emitted_with` the
    names, shapes and ties of the weights it was emitted with.
    """

    layers: nn.ModuleDict
    _empty: dict[str, Any] | None = None
    """an empty state, as long as the last one that was given"""

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        class_name: str | None = None,
        *,
        spec: ModelSpec | None = None,
        plan: Plan | None = None,
        graphs: Mapping[str, fx.Graph] | None = None,
        emitted_with: Mapping[str, str] | None = None,
    ):
        super().__init__(root, graph, "CompiledModel")
        self.spec, self.plan = spec, plan
        self.emitted_with = described(self) if emitted_with is None else emitted_with
        self.graphs = dict(graphs or {})
        share_classes(self.layers.values())
        for name, method in self.graphs.items():
            setattr(type(self), f"_generated_{name}", free_method(root, method))

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModel:
        made = CompiledModel(
            self._copy_of_children(memo),
            copy.deepcopy(self.graph),
            spec=self.spec,
            plan=self.plan,
            graphs={name: copy.deepcopy(graph) for name, graph in self.graphs.items()},
            emitted_with=self.emitted_with,
        )
        memo[id(self)] = made
        return made

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """A model is not pickled (E403): its methods are generated, and to read a pickle is to run what it holds."""
        remedy = "write it with attncompiler.save and read it with attncompiler.load, or take its state_dict()"
        raise fail(InputError, "E403", "a compiled model cannot be pickled", remedy=remedy)

    def loss(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        **inputs: Tensor,
    ) -> Tensor:
        """The mean cross-entropy, a scalar in fp32, over labels that are not −100.

        Arguments are forward's and labels; `inputs_embeds` (B, T, M) in the place of input_ids for `input: embeds`. For
        a language model labels (B, T) are aligned with the tokens: labels[b, t] is the token that should follow
        input_ids[b, t]; nothing is shifted here, so that packed and sharded batches need no special case. For a
        classifier labels are (B,). The head is fused with the loss in chunks: the logits are never held whole.
        Raises InputError (E403) for a model without a head, and without inputs or labels.
        """
        if "loss" not in self.graphs:
            raise fail(InputError, "E403", "this model has no head, so it has no loss")
        takes = "inputs_embeds" if self.spec is not None and self.spec.model.input == "embeds" else "input_ids"
        if inputs_embeds is not None and (takes == "input_ids" or input_ids is not None):
            raise fail(InputError, "E403", f"this model takes {takes} alone")
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None or labels is None:
            raise fail(InputError, "E403", f"a loss needs {takes} and labels")
        generated: Callable[..., Tensor] = type(self)._generated_loss  # type: ignore[attr-defined]
        return generated(self, given, labels, attention_mask, position_ids, segment_ids, **inputs)

    @property
    def device(self) -> torch.device:
        """Where the first parameter is."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of embeddings, matrices and what runs between layers; some parameters of recurrences are wider."""
        return min((parameter.dtype for parameter in self.parameters()), key=lambda dtype: dtype.itemsize)

    def init_state(
        self,
        batch: int,
        max_length: int,
        *,
        lengths: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> dict[str, Any]:
        """An empty decode state for B sequences of up to `max_length` tokens, padding included.

        `lengths` (B,) are how many tokens each of them will have without its padding: what learned positions must
        suffice for, and what `dynamic` rotary frequencies follow from, so that a sequence gives in a padded batch what
        it gives alone. They default to `max_length`.
        `device` and `dtype` (of caches; recurrent states are fp32) default to the model's. Raises InputError: E503
        when a layer cannot be run step by step, E403 for sizes that are not whole numbers from 1 and for a device that
        is not here, E401 for more tokens than learned positions, E402 for a dtype that no model has.
        """
        self._refuse_step()
        batch, max_length = whole("batch", batch, 1), whole("max_length", max_length, 1)
        if lengths is not None and lengths.shape != (batch,):
            raise fail(InputError, "E401", f"lengths must be ({batch},), not {tuple(lengths.shape)}")
        limit = _learned_positions(self.spec) if self.spec else None
        if limit is not None and (longest := max_length if lengths is None else int(lengths.max())) > limit:
            raise no_position(limit, longest)
        device = _present(device) if device is not None else self.device
        dtype = self.dtype if dtype is None else dtype
        if dtype not in DTYPES:
            raise fail(InputError, "E402", f"dtype must be {', '.join(map(str, DTYPES))}, not {dtype}")
        layers = {
            name: _mixer(layer).init_state(batch, max_length, device, dtype) for name, layer in self.layers.items()
        }
        if lengths is not None:
            for state in layers.values():
                state.update({name: lengths.to(device, torch.int64) for name in state.keys() & {"rope_length"}})
        position = torch.zeros(batch, dtype=torch.int64, device=device)
        return {"seen": 0, "max_length": max_length, "position": position, "layers": layers}

    def step(
        self, input_ids: Tensor, state: dict[str, Any], attention_mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Run T ≥ 1 more tokens: input_ids (B, T), attention_mask (B, T) of the new tokens → logits and the new state.

        The state given is consumed: use the one returned. Raises InputError: E502 when the state is full, E401 when it
        is another model's.
        """
        self._refuse_step()
        if not torch.compiler.is_compiling() and not self._owns(state):
            message = "the state is not one of this model's: its layers or their sizes differ"
            raise fail(
                InputError, "E401", message, remedy="take the state from this model's init_state or its last step"
            )
        generated: Callable[..., tuple[Tensor, dict[str, Any]]] = type(self)._generated_step  # type: ignore[attr-defined]
        return generated(self, input_ids, state, attention_mask)

    @cached_property
    def compiled_step(self) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
        """`step` through torch.compile, as one graph; what it has compiled is kept with the model."""
        return torch.compile(self.step, fullgraph=True)

    def _owns(self, state: Any) -> bool:
        """Whether a state is one of this model's: its layers' names and sizes are those of an empty one as long."""
        length = state.get("max_length") if isinstance(state, Mapping) else None
        if not isinstance(length, int) or length < 1:
            return False
        if self._empty is None or self._empty["max_length"] != length:
            least = torch.ones(1)  # of sequences in whatever padding, so that learned positions suffice
            self._empty = self.init_state(1, length, lengths=least, device="meta", dtype=torch.float32)
        return _fits(state, self._empty)

    def _refuse_step(self) -> None:
        if "step" in self.graphs:
            return
        reasons = "; ".join(not_causal(self.spec)) if self.spec else "it has no spec"
        raise fail(InputError, "E503", f"this model cannot be run step by step: {reasons}")


def _fits(state: Any, empty: Any) -> bool:
    """Whether a state has the names and sizes of an empty one, its batch aside; a tensor may come in where none was."""
    if isinstance(empty, Tensor):
        return isinstance(state, Tensor) and state.dim() == empty.dim() and state.shape[1:] == empty.shape[1:]
    if isinstance(empty, Mapping):
        same = isinstance(state, Mapping) and state.keys() == empty.keys()
        return same and all(_fits(state[name], part) for name, part in empty.items())
    return isinstance(state, Tensor) or state is None if empty is None else isinstance(state, int)


def _present(device: torch.device | str) -> torch.device:
    """The device. Raises InputError (E403) unless a tensor can be made there."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise fail(InputError, "E403", f"there is no device {str(device)!r} here: {reason}") from None


def _mixer(layer: nn.Module) -> Any:
    return layer.mixer


def _learned_positions(spec: ModelSpec) -> int | None:
    """How many positions have a vector; None where positions have none."""
    return spec.model.max_position_embeddings if spec.model.embedding.positions == "learned" else None
