"""The laws of whole models, each held on one batch: what a model gives by one road and what it gives by another.

A law speaks of the function that a model computes, so the model runs in fp64, where rounding is far below what any
fault does, and is held to the budget of fp32: what the same model loses in fp32 on the same batch. Rounding itself is
judged where it arises, kernel by kernel, in the spec's own dtype.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from attncompiler import pipeline
from attncompiler.emit import CompiledModel
from attncompiler.mechanisms.base import discover
from attncompiler.planning import plan
from attncompiler.runtime.site import Site
from attncompiler.spec.model import ModelSpec
from attncompiler.targets.detect import detect_environment, detect_target
from attncompiler.testing.budget import Oracle, judge, oracle
from attncompiler.testing.capture import SiteCall, enlivened, recorded
from attncompiler.testing.conformance import Trial, evaluate, kernel_call, pair_call, prepared, refusals_of
from attncompiler.testing.strategies.inputs import IGNORED, Inputs

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Broken:
    """A law that does not hold: its name (one word), where, and by how much."""

    law: str
    place: str
    detail: str

    def __str__(self) -> str:
        return f"{self.law}: {self.place}: {self.detail}"


@dataclass
class Subject:
    """The model of a spec and a batch for it, on a device, and what became of it."""

    inputs: Inputs
    device: str = "cpu"
    judged: int = 0
    """calls of kernels that were held to the reference"""
    refused: bool = False
    """no allowed kernel serves the batch, and it was said why"""

    @property
    def spec(self) -> ModelSpec:
        return self.inputs.spec

    @cached_property
    def own(self) -> CompiledModel:
        """In the spec's dtype."""
        return self._model(None)

    @cached_property
    def wide(self) -> CompiledModel:
        """In fp64, or in fp32 where a kernel that the spec demands takes no more."""
        model = self.spec.model.model_copy(update={"dtype": "float64"})
        widened = self.spec.model_copy(update={"model": model})
        here = plan(widened, detect_target(self.device.partition(":")[0]), detect_environment())
        return self.single if here.unserved(widened) else self._model(torch.float64)

    @cached_property
    def exact(self) -> CompiledModel:
        """In fp64, on the reference where a kernel that the spec demands takes no more than fp32."""
        if self.wide is not self.single:
            return self.wide
        spec = self.spec
        policies = {name: policy.model_copy(update={"kernel": "eager"}) for name, policy in spec.policies.items()}
        fields = {name: getattr(spec, name) for name in spec.model_fields_set}
        return self._model(torch.float64, ModelSpec(**fields | {"policies": policies}))

    @cached_property
    def single(self) -> CompiledModel:
        """In fp32."""
        return self.own if self.spec.model.dtype == "float32" else self._model(torch.float32)

    def _model(self, dtype: torch.dtype | None, spec: ModelSpec | None = None) -> CompiledModel:
        model = pipeline.build(spec or self.spec, device=self.device, dtype=dtype)
        enlivened(model, self.inputs.seed)
        return model.eval()

    def given(self, model: CompiledModel) -> dict[str, Tensor]:
        """The batch as arguments of one of the models."""
        return self.inputs.forward(device=self.device, dtype=model.dtype)

    @cached_property
    def weight(self) -> Tensor:
        """What the outputs are multiplied by before they are summed and differentiated: Gaussian, 0 on padding."""
        with torch.no_grad():
            shape = self.single(**self.given(self.single)).shape
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(self.inputs.seed), dtype=torch.float64)
        if len(shape) == 3:
            drawn = drawn * self.inputs.real()[..., None]
        return drawn.to(self.device)

    def results(self, model: CompiledModel, outputs: Tensor) -> Results:
        """The outputs at real tokens, and the gradient of every parameter."""
        names, parameters = zip(*model.named_parameters(), strict=True)
        scaled = (outputs.double() * self.weight).sum()
        found = torch.autograd.grad(scaled, parameters, allow_unused=True)
        real = torch.where(self.weight != 0, outputs, 0) if outputs.dim() == 3 else outputs
        grads = {
            f"grad {name}": torch.zeros_like(parameter) if grad is None else grad
            for name, parameter, grad in zip(names, parameters, found, strict=True)
        }
        return {"out": real.detach(), **grads}

    @cached_property
    def truth(self) -> Oracle:
        """The whole batch in one call: its results, and what fp32 loses of them."""
        exact, low = (
            {name: t.double().cpu() for name, t in self.results(model, model(**self.given(model))).items()}
            for model in (self.exact, self.single)
        )
        lost = {name: (low[name] - exact[name]).abs() for name in exact}
        return oracle(exact, lost, self.given(self.single), torch.float32)

    def held(self, law: str, road: str, found: Mapping[str, Tensor]) -> Iterator[Broken]:
        """What of the results of another road is not as the whole batch's."""
        truth = self.truth
        part = Oracle(
            {name: truth.exact[name] for name in found},
            {name: truth.low_error[name] for name in found},
            truth.eps,
            truth.scale,
        )
        for verdict in judge(found, part):
            if not verdict.ok:
                yield Broken(law, road, str(verdict))


