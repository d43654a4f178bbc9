"""Laws of whole models: packing, padding, decoding, loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from roads import as_doubles, assert_same, grads_of, over_budget, pair, stepped
from tiny import ENCODERS, MIXERS, model, tokens
from torch import Tensor

from attncompiler.emit import CompiledModel
from attncompiler.errors import InputError
from attncompiler.mechanisms.base import discover

HYBRID = tuple(MIXERS.values())
ALL = {**{name: (policy,) for name, policy in MIXERS.items()}, "hybrid": HYBRID}


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("pieces", [[1] * 15, [15], [6, 1, 1, 7]], ids=["one by one", "at once", "in pieces"])
def test_step_by_step_is_prefill(kind: str, pieces: list[int]) -> None:
    x = tokens(2, 15)
    with torch.no_grad():
        assert_same(pair(*ALL[kind]), lambda built: {"out": stepped(built, x, pieces)}, lambda built: {"out": built(x)})


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_unequal_length_decode_as_alone(kind: str, side: str) -> None:
    x = tokens(2, 12)
    short = 5
    mask = torch.ones(2, 12, dtype=torch.int64)
    padded = x.clone()
    if side == "left":
        mask[1, : 8 - short] = 0
        padded[1, :8] = torch.cat([torch.zeros(8 - short, dtype=torch.int64), x[1, :short]])
    else:
        mask[1, short:8] = 0

    def steps(built: CompiledModel) -> Tensor:
        """The prompt with its mask, and then tokens one by one, of which none is padding."""
        state = built.init_state(2, 20)
        _, state = built.step(padded[:, :8], state, mask[:, :8])
        found = []
        for piece in x[:, 8:].split(1, 1):
            logits, state = built.step(piece, state)
            found.append(logits)
        return torch.cat(found, 1)

    def alone(built: CompiledModel) -> Tensor:
        return torch.cat([built(x[:1])[:, 8:], built(torch.cat([x[1:, :short], x[1:, 8:]], 1))[:, short:]])

    with torch.no_grad():
        assert_same(pair(*ALL[kind]), lambda built: {"out": steps(built)}, lambda built: {"out": alone(built)})


@pytest.mark.parametrize("kind", ALL)
def test_tokens_that_come_at_different_steps_are_as_alone(kind: str) -> None:
    """Each step has padding of its own, in the middle too, and some of one token that is padding."""
    x = tokens(2, 12)
    real = torch.rand(2, 24, generator=torch.Generator().manual_seed(4)).argsort(1).argsort(1) < 12
    spread = torch.full((2, 24), 5).masked_scatter(real, x)
    pieces = [7, 1, 1, 1, 6, 1, 1, 6]

    def steps(built: CompiledModel) -> Tensor:
        return stepped(built, spread, pieces, real)[real].view(2, 12, -1)

    with torch.no_grad():
        assert_same(pair(*ALL[kind]), lambda built: {"out": steps(built)}, lambda built: {"out": built(x)})


@pytest.mark.parametrize("kind", ALL)
def test_gradients_through_steps_are_those_of_the_forward(kind: str) -> None:
    x, y = tokens(2, 12), tokens(2, 12, seed=1)

    def learned(built: CompiledModel, logits: Tensor) -> dict[str, Tensor]:
        return grads_of(built, F.cross_entropy(logits.flatten(0, 1), y.flatten()))

    assert_same(
        pair(*ALL[kind]),
        lambda built: learned(built, stepped(built, x, [5, 1, 1, 5])),
        lambda built: learned(built, built(x)),
    )


def state_bytes(state: dict[str, Any]) -> int:
    """All memory that the layers' states hold on to."""
    parts = [part for layer in state["layers"].values() for part in layer.values() if isinstance(part, Tensor)]
    return sum({part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}.values())


HELD = {"attention": None, "strided": None, "random": None, "window": 7, "local_global": 6, "chunked": 6}
"""keys held at most, where any are: None where every key may be seen again"""


