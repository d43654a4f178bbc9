"""What a model makes of positions: learned, rotary of every type, or none; alone, packed, padded and in decoding.

In fp64, with weights drawn far from their start, so that attention is far from uniform and positions count.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_options import drawn
from tiny import text, tokens
from torch import Tensor

import attncompiler
from attncompiler.emit import CompiledModel
from attncompiler.mechanisms.rope import ROPE_OPTIONS

ATTENTION = "{kind: attention, num_attention_heads: 4, num_key_value_heads: 2"
LINEAR = "{kind: linear_attention, num_attention_heads: 2"
ROPES = {
    "default": "{rope_theta: 50.0}",
    "linear": "{rope_type: linear, factor: 3.0, rope_theta: 50.0, interleaved: true}",
    "dynamic": "{rope_type: dynamic, factor: 2.0, rope_theta: 50.0, original_max_position_embeddings: 5}",
    "yarn": "{rope_type: yarn, factor: 4.0, rope_theta: 30.0, partial_rotary_factor: 0.5, beta_fast: 8.0}",
    "llama3": "{rope_type: llama3, factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, "
    "original_max_position_embeddings: 16, rope_theta: 100.0}",
}
ROTARY = {
    f"{name}, {kind}": f"{policy}, rope_parameters: {rope}}}"
    for name, rope in ROPES.items()
    for kind, policy in (("attention", ATTENTION), ("linear", LINEAR))
}
NONE = f"{ATTENTION}}}"
CASES = {
    **{name: (policy,) for name, policy in ROTARY.items()},
    "rms": (f"{ATTENTION}, qk_norm: rms, rope_parameters: {ROPES['default']}}}",),
    "l2": (f"{ATTENTION}, qk_norm: l2, rope_parameters: {ROPES['default']}}}",),
    "learned": (NONE,),
    "rotary beside none": (ROTARY["default, attention"], NONE),
    "rotary of two lengths": (ROTARY["dynamic, attention"], ROTARY["default, attention"]),
}
DYNAMIC = [name for name in CASES if "dynamic" in name or "two lengths" in name]


def model(name: str) -> CompiledModel:
    form = "embedding: {positions: learned}" if name == "learned" else ""
    return drawn(text(*CASES[name], layers=1, model=form))


def decoded(built: CompiledModel, pieces: list[tuple[Tensor, Tensor | None]], max_length: int) -> Tensor:
    """Logits of the pieces, each tokens (B, T) and their mask, run one after the other."""
    state, found = built.init_state(len(pieces[0][0]), max_length), []
    for piece, mask in pieces:
        logits, state = built.step(piece, state, mask)
        found.append(logits)
    return torch.cat(found, 1)


def test_every_rope_type_is_among_these() -> None:
    assert ROPES.keys() == ROPE_OPTIONS.keys()


@pytest.mark.parametrize("name", CASES)
def test_a_token_counts_its_place(name: str) -> None:
    """Two equal tokens before the last one, exchanged with another: without positions a layer could not tell."""
    built, x = model(name), tokens(1, 9)
    x[:, 2], x[:, 5] = 1, 2
    other = x.clone()
    other[:, 2], other[:, 5] = 2, 1
    assert not torch.allclose(built(x)[:, -1], built(other)[:, -1], atol=1e-3)


def test_a_layer_without_rotary_beside_one_with_it_sees_no_positions() -> None:
    built, hidden = model("rotary beside none"), torch.randn(1, 9, 32, dtype=torch.float64)
    near, far = torch.arange(9)[None], torch.arange(9)[None] * 3
    turned, same = ([layer(hidden, ids)[0] for ids in (near, far)] for layer in built.layers.values())
    assert not torch.allclose(*turned, atol=1e-3)
    assert torch.equal(*same)


@pytest.mark.parametrize("name", CASES)
def test_packed_padded_and_alone_are_one(name: str) -> None:
    built, a, b = model(name), tokens(1, 7), tokens(1, 12, seed=1)
    alone = torch.cat([built(a), built(b)], 1)
    segments = torch.tensor([[4] * 7 + [9] * 12])
    torch.testing.assert_close(built(torch.cat([a, b], 1), segment_ids=segments), alone)
    for before in (0, 2, 5):
        sides = before, 5 - before
        padded = torch.cat([torch.nn.functional.pad(a, sides, value=3), b])
        mask = torch.cat([torch.nn.functional.pad(torch.ones_like(a), sides), torch.ones_like(b)])
        found = built(padded, attention_mask=mask)
        torch.testing.assert_close(torch.cat([found[:1, before : before + 7], found[1:]], 1), alone)


@pytest.mark.parametrize("name", CASES)
def test_decoding_is_the_forward(name: str) -> None:
    built, x = model(name), tokens(2, 15)
    for pieces in ([1] * 15, [15], [6, 1, 1, 7]):
        torch.testing.assert_close(decoded(built, [(piece, None) for piece in x.split(pieces, 1)], 15), built(x))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_unequal_length_decode_as_alone(name: str, side: str) -> None:
    """The rows have prompts of 8, 5 and 1 tokens, and as many after them."""
    built, x, lengths = model(name), tokens(3, 12), (8, 5, 1)
    sides = [(8 - n, 0) if side == "left" else (0, 8 - n) for n in lengths]
    prompts = [row[:n] for row, n in zip(x, lengths, strict=True)]
    padded = torch.stack([torch.nn.functional.pad(p, s, value=3) for p, s in zip(prompts, sides, strict=True)])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(p), s) for p, s in zip(prompts, sides, strict=True)])
    rest = [(piece, None) for piece in x[:, 8:].split(1, 1)]
    found = decoded(built, [(padded, mask), *rest], 12)[:, 8:]
    for row, prompt in enumerate(prompts):
        whole = torch.cat([prompt, x[row, 8:]])[None]
        alone = decoded(built, [(whole, None)], 12)
        torch.testing.assert_close(found[row : row + 1], alone[:, len(prompt) :])
        if name not in DYNAMIC or whole.shape[1] == 12:
            torch.testing.assert_close(alone, built(whole))


@pytest.mark.parametrize("name", DYNAMIC)
def test_a_state_for_more_tokens_is_the_start_of_a_longer_sequence(name: str) -> None:
    """And up to the original length, of 5, of any."""
    built, x = model(name), tokens(1, 15)
    torch.testing.assert_close(decoded(built, [(x[:, :9], None)], 15), built(x)[:, :9])
    assert not torch.allclose(built(x[:, :9]), built(x)[:, :9], atol=1e-3)
    torch.testing.assert_close(decoded(built, [(x[:, :4], None)], 5), built(x[:, :4]))


@pytest.mark.parametrize("name", [name for name in ROTARY if name.startswith(("dynamic", "yarn"))])
@torch.no_grad()
def test_forward_and_step_compile_as_one_graph(name: str) -> None:
    torch._dynamo.reset()
    built, x = model(name), tokens(2, 9)
    compiled = torch.compile(built, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), built(x))
    step = torch.compile(built.step, fullgraph=True, backend="aot_eager")
    state = built.init_state(2, 9)
    found = []
    for piece in x.split([7, 1, 1], 1):
        logits, state = step(piece, state)
        found.append(logits)
    torch.testing.assert_close(torch.cat(found, 1), built(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ROTARY)
def test_a_saved_model_turns_as_it_did(name: str, tmp_path: Path) -> None:
    built, x = model(name), tokens(2, 9)
    attncompiler.save(built, tmp_path / "model")
    loaded = attncompiler.load(tmp_path / "model", device="cpu")
    torch.testing.assert_close(loaded(x).to(torch.float64), built(x), rtol=1e-4, atol=1e-4)
