"""The grammar of a spec, as frozen pydantic models. Field names are those of HF's configs where one exists."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Discriminator, Field, PrivateAttr, Tag

from attncompiler.errors import Location
from attncompiler.mechanisms.base import FILLED, Factor, KernelNames, Length, Policy, StrictModel, discover
from attncompiler.spec.nodes import Node, locate
from attncompiler.targets.target import Target

if TYPE_CHECKING:
    from attncompiler.spec.expand import ResolvedLayer

    AnyPolicy = Policy
else:
    AnyPolicy = Annotated[
        reduce(or_, (mechanism.policy for mechanism in discover().values())), Field(discriminator="kind")
    ]
    """A policy of any mechanism that was found, told apart by `kind`."""

Activation = Literal["silu", "gelu", "gelu_pytorch_tanh", "relu"]


class SpecModel(StrictModel, allow_inf_nan=False):
    """Base of the grammar's own sections: no infinite number fits anywhere in them."""


# --- the model section ------------------------------------------------------------------------------------------


class Embedding(SpecModel):
    """What is added to, and done with, the token embeddings before the first layer."""

    positions: Literal["none", "learned"] = Field(default="none", description="learned: a table of absolute positions")
    token_types: int = Field(default=0, ge=0, lt=2**20, description="size of the token type table; 0: none")
    norm: bool = Field(default=False, description="normalise the embeddings")
    multiplier: Factor = Field(default=1.0, description="the embeddings are multiplied by it")


class Norm(SpecModel):
    """The norms of layers and of the last hidden states."""

    kind: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    eps: Factor = 1e-5
    position: Literal["pre", "post", "sandwich"] = Field(
        default="pre", description="before the mixer and MLP, after, or both"
    )


class Mlp(SpecModel):
    """A feed-forward part: gated is down(act(gate(x)) · up(x)), plain is down(act(up(x)))."""

    kind: Literal["gated", "plain"]
    intermediate_size: int = Field(ge=1, lt=2**24)
    hidden_act: Activation = "silu"
    bias: bool = False


class NoMlp(SpecModel):
    """A layer that is a mixer alone."""

    kind: Literal["none"] = "none"


AnyMlp = Annotated[Mlp | NoMlp, Field(discriminator="kind")]


class MlpChanges(SpecModel):
    """What a layer changes of `model.mlp`; what it does not name stays."""

    kind: Literal["gated", "plain", "none"] | None = None
    intermediate_size: int | None = Field(default=None, ge=1, lt=2**24)
    hidden_act: Activation | None = None
    bias: bool | None = None


class LmHead(SpecModel):
    """Logits over the vocabulary for every token."""

    kind: Literal["lm"] = "lm"
    bias: bool = False
    tie_word_embeddings: bool = Field(default=False, description="the head's weight is the embedding's")
    final_logit_softcapping: Factor | None = Field(default=None, description="logits become cap · tanh(logits / cap)")


class ClassifierHead(SpecModel):
    """Logits over labels for every sequence."""

    kind: Literal["classifier"]
    num_labels: int = Field(ge=1, lt=2**31)
    pooling: Literal["first", "last", "mean"] = Field(default="last", description="over the real tokens of a sequence")


class NoHead(SpecModel):
    """The model gives its last hidden states."""

    kind: Literal["none"]


class Model(SpecModel):
    """What all layers share."""

    input: Literal["tokens", "embeds"] = Field(
        default="tokens", description="embeds: hidden states are fed, no vocabulary"
    )
    vocab_size: int | None = Field(default=None, ge=1, lt=2**31)
    hidden_size: int = Field(ge=1, lt=2**20)
    max_position_embeddings: int = Field(
        default=2048, ge=1, lt=2**40, description="the longest sequence the model is meant for"
    )
    embedding: Embedding = Embedding()
    norm: Norm = Norm()
    block: Literal["sequential", "parallel"] = Field(
        default="sequential", description="MLP after the mixer, or beside it"
    )
    mlp: AnyMlp
    head: Annotated[LmHead | ClassifierHead | NoHead, Field(discriminator="kind")] = LmHead()
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = Field(
        default="float32", description="of the parameters"
    )


# --- layers -----------------------------------------------------------------------------------------------------


class Layer(SpecModel):
    """One layer, or `repeat` equal ones."""

    policy: str = Field(description="a name from policies")
    mlp: MlpChanges | None = Field(default=None, description="merged over model.mlp")
    share: str | None = Field(default=None, description="layers of equal name share their weights")
    repeat: Length = 1


class Group(SpecModel):
    """Layers in order, the whole `repeat` times."""

    layers: tuple[AnyLayer, ...]
    repeat: Length = 1


def _layer_or_group(value: Any) -> str:
    if isinstance(value, Mapping):
        return "Group" if "layers" in value and "policy" not in value else "Layer"
    return type(value).__name__ if isinstance(value, (Layer, Group)) else "Layer"


AnyLayer = Annotated[Annotated[Layer, Tag("Layer")] | Annotated[Group, Tag("Group")], Discriminator(_layer_or_group)]
Group.model_rebuild()

# --- the whole --------------------------------------------------------------------------------------------------


class Fallback(SpecModel):
    """Which kernels may serve, in which order, and what a failure at run time does."""

    order: dict[str, Literal["auto"] | KernelNames] = Field(
        default={}, description="per mechanism: auto, or kernel names"
    )
    on_failure: Literal["next", "raise"] = "next"


class Origin:
    """The document that a spec was read from, or none. It is no part of what the spec says: any two are equal."""

    def __init__(self, root: Node | None = None):
        self.root = root

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Origin)

    __hash__ = None  # type: ignore[assignment]


class ModelSpec(SpecModel):
    """A spec: validated, frozen, and independent of any hardware."""

    spec_version: int = Field(default=1, ge=1, le=1, description="of this grammar")
    name: str = Field(description="of the artifact and its folder")
    seed: int = Field(default=0, ge=0, lt=2**63, description="of the initial weights")
    deterministic: bool = Field(default=False, description="use only kernels that repeat bit for bit")
    model: Model
    policies: dict[str, AnyPolicy] = Field(description="named mixer configurations")
    layers: Annotated[tuple[AnyLayer, ...], FILLED] = Field(description="from first to last")
    targets: Annotated[tuple[str | Target, ...], FILLED] = Field(
        default=("cpu",), description="built-in names, or facts; all are planned"
    )
    fallback: Fallback = Fallback()
    _origin: Origin = PrivateAttr(default_factory=Origin)

    def came_from(self, root: Node) -> ModelSpec:
        """The spec itself, which from now on knows where in the document its parts stand."""
        self._origin = Origin(root)
        return self

    def place(self, *path: str | int) -> Location | None:
        """Where a part stands in the file that the spec was read from; None for a spec that was made in Python."""
        root = self._origin.root
        return None if root is None else locate(root, path)

    @cached_property
    def resolved_layers(self) -> tuple[ResolvedLayer, ...]:
        """Every layer in order, with groups repeated, policies looked up and MLP changes merged."""
        from attncompiler.spec.expand import expand

        return expand(self)