@pytest.mark.parametrize("kind", MIXERS)
def test_a_state_is_as_large_as_what_may_be_seen_again(kind: str) -> None:
    """From the first token to the last, and whatever the length it was made for."""
    built = model(MIXERS[kind], layers=1)
    sizes = {}
    with torch.no_grad():
        for length in (48, 480):
            state = built.init_state(1, length)
            sizes[length] = state_bytes(state)
            for piece in tokens(1, 40).split([13, *[1] * 20, 7], 1):
                _, state = built.step(piece, state)
                assert state_bytes(state) == sizes[length]
    if kind not in HELD:
        assert sizes[48] == sizes[480]
        return
    policy = built.spec.policies["p0"]
    width = policy.kv_heads * (policy.key_width(32) + policy.value_width(32))
    for length, size in sizes.items():
        assert size == 4 * width * (HELD[kind] or length)


def test_every_mechanism_that_can_decode_is_among_these() -> None:
    policies = [model(policy, layers=1).spec.policies["p0"] for policy in MIXERS.values()]
    kinds = {policy.kind for policy in policies if discover()[policy.kind].causal(policy)}
    assert kinds == discover().keys() - {"linformer"}


@pytest.mark.parametrize("batch", [1, 2])
def test_a_compiled_step_is_not_compiled_at_every_step(batch: int) -> None:
    """A few times at first, while what changes from step to step is found out, and then never again: not at the last
    token, which fills the state, either."""
    models = _, built = pair(MIXERS["attention"], MIXERS["window"], MIXERS["mamba2"], MIXERS["strided"])
    x, compiles = tokens(batch, 40), []
    step = torch.compile(built.step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        _, state = built.step(x[:, :10], built.init_state(batch, 40))
        for token in x[:, 10:].split(1, 1):
            before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            logits, state = step(token, state)
            compiles.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
        exact, low = (as_doubles({"out": made(x)[:, -1:]}) for made in models)
    assert not over_budget({"out": logits}, exact, low, ["out"])
    assert sum(compiles[:10]) <= 3
    assert not any(compiles[10:])


def test_a_step_that_was_compiled_for_any_batch_takes_a_mask() -> None:
    """The first mask comes when the batch has already been of several sizes."""
    built, x = model(MIXERS["attention"], layers=1), tokens(3, 8)
    torch._dynamo.reset()
    step = torch.compile(built.step, fullgraph=True, backend="eager")
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[1, :3] = 0
    with torch.no_grad():
        for batch in (1, 3):
            step(x[:batch], built.init_state(batch, 8))
        found, _ = step(x[:2], built.init_state(2, 8), mask)
        expected, _ = built.step(x[:2], built.init_state(2, 8), mask)
    assert torch.equal(found, expected)
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_step_through_inductor_is_a_step() -> None:
    """A prompt with padding, one without, and single tokens behind either, in turns with eager ones."""
    torch._dynamo.reset()  # what other tests have compiled counts towards torch's limit of 8 for `step`
    models = _, built = pair(*(MIXERS[kind] for kind in ("window", "chunked", "performer", "mamba", "mamba2")))
    x = tokens(2, 16)
    mask = torch.ones(2, 16, dtype=torch.int64)
    mask[1, :3] = 0
    for given in (None, mask):

        def plain(model: CompiledModel, given: Tensor | None = given) -> dict[str, Tensor]:
            return {"out": stepped(model, x, [8, *[1] * 8], given)}

        state, found = built.init_state(2, 16), []
        with torch.no_grad():
            exact, low = (as_doubles(plain(model)) for model in models)
            for number, piece in enumerate(x.split([8, *[1] * 8], 1)):
                step = built.step if number % 4 == 3 else built.compiled_step
                masked = None if given is None else given[:, state["seen"] : state["seen"] + piece.shape[1]]
                logits, state = step(piece, state, masked)
                found.append(logits)
        assert not over_budget({"out": torch.cat(found, 1)}, exact, low, ["out"])


@pytest.mark.parametrize("kind", [*ALL, *ENCODERS])
def test_packed_documents_are_separate_documents(kind: str) -> None:
    a, b = tokens(1, 7), tokens(1, 12, seed=1)
    packed, segments = torch.cat([a, b], 1), torch.tensor([[4] * 7 + [9] * 12])
    with torch.no_grad():
        assert_same(
            pair(*(ALL.get(kind) or (ENCODERS[kind],))),
            lambda built: {"out": built(packed, segment_ids=segments)},
            lambda built: {"out": torch.cat([built(a), built(b)], 1)},
        )


@pytest.mark.parametrize("kind", [*ALL, *ENCODERS])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(kind: str, side: str) -> None:
    """Outputs at real tokens, and the gradients of a loss that ignores the others."""
    x, y, pads = tokens(1, 9), tokens(1, 9, seed=1), torch.full((1, 4), 3)

    def padded(real: Tensor, pads: Tensor) -> Tensor:
        return torch.cat((pads, real) if side == "left" else (real, pads), 1)

    mask, ignored = padded(torch.ones_like(x), torch.zeros_like(pads)), torch.full_like(pads, -100)
    real = slice(4, None) if side == "left" else slice(9)

    def within(built: CompiledModel) -> dict[str, Tensor]:
        out = built(padded(x, pads), attention_mask=mask)[:, real].detach()
        return {"out": out, **grads_of(built, built.loss(padded(x, pads), padded(y, ignored), attention_mask=mask))}

    def alone(built: CompiledModel) -> dict[str, Tensor]:
        return {"out": built(x).detach(), **grads_of(built, built.loss(x, y))}

    assert_same(pair(*(ALL.get(kind) or (ENCODERS[kind],))), within, alone)


@pytest.mark.parametrize("kind", ALL)
def test_the_future_never_reaches_the_past(kind: str) -> None:
    built = model(*ALL[kind], layers=1)
    x = tokens(1, 16)
    changed = x.clone()
    changed[:, 10:] = (x[:, 10:] + 7) % 64
    assert torch.equal(built(changed)[:, :10], built(x)[:, :10])
    assert not torch.equal(built(changed)[:, 10:], built(x)[:, 10:])


@pytest.mark.parametrize(
    "form", ["", "head: {kind: lm, tie_word_embeddings: false, bias: true, final_logit_softcapping: 3.0}"]
)
def test_loss_is_cross_entropy_of_the_logits(form: str) -> None:
    x, y = tokens(), tokens(seed=1)
    y[0, :5] = -100

    def learned(built: CompiledModel, loss: Tensor) -> dict[str, Tensor]:
        return {"out": loss.detach(), **grads_of(built, loss)}

    models = pair(MIXERS["attention"], form=form)
    assert_same(
        models,
        lambda built: learned(built, built.loss(x, y)),
        lambda built: learned(built, F.cross_entropy(built(x).flatten(0, 1), y.flatten())),
    )
    assert models[1].loss(x, torch.full_like(y, -100)) == 0


def test_loss_in_chunks_is_the_loss_at_once() -> None:
    from attncompiler.blocks.head import linear_cross_entropy

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(13, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(5, (13,), generator=generator)
    labels[3:9] = -100
    for softcap in (None, 2.0):
        for chunk in (1, 4, 64):
            assert torch.autograd.gradcheck(
                lambda h, w, b, s=softcap, c=chunk: linear_cross_entropy(h, w, b, labels, s, c), (hidden, weight, bias)
            )


def test_a_full_state_is_an_error_that_says_so() -> None:
    built = model(MIXERS["attention"])
    state = built.init_state(2, 10)
    _, state = built.step(tokens(2, 8), state)
    with pytest.raises(InputError, match="E502 the state holds 10 tokens, and this step would make it 11"):
        built.step(tokens(2, 3), state)


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_model_that_is_not_causal_refuses_to_step(kind: str) -> None:
    built = model(ENCODERS[kind])
    with pytest.raises(InputError, match=r"E503 .*policy 'p0' is not causal"):
        built.init_state(1, 8)
    with pytest.raises(InputError, match="E503"):
        built.step(tokens(), {})


def test_what_does_not_fit_is_refused_at_the_door() -> None:
    built = model(MIXERS["attention"])
    x = tokens(2, 9)
    wrong = [
        ("E402 tokens must be whole numbers", lambda: built(x.float())),
        ("E401 a model takes tokens", lambda: built(x[0])),
        (r"E401 attention_mask must be \(2, 9\)", lambda: built(x, attention_mask=torch.ones(2, 8))),
        (r"E401 position_ids must be \(2, 9\)", lambda: built(x, position_ids=torch.arange(9))),
        ("E402 position_ids must be whole", lambda: built(x, position_ids=torch.ones(2, 9))),
        (r"E401 segment_ids must be \(2, 9\)", lambda: built(x, segment_ids=torch.zeros(3, 9, dtype=torch.int64))),
        ("E401 the state is for 3 sequences", lambda: built.step(x, built.init_state(3, 16))),
    ]
    for message, call in wrong:
        with pytest.raises(InputError, match=message):
            call()
