"""What a model takes and refuses at its door: token types, positions, states, labels by name, dtypes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ENCODERS, MIXERS, model, spec, text, tokens

import attncompiler
from attncompiler import spec as specs
from attncompiler.emit import CompiledModel
from attncompiler.errors import InputError, SpecError
from attncompiler.spec.dump import written

X = tokens(2, 9)
LIMIT = 64
"""max_position_embeddings of the tiny specs"""


def made(embedding: str) -> CompiledModel:
    return model(MIXERS["attention"], form=f"embedding: {embedding}")


def code(error: pytest.ExceptionInfo[InputError]) -> str:
    return error.value.diagnostics[0].code


def test_token_types_are_added_and_are_0_where_none_are_given() -> None:
    built = made("{token_types: 3}")
    types = torch.arange(18).reshape(2, 9) % 3
    with torch.no_grad():
        plain, zeros, mixed = built(X), built(X, token_type_ids=types * 0), built(X, token_type_ids=types)
    torch.testing.assert_close(plain, zeros, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(plain, mixed, atol=1e-4)
    loss = built.loss(X, X, token_type_ids=types)
    [grad] = torch.autograd.grad(loss, [built.embed_token_types.weight])
    assert grad.abs().amin(0).all(), "each type has had a part"
    torch.testing.assert_close(built.loss(X, X), built.loss(X, X, token_type_ids=types * 0))


@pytest.mark.parametrize(("types", "expected"), [(torch.zeros(2, 8).long(), "E401"), (torch.zeros(2, 9), "E402")])
def test_token_types_that_do_not_fit_are_refused(types: torch.Tensor, expected: str) -> None:
    with pytest.raises(InputError) as error:
        made("{token_types: 3}")(X, token_type_ids=types)
    assert code(error) == expected


def test_more_tokens_than_learned_positions_are_refused_everywhere() -> None:
    built, fits, long = made("{positions: learned}"), tokens(2, LIMIT), tokens(2, LIMIT + 1)
    assert built(fits).shape[:2] == (2, LIMIT)
    calls = (
        lambda: built(long),
        lambda: built.loss(long, long),
        lambda: built(fits, position_ids=torch.arange(1, LIMIT + 1)[None]),
        lambda: built(fits, position_ids=torch.full((2, LIMIT), -1)),
        lambda: built.init_state(1, LIMIT + 1),
    )
    for call in calls:
        with pytest.raises(InputError, match=f"{LIMIT} learned positions") as error:
            call()
        assert code(error) == "E401"
    # packed documents count their own positions
    segments = (torch.arange(LIMIT + 1) > 9).long().expand(2, -1)
    assert built(long, segment_ids=segments).shape[:2] == (2, LIMIT + 1)


def test_what_names_no_token_position_or_type_is_refused_in_words() -> None:
    built, ones = made("{positions: learned, token_types: 3}"), torch.ones_like(X)
    decoder = made("{positions: none}")
    wrong = {
        "E403 tokens must be 0 to 63, and 64 is among them": lambda: built(X.where(X.max() != X, 64)),
        "E403 tokens must be 0 to 63, and -1 is among them": lambda: built(X - X.min() - 1),
        "E403 tokens must be 0 to 63, and 65": lambda: built.loss(ones * 65, X),
        "E403 tokens must be 0 to 63, and 66": lambda: decoder.step(ones * 66, decoder.init_state(2, 9)),
        "E403 token_type_ids must be 0 to 2, and 3 is among": lambda: built(X, token_type_ids=ones * 3),
        f"E401 position -1 is none of the model's {LIMIT} learned": lambda: built(X, position_ids=ones * -1),
        f"E401 the model has {LIMIT} learned positions, and 70 are": lambda: built(X, position_ids=ones * 69),
        "E402 tokens must be whole numbers, not torch.bool": lambda: built(X > 9),
        "E402 tokens must be whole numbers, not torch.float32": lambda: built(torch.randn(2, 9, 32)),
    }
    for message, call in wrong.items():
        with pytest.raises(InputError, match=message):
            call()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16])
def test_ids_may_be_of_any_integer_dtype(dtype: torch.dtype) -> None:
    built, positions = made("{positions: learned, token_types: 3}"), torch.arange(9)[None]
    narrow = X.to(dtype)
    with torch.no_grad():
        expected = built(X, position_ids=positions, token_type_ids=X % 3)
        found = built(narrow, position_ids=positions.to(dtype), token_type_ids=(X % 3).to(dtype))
        assert torch.equal(found, expected)
        assert torch.equal(built.loss(narrow, narrow), built.loss(X, X))
        decoder = made("{positions: none}")
        stepped, _ = decoder.step(narrow, decoder.init_state(2, 9))
        assert torch.equal(stepped, decoder.step(X, decoder.init_state(2, 9))[0])


def test_padding_needs_no_position() -> None:
    """On either side, beyond the last learned position, in a forward and in a step."""
    built, fits = made("{positions: learned}"), tokens(2, LIMIT)
    with torch.no_grad():
        alone = built(fits)
        for before, after in ((5, 0), (0, 5), (2, 3)):
            padded = torch.nn.functional.pad(fits, (before, after))
            mask = torch.nn.functional.pad(torch.ones_like(fits), (before, after))
            found = built(padded, attention_mask=mask)[:, before : before + LIMIT]
            torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
        state = built.init_state(2, LIMIT)
        _, state = built.step(fits[:, :-1], state)
        last, _ = built.step(fits[:, -1:], state, attention_mask=torch.tensor([[1], [0]]))
        torch.testing.assert_close(last[0], alone[0, -1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(0, 4), (1, 0), (-1, 4), (1.5, 8), (1, "8"), (True, 8)])
def test_a_state_for_nothing_is_refused(size: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match="at least 1") as error:
        made("{positions: none}").init_state(*size)
    assert code(error) == "E403"


def test_lengths_of_another_batch_are_refused() -> None:
    with pytest.raises(InputError, match=r"lengths must be \(2,\), not \(3,\)") as error:
        made("{positions: none}").init_state(2, 8, lengths=torch.ones(3, dtype=torch.int64))
    assert code(error) == "E401"


@pytest.mark.parametrize("device", ["tpu", "cpu:x", "cuda:99", 1.5])
def test_a_state_where_there_is_no_device_is_refused(device: Any) -> None:
    with pytest.raises(InputError, match=f"E403 there is no device '{device}' here"):
        made("{positions: none}").init_state(1, 4, device=device)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_a_state_of_no_models_dtype_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match=f"E402 dtype must be .*, not {dtype}"):
        made("{positions: none}").init_state(1, 4, dtype=dtype)


@pytest.mark.parametrize("kind", MIXERS)
def test_caches_are_of_the_models_dtype_whatever_its_first_parameter_is(kind: str) -> None:
    """Without embeddings a parameter comes first that Mamba keeps in fp32; recurrent states are wide."""
    data = specs.parse(text(MIXERS[kind])).model_dump(exclude_unset=True)
    data["model"] |= {"input": "embeds", "head": {"kind": "none"}, "dtype": "bfloat16"}
    del data["model"]["vocab_size"]
    built = attncompiler.build(specs.parse(written(data)), device="cpu")
    assert built.dtype == torch.bfloat16
    assert built.device == torch.device("cpu")
    for layer in built.init_state(2, 8)["layers"].values():
        for name, tensor in layer.items():
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                assert tensor.dtype == (torch.bfloat16 if name in ("k", "v", "conv") else torch.float32), name
    assert built.double().init_state(2, 8, device="meta")["position"].device.type == "meta"
    assert built.dtype == torch.float64


OTHERS = {
    "attention": MIXERS["attention"].replace("num_key_value_heads: 2", "num_key_value_heads: 1"),
    "window": MIXERS["window"].replace("num_attention_heads: 4", "num_attention_heads: 4, head_dim: 16"),
    "strided": MIXERS["strided"].replace("heads: 2", "heads: 4"),
    "local_global": MIXERS["local_global"].replace("heads: 4", "heads: 2"),
    "random": MIXERS["random"].replace("v_head_dim: 12", "v_head_dim: 8"),
    "chunked": MIXERS["chunked"].replace("num_key_value_heads: 2", "num_key_value_heads: 1"),
    "linear_attention": MIXERS["linear_attention"].replace("heads: 2", "heads: 4"),
    "performer": MIXERS["performer"].replace("num_features: 24", "num_features: 16"),
    "retention": MIXERS["retention"].replace("heads: 2", "heads: 4"),
    "gated": MIXERS["gated"].replace("heads: 2", "heads: 4"),
    "mamba": MIXERS["mamba"].replace("state_size: 4", "state_size: 4, expand: 4"),
    "mamba2": MIXERS["mamba2"].replace("head_dim: 16", "head_dim: 8"),
}
"""the same mechanisms, of other sizes"""


@pytest.mark.parametrize("kind", MIXERS)
def test_another_models_state_is_refused_and_the_models_own_is_not(kind: str) -> None:
    built = model(MIXERS[kind])
    others = [model(OTHERS[kind]), model(MIXERS[kind], layers=3)]
    others += [model(MIXERS[other]) for other in ("mamba", "attention") if other != kind]
    wrong = [other.init_state(2, 16) for other in others]
    wrong += [other.step(X, state)[1] for other, state in zip(others, wrong, strict=True)]
    for state in (*wrong, {}, None, built.init_state(2, 16)["layers"]):
        with pytest.raises(InputError, match="E401 the state is not one of this model's"):
            built.step(X[:, :1], state)
    state = model(MIXERS[kind]).init_state(2, 16, dtype=torch.bfloat16)
    _, state = copy.deepcopy(built).step(X, state)
    logits, _ = built.step(X[:, :1], state)
    assert logits.isfinite().all()


def test_a_step_compiles_as_one_graph() -> None:
    built = model(*MIXERS.values(), layers=1)
    with torch.no_grad():
        _, first = built.step(X, built.init_state(2, 16))
        expected, _ = built.step(X[:, :1], copy.deepcopy(first))
        compiled, _ = torch.compile(built.step, fullgraph=True, backend="aot_eager")(X[:, :1], first)
    torch.testing.assert_close(compiled, expected)


def test_a_loss_takes_its_inputs_by_the_names_that_forward_has() -> None:
    built = model(MIXERS["attention"])
    expected = built.loss(X, X)
    assert torch.equal(built.loss(input_ids=X, labels=X), expected)
    assert torch.equal(built.loss(X, labels=X, segment_ids=torch.zeros_like(X)), built.loss(X, X, None, None, X * 0))
    with pytest.raises(InputError, match="E403 a loss needs input_ids and labels"):
        built.loss(X)
    with pytest.raises(InputError, match="E403 this model takes input_ids alone"):
        built.loss(inputs_embeds=torch.randn(2, 9, 32), labels=X)
    embeds = text(ENCODERS["full"], model="head: {kind: classifier, num_labels: 3}")
    embeds = embeds.replace("input: tokens", "input: embeds").replace("  vocab_size: 64\n", "")
    fed = attncompiler.build(specs.parse(embeds), device="cpu")
    x, labels = torch.randn(2, 9, 32), torch.tensor([0, 2])
    assert torch.equal(fed.loss(inputs_embeds=x, labels=labels), fed.loss(x, labels))
    assert fed(inputs_embeds=x).shape == (2, 3)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn])
def test_a_dtype_that_parameters_cannot_have_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    given = spec(MIXERS["attention"])
    attncompiler.save(attncompiler.build(given, device="cpu"), tmp_path / "made")
    said = f"E014 dtype must be float32, bfloat16, float16 or float64, not {dtype}"
    with pytest.raises(SpecError, match=said):
        attncompiler.build(given, device="cpu", dtype=dtype)
    with pytest.raises(SpecError, match=said):
        attncompiler.load(tmp_path / "made", device="cpu", dtype=dtype)


def test_one_override_needs_no_list(tmp_path: Path) -> None:
    given = spec(MIXERS["attention"])
    (tmp_path / "spec.yaml").write_text(text(MIXERS["attention"]))
    for source in (given, tmp_path / "spec.yaml"):
        assert attncompiler.build(source, device="cpu", overrides="seed=3").spec.seed == 3
        assert attncompiler.check(source, overrides="seed=3").seed == 3