# --- the laws -----------------------------------------------------------------------------------------------------


def kernels(subject: Subject) -> Iterator[Broken]:
    """Every kernel of each site's chain is within the budget on the calls that the model makes, and none fails.

    The calls are those of a training step and, where the model decodes, of a prefill, of one more token and of the
    rest; outputs and gradients, against the fp64 reference.
    """
    model, given = subject.own, subject.given(subject.own)
    with torch.no_grad(), recorded() as seen:
        model.train()(**given)
        model.eval()
        if _steps(subject):
            for _ in _stepped(subject, model, [subject.inputs.seed % subject.inputs.length + 1, 1]):
                pass
    dtype = getattr(torch, subject.spec.model.dtype)
    for call in seen.calls:
        yield from judged(subject, call, dtype)
    for site in (module for module in model.modules() if isinstance(module, Site)):
        for (kernel, direction), cause in site.record.failures.items():
            yield Broken("kernels", f"{site.chain.label} {kernel}", f"{direction} failed with {cause}")


def judged(subject: Subject, call: SiteCall, dtype: torch.dtype) -> Iterator[Broken]:
    """What of one call is over the budget, by each kernel of its chain that serves it.

    A call of low precision is judged in fp32, too, whose budget hides less.
    """
    if dtype.itemsize < 4:
        yield from judged(subject, call, torch.float32)
    case = prepared(call.case, dtype, subject.device)
    trial = Trial(call.mechanism, case, dtype)

    def serves(name: str) -> bool:
        kernel = call.mechanism.kernel(name)
        return kernel is not None and not refusals_of(kernel, case)

    first, last = call.chain.kernels[:1], call.chain.backward
    runs = {name: kernel_call(name) for name in filter(serves, call.chain.kernels)}
    if last is not None and {*first, last} <= runs.keys():
        runs[f"{first[0]}, backward {last}"] = pair_call(first[0], last)
    for name, run in runs.items():
        subject.judged += 1
        for verdict in trial.verdicts(partial(evaluate, run)):
            if not verdict.ok:
                yield Broken("kernels", f"{call.chain.label} {name}", f"{verdict}, on {case!r}")


def alone(subject: Subject) -> Iterator[Broken]:
    """Each sequence and each packed document gives alone, without its padding, what it gives in the batch."""
    inputs = subject.inputs
    classifies = subject.spec.model.head.kind == "classifier"
    if inputs.batch == 1 and not inputs.padding and (not inputs.cuts or classifies):
        return
    if classifies and inputs.cuts:
        return  # a class is of a row, whatever is packed in it
    model = subject.wide
    given, real, ids = subject.given(model), inputs.real(), inputs.segments() if inputs.cuts else None
    outputs = torch.zeros(subject.weight.shape, dtype=model.dtype, device=subject.device)
    pieces = []
    for row in range(inputs.batch):
        for segment in [None] if ids is None else ids[row].unique().tolist():
            kept = real[row] if segment is None or ids is None else real[row] & (ids[row] == segment)
            index = kept.nonzero()[:, 0].to(subject.device)
            if len(index):
                mine = {
                    n: t[row : row + 1, index] for n, t in given.items() if n not in ("attention_mask", "segment_ids")
                }
                pieces.append((row, index, model(**mine)))
    for row, index, piece in pieces:
        place = (torch.tensor([row], device=subject.device),) if classifies else (torch.tensor(row), index)
        outputs = outputs.index_put(place, piece if classifies else piece[0])
    road = "packed documents alone" if inputs.cuts else "sequences alone, without padding"
    yield from subject.held("alone", road, subject.results(model, outputs))


