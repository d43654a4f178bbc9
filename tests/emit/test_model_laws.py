"""Laws of whole models: packing, padding, decoding, loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from tiny import ENCODERS, MIXERS, gradients, model, tokens
from torch import Tensor

from attncompiler.errors import InputError
from attncompiler.mechanisms.base import discover

HYBRID = tuple(MIXERS.values())
ALL = {**{name: (policy,) for name, policy in MIXERS.items()}, "hybrid": HYBRID}


@pytest.mark.parametrize("kind", ALL)
def test_step_by_step_is_prefill(kind: str) -> None:
    built = model(*ALL[kind], layers=1)
    x = tokens(2, 15)
    expected = built(x)
    for pieces in ([1] * 15, [15], [6, 1, 1, 7]):
        state = built.init_state(2, 20)
        found = []
        for piece in x.split(pieces, 1):
            logits, state = built.step(piece, state)
            found.append(logits)
        torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_unequal_length_decode_as_alone(kind: str, side: str) -> None:
    built = model(*ALL[kind], layers=1)
    x = tokens(2, 12)
    prompt, rest = x[:, :8], x[:, 8:]
    short = 5
    mask = torch.ones(2, 8, dtype=torch.int64)
    padded = prompt.clone()
    if side == "left":
        mask[1, : 8 - short] = 0
        padded[1] = torch.cat([torch.zeros(8 - short, dtype=torch.int64), prompt[1, :short]])
    else:
        mask[1, short:] = 0
    state = built.init_state(2, 20)
    _, state = built.step(padded, state, mask)
    found = []
    for piece in rest.split(1, 1):
        logits, state = built.step(piece, state)
        found.append(logits)
    alone = built(torch.cat([prompt[1:, :short], rest[1:]], 1))[:, short:]
    torch.testing.assert_close(torch.cat(found, 1)[1:], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat(found, 1)[:1], built(x[:1])[:, 8:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ALL)
def test_tokens_that_come_at_different_steps_are_as_alone(kind: str) -> None:
    """Each step has padding of its own, in the middle too, and some of one token that is padding."""
    built = model(*ALL[kind], layers=1)
    x = tokens(2, 12)
    real = torch.rand(2, 24, generator=torch.Generator().manual_seed(4)).argsort(1).argsort(1) < 12
    spread = torch.full((2, 24), 5).masked_scatter(real, x)
    state, found = built.init_state(2, 24), []
    for piece, mask in zip(
        spread.split([7, 1, 1, 1, 6, 1, 1, 6], 1), real.split([7, 1, 1, 1, 6, 1, 1, 6], 1), strict=True
    ):
        logits, state = built.step(piece, state, mask)
        found.append(logits)
    logits = torch.cat(found, 1)[real].view(2, 12, -1)
    torch.testing.assert_close(logits, built(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ALL)
def test_gradients_through_steps_are_those_of_the_forward(kind: str) -> None:
    built = model(*ALL[kind], layers=1)
    x, y = tokens(2, 12), tokens(2, 12, seed=1)
    F.cross_entropy(built(x).flatten(0, 1), y.flatten()).backward()
    expected = gradients(built)
    state, found = built.init_state(2, 16), []
    for piece in x.split([5, 1, 1, 5], 1):
        logits, state = built.step(piece, state)
        found.append(logits)
    F.cross_entropy(torch.cat(found, 1).flatten(0, 1), y.flatten()).backward()
    torch.testing.assert_close(gradients(built), expected, rtol=1e-4, atol=1e-6)


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
    built = model(MIXERS["attention"], MIXERS["window"], MIXERS["mamba2"], MIXERS["strided"], layers=1)
    x, compiles = tokens(batch, 40), []
    step = torch.compile(built.step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        _, state = built.step(x[:, :10], built.init_state(batch, 40))
        for token in x[:, 10:].split(1, 1):
            before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            logits, state = step(token, state)
            compiles.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
        torch.testing.assert_close(logits[:, 0], built(x)[:, -1], rtol=1e-4, atol=1e-5)
    assert sum(compiles[:10]) <= 3
    assert not any(compiles[10:])


@pytest.mark.parametrize("kind", ALL)
def test_packed_documents_are_separate_documents(kind: str) -> None:
    built = model(*ALL[kind], layers=1)
    a, b = tokens(1, 7), tokens(1, 12, seed=1)
    packed, segments = torch.cat([a, b], 1), torch.tensor([[4] * 7 + [9] * 12])
    found = built(packed, segment_ids=segments)
    torch.testing.assert_close(found, torch.cat([built(a), built(b)], 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [*ALL, *ENCODERS])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(kind: str, side: str) -> None:
    built = model(*(ALL.get(kind) or (ENCODERS[kind],)), layers=1)
    x = tokens(1, 9)
    pads = torch.full((1, 4), 3)
    order = (pads, x) if side == "left" else (x, pads)
    masks = (torch.zeros_like(pads), torch.ones_like(x))
    mask = torch.cat(masks if side == "left" else masks[::-1], 1)
    found = built(torch.cat(order, 1), attention_mask=mask)
    real = found[:, 4:] if side == "left" else found[:, :9]
    torch.testing.assert_close(real, built(x), rtol=1e-4, atol=1e-5)
    y = tokens(1, 9, seed=1)
    ignored = torch.full_like(pads, -100)
    built.loss(
        torch.cat(order, 1), torch.cat((ignored, y) if side == "left" else (y, ignored), 1), attention_mask=mask
    ).backward()
    padded = gradients(built)
    built.loss(x, y).backward()
    torch.testing.assert_close(padded, gradients(built), rtol=1e-4, atol=1e-6)


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
    built = model(MIXERS["attention"], form=form)
    x, y = tokens(), tokens(seed=1)
    y[0, :5] = -100
    loss = built.loss(x, y)
    loss.backward()
    found = gradients(built)
    expected = F.cross_entropy(built(x).flatten(0, 1), y.flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, gradients(built), rtol=1e-4, atol=1e-7)
    assert built.loss(x, torch.full_like(y, -100)) == 0


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
