"""Generation: greedy and drawn, of prompts of any lengths, until an end token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tiny import ENCODERS, MIXERS, model, tokens
from torch import Tensor

import attncompiler
from attncompiler import generation
from attncompiler.emit import CompiledModel
from attncompiler.errors import InputError

ALL = {**{name: (policy,) for name, policy in MIXERS.items()}, "hybrid": tuple(MIXERS.values())}
DYNAMIC = "{rope_type: dynamic, factor: 4.0, rope_theta: 50.0, original_max_position_embeddings: 5}"
"""frequencies that follow from a sequence's length"""
STRETCHED = {
    f"dynamic {kind}": (f"{{kind: {kind}, num_attention_heads: 2, rope_parameters: {DYNAMIC}}}",)
    for kind in ("attention", "linear_attention")
}
SHARP = "head: {kind: lm, tie_word_embeddings: false}"


def sharp(*policies: str) -> CompiledModel:
    """A model whose logits are far apart, so that rounding decides no token."""
    built = model(*policies, layers=1, form=SHARP)
    with torch.no_grad():
        built.lm_head.weight.mul_(40)
    return built


def by_forward(built: CompiledModel, prompt: Tensor, count: int) -> Tensor:
    """Greedy tokens after one prompt (P,), each by the whole forward."""
    for _ in range(count):
        prompt = torch.cat([prompt, built(prompt[None])[0, -1:].argmax(-1)])
    return prompt


@pytest.mark.parametrize("kind", ALL)
def test_greedy_tokens_are_those_of_the_forward(kind: str) -> None:
    built = sharp(*ALL[kind])
    prompts = tokens(2, 6)
    found = attncompiler.generate(built, prompts, max_new_tokens=12)
    assert torch.equal(found, torch.stack([by_forward(built, prompt, 12) for prompt in prompts]))
    assert not found.requires_grad


@pytest.mark.parametrize("kind", ALL | STRETCHED)
@pytest.mark.parametrize("side", ["left", "right", "list"])
def test_prompts_of_unequal_length_continue_as_alone(kind: str, side: str) -> None:
    built = sharp(*(ALL | STRETCHED)[kind])
    prompts = [tokens(1, length, seed=length)[0] for length in (9, 1, 5)]
    mask = torch.tensor([[1] * 9, [0] * 8 + [1], [0] * 4 + [1] * 5])
    given: Any = prompts
    if side != "list":
        given, mask = torch.full((3, 9), 7), mask if side == "left" else mask.flip(1)
        for row, real, prompt in zip(given, mask, prompts, strict=True):
            row[real.bool()] = prompt
    found = attncompiler.generate(built, given, max_new_tokens=10, attention_mask=None if side == "list" else mask)
    assert found.shape == (3, 19)
    for row, prompt in zip(found, prompts, strict=True):
        alone = attncompiler.generate(built, prompt[None], max_new_tokens=10)
        assert torch.equal(row[9:], alone[0, len(prompt) :])


def test_padding_of_a_prompt_needs_no_learned_position() -> None:
    built = model(MIXERS["attention"], form="embedding: {positions: learned}")
    limit = built.embed_positions.num_embeddings
    prompts, mask = tokens(2, limit), torch.ones(2, limit, dtype=torch.bool)
    mask[:, : limit - 4] = False
    found = attncompiler.generate(built, prompts, max_new_tokens=10, attention_mask=mask)
    assert torch.equal(found[:, -14:], attncompiler.generate(built, prompts[:, -4:], max_new_tokens=10))
    with pytest.raises(InputError, match=f"{limit} learned positions, and {limit + 1} are asked for"):
        attncompiler.generate(built, prompts, max_new_tokens=2)


def test_a_long_prompt_goes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    built = sharp(*ALL["hybrid"])
    prompts, mask = tokens(3, 11), torch.ones(3, 11)
    mask[1, 2:], mask[2, :5] = 0, 0
    expected = [attncompiler.generate(built, prompts, max_new_tokens=6, attention_mask=each) for each in (None, mask)]
    monkeypatch.setattr(generation, "PIECE", 3 * 64 * 4)
    found = [attncompiler.generate(built, prompts, max_new_tokens=6, attention_mask=each) for each in (None, mask)]
    assert torch.equal(torch.stack(found), torch.stack(expected))


def scripted(monkeypatch: pytest.MonkeyPatch, script: Tensor) -> CompiledModel:
    """A model that says the tokens (B, N) whatever it reads."""
    built = model(MIXERS["mamba"], layers=1)
    said = iter(torch.nn.functional.one_hot(script, 64).float().unbind(1))
    monkeypatch.setattr(type(built), "step", lambda self, ids, state, mask=None: (next(said)[:, None], state))
    return built