def causality(subject: Subject) -> Iterator[Broken]:
    """Where every mixer is causal, other tokens later change nothing before them."""
    causal = all(discover()[layer.policy.kind].causal(layer.policy) for layer in subject.spec.resolved_layers)
    inputs = subject.inputs
    if not causal or subject.spec.model.head.kind == "classifier" or inputs.length == 1:
        return
    start = 1 + inputs.seed % (inputs.length - 1)
    given = subject.given(subject.wide)
    if "input_ids" in given:
        later = torch.arange(inputs.length, device=subject.device) >= start
        given["input_ids"] = (given["input_ids"] + later) % (subject.spec.model.vocab_size or 1)
    else:
        embeds = given["inputs_embeds"]
        given["inputs_embeds"] = torch.cat([embeds[:, :start], 1.5 * embeds[:, start:].flip(1)], 1)
    with torch.no_grad():
        changed = subject.wide(**given)
    shown = torch.where(subject.weight != 0, changed, 0).double().cpu()
    joined = torch.cat([shown[:, :start], subject.truth.exact["out"][:, start:]], 1)
    yield from subject.held("causality", f"tokens from {start} on changed", {"out": joined})


def steps(subject: Subject) -> Iterator[Broken]:
    """Decoding, in a prefill and steps of one and of more tokens, gives what the whole sequence gives at once."""
    if not _steps(subject):
        return
    pieces = [subject.inputs.seed % subject.inputs.length + 1, 1, 1, 2, 1]
    with torch.no_grad():
        found = torch.cat(list(_stepped(subject, subject.wide, pieces)), 1)
    found = torch.where(subject.weight != 0, found, 0)
    yield from subject.held("steps", f"pieces of {pieces} tokens and the rest", {"out": found})


def loss(subject: Subject) -> Iterator[Broken]:
    """The fused loss is the cross-entropy of the model's own logits."""
    if subject.spec.model.head.kind == "none":
        return
    values = []
    for model in (subject.wide, subject.single):
        given = subject.inputs.loss(device=subject.device, dtype=model.dtype)
        with torch.no_grad():
            fused, labels = model.loss(**given), given.pop("labels")
            logits = model(**given)
        kept = labels != IGNORED
        plain = F.cross_entropy(logits[kept].double(), labels[kept]) if kept.any() else fused.new_zeros(()).double()
        values.append((fused.double().cpu(), plain.cpu()))
    (fused, exact), (low, _) = values
    truth = oracle({"loss": exact}, {"loss": (low - exact).abs()}, {}, torch.float32)
    yield from (
        Broken("loss", "model.loss", str(verdict)) for verdict in judge({"loss": fused}, truth) if not verdict.ok
    )


def repeatable(subject: Subject) -> Iterator[Broken]:
    """A deterministic spec gives the same bits twice, in outputs and gradients."""
    if not subject.spec.deterministic:
        return
    model, given = subject.own, subject.given(subject.own)
    first, second = (subject.results(model, model(**given)) for _ in range(2))
    for name, tensor in first.items():
        if not torch.equal(tensor, second[name]):
            yield Broken("repeatable", name, "differs between two runs")


def stored(subject: Subject) -> Iterator[Broken]:
    """A model that was saved and loaded gives the same bits. For one batch in eight, as it writes a folder."""
    if subject.inputs.seed % 8 != 7:
        return
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = pipeline.save(subject.own, Path(folder) / "model")
        loaded = pipeline.load(path, device=subject.device).eval()
        given = subject.given(subject.own)
        if not torch.equal(loaded(**given), subject.own(**given)):
            yield Broken("stored", "model", "gives other outputs after it was saved and loaded")


LAWS: dict[str, Callable[[Subject], Iterator[Broken]]] = {
    "kernels": kernels,
    "alone": alone,
    "causality": causality,
    "steps": steps,
    "loss": loss,
    "repeatable": repeatable,
    "stored": stored,
}


def _steps(subject: Subject) -> bool:
    """Whether the model decodes, and the batch is one that decoding takes."""
    return "step" in subject.own.graphs and not subject.inputs.cuts


def _stepped(subject: Subject, model: CompiledModel, pieces: list[int]) -> Iterator[Tensor]:
    """The outputs of steps over pieces of these sizes, cut where the sequence ends, and over the rest."""
    given, T = subject.given(model), subject.inputs.length
    tokens = given["input_ids"] if "input_ids" in given else given["inputs_embeds"]
    mask = given.get("attention_mask")
    state, start = model.init_state(subject.inputs.batch, T, lengths=subject.inputs.real().sum(1)), 0
    for size in [*pieces, T]:
        stop = min(start + size, T)
        if stop > start:
            piece, state = model.step(tokens[:, start:stop], state, None if mask is None else mask[:, start:stop])
            yield piece
        start = stop