@pytest.mark.parametrize("every", [1, 4])
def test_what_has_ended_gives_padding_and_all_stop_when_the_last_has(
    monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    monkeypatch.setattr(generation, "_interval", lambda *_: every)
    script = torch.tensor([[5, 9, 5, 5, 5, 5, 5, 5, 5, 5], [5, 6, 7, 8, 3, 5, 5, 9, 5, 5]])
    arguments = {"max_new_tokens": 10, "eos_token_id": [9, 3]}
    found = attncompiler.generate(scripted(monkeypatch, script), tokens(2, 1), **arguments, pad_token_id=2)
    assert found[:, 1:].tolist() == [[5, 9, 2, 2, 2], [5, 6, 7, 8, 3]]
    found = attncompiler.generate(scripted(monkeypatch, script), tokens(2, 1), **arguments)
    assert found[:, 1:].tolist() == [[5, 9, 9, 9, 9], [5, 6, 7, 8, 3]]
    found = attncompiler.generate(scripted(monkeypatch, script), tokens(2, 1), max_new_tokens=10, eos_token_id=3)
    assert found[:, 1:].tolist() == [script[0].tolist(), [5, 6, 7, 8, *[3] * 6]]


def test_compiled_steps_say_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    import functools

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    built = sharp(*ALL["hybrid"])
    expected = attncompiler.generate(built, tokens(2, 6), max_new_tokens=8)
    assert torch.equal(attncompiler.generate(built, tokens(2, 6), max_new_tokens=8, compiled=True), expected)
    assert "compiled_step" in vars(built)


def test_every_step_is_told() -> None:
    built, told = sharp(MIXERS["attention"]), []
    found = attncompiler.generate(built, tokens(2, 4), max_new_tokens=5, on_tokens=told.append)
    assert torch.equal(torch.stack(told, 1), found[:, 4:])


def test_the_model_stays_in_the_mode_it_was_in() -> None:
    built = model("{kind: attention, num_attention_heads: 4, attention_dropout: 0.9}", layers=1).train()
    built.norm.eval()
    modes = [module.training for module in built.modules()]
    seen = []
    built.norm.register_forward_hook(lambda *_: seen.append(any(module.training for module in built.modules())))
    found = attncompiler.generate(built, tokens(1, 4), max_new_tokens=8)
    assert [module.training for module in built.modules()] == modes
    assert seen
    assert not any(seen)
    assert torch.equal(found, attncompiler.generate(built.eval(), tokens(1, 4), max_new_tokens=8))


# --- sampling ---------------------------------------------------------------------------------------------------------

LOGITS = torch.randn(4, 64, generator=torch.Generator().manual_seed(3)) * 3


@given(st.floats(0.1, 5), st.none() | st.integers(1, 80), st.none() | st.floats(0.01, 1))
def test_the_distribution_is_hfs(temperature: float, top_k: int | None, top_p: float | None) -> None:
    transformers = pytest.importorskip("transformers")
    warpers = [transformers.TemperatureLogitsWarper(temperature)]
    warpers += [] if top_k is None else [transformers.TopKLogitsWarper(top_k)]
    warpers += [] if top_p is None else [transformers.TopPLogitsWarper(top_p)]
    scores = LOGITS
    for warper in warpers:
        scores = warper(None, scores)
    found = generation.distribution(LOGITS, temperature, top_k, top_p)
    torch.testing.assert_close(found, scores.softmax(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1e-40, 1e-300, 5e-324])
def test_next_to_no_temperature_is_the_likeliest_token(temperature: float, dtype: torch.dtype) -> None:
    logits = LOGITS.to(dtype)
    for top_k, top_p in ((None, None), (5, None), (None, 0.9)):
        found = generation.distribution(logits, temperature, top_k, top_p)
        expected = torch.nn.functional.one_hot(logits.argmax(-1), 64)
        assert torch.equal(found, expected.to(found.dtype))
    uniform = generation.distribution(logits, 1e300, None, None)
    torch.testing.assert_close(uniform, torch.full_like(uniform, 1 / 64))


@given(st.integers(0, 2**20), st.floats(0.01, 0.99))
@example(422, 0.9899999999999999)  # all tokens are in it
def test_the_nucleus_is_the_fewest_tokens_that_reach_its_mass(seed: int, top_p: float) -> None:
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    whole = logits.softmax(-1)
    kept = generation.distribution(logits, 1.0, None, top_p) > 0
    mass = whole[kept].sum()
    assert mass >= top_p - 1e-12
    assert mass - whole[kept].min() < top_p
    assert (whole[~kept] <= whole[kept].min()).all()


def test_tokens_are_drawn_as_often_as_the_distribution_says() -> None:
    """Within five standard deviations of 4096 draws, for each token; the same seed draws the same tokens."""
    built, prompts, count = model(MIXERS["attention"], layers=1, form=SHARP), tokens(1, 5), 4096
    options: dict[str, Any] = {"max_new_tokens": 1, "do_sample": True, "temperature": 0.3, "top_k": 12, "top_p": 0.9}

    def drawn(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return attncompiler.generate(built, prompts.expand(count, -1), **options, generator=generator)[:, -1]

    expected = generation.distribution(built(prompts)[:, -1].detach(), 0.3, 12, 0.9)[0]
    assert 1 < (expected > 0).sum() <= 12
    frequency = torch.bincount(drawn(0), minlength=64) / count
    deviation = (expected * (1 - expected) / count).sqrt()
    assert ((frequency - expected).abs() <= 5 * deviation).all()
    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


# --- what is refused --------------------------------------------------------------------------------------------------

X = tokens(2, 5)
BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "no tokens asked for": ("E403 max_new_tokens", {"max_new_tokens": 0}),
    "temperature alone": ("E403 temperature needs do_sample=True", {"temperature": 0.5}),
    "top_k alone": ("E403 top_k needs do_sample=True", {"top_k": 5}),
    "top_p alone": ("E403 top_p needs do_sample=True", {"top_p": 0.5}),
    "a generator alone": ("E403 generator needs do_sample=True", {"generator": torch.Generator()}),
    "no heat": ("E403 temperature must be above 0", {"do_sample": True, "temperature": 0.0}),
    "top_k 0": ("E403 top_k", {"do_sample": True, "top_k": 0}),
    "top_p 0": ("E403 top_p", {"do_sample": True, "top_p": 0.0}),
    "top_p above 1": ("E403 top_p", {"do_sample": True, "top_p": 1.5}),
    "an end that is no token": ("E403 token 64 is not one of the model's", {"eos_token_id": [3, 64]}),
    "padding that is no token": ("E403 token 64 is not one of the model's", {"pad_token_id": 64}),
    "padding below 0": ("E403 pad_token_id must be a whole number", {"pad_token_id": -1}),
    "padding that is text": ("E403 pad_token_id must be a whole number", {"pad_token_id": "x"}),
    "padding that is no whole number": ("E403 pad_token_id must be a whole number", {"pad_token_id": 1.5}),
    "padding that is a boolean": ("E403 pad_token_id must be a whole number", {"pad_token_id": True}),
    "an end that is a tensor": ("E403 eos_token_id must be a token id or a list", {"eos_token_id": torch.tensor(5)}),
    "an end that is no whole number": ("E403 eos_token_id must be a token id or a list", {"eos_token_id": 3.0}),
    "a mask that is a list": ("E403 attention_mask must be a tensor, not list", {"attention_mask": [[1] * 5] * 2}),
    "a generator that is a seed": ("E403 generator must be a torch", {"do_sample": True, "generator": 3}),
    "sampling asked for in words": ("E403 do_sample must be True or False, not 'no'", {"do_sample": "no"}),
    "an end that is no number": ("E403 eos_token_id", {"eos_token_id": "x"}),
    "tokens beyond the vocabulary": ("E403 token 64", {"input_ids": X + 64 - int(X.max())}),
    "tokens that are floats": ("E402 input_ids", {"input_ids": X.float()}),
    "one prompt without a batch": ("E401 input_ids", {"input_ids": X[0]}),
    "no prompt": ("E401 prompts in a list", {"input_ids": []}),
    "an empty prompt": ("E401 prompts in a list", {"input_ids": [[1, 2], []]}),
    "a flat list": ("E401 prompts in a list", {"input_ids": [1, 2]}),
    "text": ("E403 a prompt in a list", {"input_ids": "text"}),
    "a prompt that is padding alone": ("E403 a prompt must", {"attention_mask": torch.tensor([[1] * 5, [0] * 5])}),
    "a mask of another shape": ("E401 attention_mask", {"attention_mask": torch.ones(2, 4)}),
    "a list with a mask": ("E403 a list of prompts", {"input_ids": [[1]], "attention_mask": torch.ones(1, 1)}),
    "tokens elsewhere": ("E404 the model is on cpu, and input_ids on meta", {"input_ids": X.to("meta")}),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_are_refused(what: str) -> None:
    message, arguments = BAD[what]
    built = model(MIXERS["attention"], layers=1)
    with pytest.raises(InputError, match=message):
        attncompiler.generate(built, **{"input_ids": X, "max_new_tokens": 3, **arguments})
    assert built.training


def test_models_that_cannot_generate_are_refused() -> None:
    wrong = {
        "E503 .*not causal": model(ENCODERS["full"]),
        "E403 generate needs a language model": model(MIXERS["mamba"], form="head: {kind: none}"),
        "E403 generate takes a model": torch.nn.Linear(2, 2),
        "E403 a model on meta": attncompiler.build(model(MIXERS["mamba"]).spec, device="meta"),
        "E403 generate needs a model of tokens": attncompiler.build("specs/embeds_tiny.yaml", device="cpu"),
        "E401 the model has 64 learned positions": model(MIXERS["mamba"], form="embedding: {positions: learned}"),
    }
    for message, built in wrong.items():
        with pytest.raises(InputError, match=message):
            attncompiler.generate(built, X, max_new_tokens=70)
