"""Options of the model section against formulas written out here; the mixer is a box that is called, not looked into.

Everything is in fp64, with weights drawn far from their start: biases that are not 0, norms that are not 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tiny import ENCODERS, MIXERS, text, tokens
from torch import Tensor, nn

from attncompiler import spec as specs
from attncompiler.emit import CompiledModel
from attncompiler.errors import InputError
from attncompiler.pipeline import build

WINDOW, FULL = MIXERS["window"], ENCODERS["full"]
EPS = 0.3
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_pytorch_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: x.clamp(min=0),
}


def drawn(written: str) -> CompiledModel:
    """The model of a spec in fp64, every weight normal: matrices with a gain of about 1, norms around 1."""
    built = build(specs.parse(written), device="cpu", dtype=torch.float64).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            norm = name.endswith("norm.weight")
            parameter.copy_(1 + value / 4 if norm else value / parameter.shape[-1] ** 0.5)
    return built


def made(*sections: str, policy: str = WINDOW, layers: int = 1) -> CompiledModel:
    return drawn(text(policy, model="\n  ".join(sections), layers=layers))


def stacked(layers: str, *sections: str) -> CompiledModel:
    """A model of these layers (flow mappings of policy p0), in place of one."""
    written = text(WINDOW, layers=1, model="\n  ".join(sections))
    return drawn(written.replace("- {repeat: 1, layers: [{policy: p0}]}", f"- {{layers: [{layers}]}}"))


def linear(module: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, module.weight, module.bias)


def normed(module: nn.Module, x: Tensor, kind: str = "rmsnorm", eps: float = 1e-5) -> Tensor:
    if kind == "layernorm":
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * module.weight + module.bias
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * module.weight


def fed(mlp: nn.Module, x: Tensor, kind: str = "gated", act: str = "silu") -> Tensor:
    opened = linear(mlp.gate_proj if kind == "gated" else mlp.up_proj, x)
    inner = ACTIVATIONS[act](opened)
    return linear(mlp.down_proj, inner * linear(mlp.up_proj, x) if kind == "gated" else inner)


def mixed(layer: nn.Module, x: Tensor) -> Tensor:
    return layer.mixer(x)[0]


def through(layer: nn.Module, x: Tensor, kind: str = "gated", act: str = "silu") -> Tensor:
    """A pre-norm layer, mixer and MLP in turn."""
    x = x + mixed(layer, normed(layer.mixer_norm, x))
    return x if kind == "none" else x + fed(layer.mlp, normed(layer.mlp_norm, x), kind, act)


def body(built: CompiledModel, hidden: Tensor) -> Tensor:
    """What is behind the embedding of a model in the default form, up to its head."""
    for layer in built.layers.values():
        hidden = through(layer, hidden)
    return normed(built.norm, hidden)


# --- embedding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "formula"),
    [
        ("{multiplier: 3.0}", lambda m, x, at: 3 * m.embed_tokens.weight[x]),
        ("{positions: learned}", lambda m, x, at: m.embed_tokens.weight[x] + m.embed_positions.weight[at]),
        ("{norm: true}", lambda m, x, at: normed(m.embed_norm, m.embed_tokens.weight[x])),
        (
            "{norm: true, positions: learned, multiplier: 3.0}",
            lambda m, x, at: normed(m.embed_norm, 3 * m.embed_tokens.weight[x] + m.embed_positions.weight[at]),
        ),
    ],
    ids=["multiplier", "learned", "norm", "all"],
)
def test_the_embedding_is_its_formula(options: str, formula: Callable[..., Tensor]) -> None:
    built, x = made(f"embedding: {options}"), tokens(2, 9)
    torch.testing.assert_close(built(x), linear(built.lm_head, body(built, formula(built, x, torch.arange(9)))))
    state = built.init_state(2, 9)
    steps = []
    for piece in x.split([4, 1, 4], 1):
        logits, state = built.step(piece, state)
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, 1), built(x))


def test_learned_positions_are_those_given_and_else_start_with_the_first_real_token_of_a_segment() -> None:
    built, x = made("embedding: {positions: learned}", "head: {kind: none}", "mlp: {kind: none}"), tokens(1, 6)
    seen: list[Tensor] = []
    built.embed_positions.register_forward_pre_hook(lambda module, args: seen.append(args[0].tolist()))
    given = torch.tensor([[9, 3, 3, 0, 63, 1]])
    built(x, position_ids=given)
    built(x, segment_ids=torch.tensor([[0, 0, 0, 0, 1, 1]]))
    built(x, attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1]]))
    assert [seen[0], seen[1], [row[2:] for row in seen[2]]] == [given.tolist(), [[0, 1, 2, 3, 0, 1]], [[0, 1, 2, 3]]]


def test_token_types_have_a_table_of_their_own() -> None:
    built, x = made("embedding: {token_types: 3}"), tokens(2, 9)
    types = torch.tensor([0, 1, 2]).repeat(2, 3)
    hidden = built.embed_tokens.weight[x] + built.embed_token_types.weight[types]
    torch.testing.assert_close(built(x, token_type_ids=types), linear(built.lm_head, body(built, hidden)))
    with pytest.raises(InputError, match=r"E503 .*token types"):
        built.init_state(1, 9)


# --- layers -----------------------------------------------------------------------------------------------------


def layer_forward(layer: nn.Module, x: Tensor, form: tuple[str, str], has_mlp: bool, norm: str) -> Tensor:
    """Every form of layer; `norm` is the kind of its norms."""

    def n(name: str, y: Tensor) -> Tensor:
        return normed(getattr(layer, name), y, norm, EPS)

    def feed(y: Tensor) -> Tensor:
        return fed(layer.mlp, y)

    if form == ("pre", "sequential"):
        x = x + mixed(layer, n("mixer_norm", x))
        return x + feed(n("mlp_norm", x)) if has_mlp else x
    if form == ("post", "sequential"):
        x = n("mixer_norm", x + mixed(layer, x))
        return n("mlp_norm", x + feed(x)) if has_mlp else x
    if form == ("sandwich", "sequential"):
        x = x + n("mixer_post_norm", mixed(layer, n("mixer_norm", x)))
        return x + n("mlp_post_norm", feed(n("mlp_norm", x))) if has_mlp else x
    if form == ("pre", "parallel"):
        one = n("mixer_norm", x)
        return x + mixed(layer, one) + (feed(one) if has_mlp else 0)
    if form == ("post", "parallel"):
        return n("mixer_norm", x + mixed(layer, x) + (feed(x) if has_mlp else 0))
    one = n("mixer_norm", x)
    return x + n("mixer_post_norm", mixed(layer, one)) + (n("mlp_post_norm", feed(one)) if has_mlp else 0)


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("mlp", ["gated", "none"])
@pytest.mark.parametrize("block", ["sequential", "parallel"])
@pytest.mark.parametrize("position", ["pre", "post", "sandwich"])
def test_every_form_of_layer_is_its_formula(position: str, block: str, mlp: str, norm: str) -> None:
    """And has no norm but those of the formula; behind the layers stands one more, except post-norm."""
    feed = "{kind: none}" if mlp == "none" else "{kind: gated, intermediate_size: 48}"
    sections = [f"norm: {{kind: {norm}, position: {position}, eps: {EPS}}}", f"block: {block}", f"mlp: {feed}"]
    built, x = made(*sections, "head: {kind: none}", layers=2), tokens(2, 9)
    expected = built.embed_tokens.weight[x]
    for layer in built.layers.values():
        expected = layer_forward(layer, expected, (position, block), mlp != "none", norm)
        norms = {"mixer_norm"}
        norms |= {"mlp_norm"} if mlp != "none" and block == "sequential" else set()
        norms |= {"mixer_post_norm"} if position == "sandwich" else set()
        norms |= {"mlp_post_norm"} if position == "sandwich" and mlp != "none" else set()
        assert {name for name, _ in layer.named_children() if name.endswith("norm")} == norms
    assert hasattr(built, "norm") == (position != "post")
    expected = normed(built.norm, expected, norm, EPS) if position != "post" else expected
    torch.testing.assert_close(built(x), expected)


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("eps", [None, 0.5, 1e-3])
def test_every_norm_has_the_models_eps(kind: str, eps: float | None) -> None:
    """Those of embeddings, layers and last hidden states; 1e-5 where it is not said."""
    given = f"norm: {{kind: {kind}, position: sandwich" + ("}" if eps is None else f", eps: {eps}}}")
    built = made(given, "embedding: {norm: true}")
    layer, x = built.layers["0"], torch.randn(2, 3, 32, dtype=torch.float64) / 30
    norms = [layer.mixer_norm, layer.mixer_post_norm, layer.mlp_norm, layer.mlp_post_norm, built.norm, built.embed_norm]
    for norm in norms:
        torch.testing.assert_close(norm(x), normed(norm, x, kind, 1e-5 if eps is None else eps))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("act", [None, *ACTIVATIONS])
@pytest.mark.parametrize("kind", ["gated", "plain"])
def test_every_mlp_is_its_formula(kind: str, act: str | None, bias: bool) -> None:
    said = f", bias: {str(bias).lower()}" + (f", hidden_act: {act}" if act else "")
    built, x = made(f"mlp: {{kind: {kind}, intermediate_size: 20{said}}}", "head: {kind: none}"), tokens(2, 9)
    mlp = built.layers["0"].mlp
    parts = {"up_proj": (20, 32), "down_proj": (32, 20)} | ({"gate_proj": (20, 32)} if kind == "gated" else {})
    assert {name: tuple(part.weight.shape) for name, part in mlp.named_children()} == parts
    assert {part.bias is not None for part in mlp.children()} == {bias}
    expected = through(built.layers["0"], built.embed_tokens.weight[x], kind, act or "silu")
    torch.testing.assert_close(built(x), normed(built.norm, expected))


def test_a_layers_mlp_is_merged_over_the_models() -> None:
    changes = [
        "",
        ", mlp: {hidden_act: relu}",
        ", mlp: {kind: plain}",
        ", mlp: {kind: none}",
        ", mlp: {intermediate_size: 12, bias: false}",
    ]
    layers = ", ".join(f"{{policy: p0{change}}}" for change in changes)
    base = "mlp: {kind: gated, intermediate_size: 20, hidden_act: gelu, bias: true}"
    built, x = stacked(layers, base, "head: {kind: none}"), tokens(2, 9)
    expected = built.embed_tokens.weight[x]
    made_of = [("gated", "gelu"), ("gated", "relu"), ("plain", "gelu"), ("none", ""), ("gated", "gelu")]
    for layer, (kind, act) in zip(built.layers.values(), made_of, strict=True):
        expected = through(layer, expected, kind, act)
    torch.testing.assert_close(built(x), normed(built.norm, expected))
    ups = [layer.mlp.up_proj for layer in built.layers.values() if hasattr(layer, "mlp")]
    assert [(up.out_features, up.bias is not None) for up in ups] == [(20, True)] * 3 + [(12, False)]


def test_layers_of_one_share_are_one_layer_run_again_and_others_are_not() -> None:
    layers = "{policy: p0, share: a}, {policy: p0}, {policy: p0, share: b, repeat: 2}, {policy: p0, share: a}"
    built, x = stacked(layers, "head: {kind: none}"), tokens(2, 9)
    weights = [[id(p) for p in layer.parameters()] for layer in built.layers.values()]
    assert weights[0] == weights[4]
    assert weights[2] == weights[3]
    assert len({i for each in weights for i in each}) == 3 * len(weights[0])
    a, alone, b = (built.layers[name] for name in "012")
    expected = built.embed_tokens.weight[x]
    for layer in (a, alone, b, b, a):
        expected = through(layer, expected)
    torch.testing.assert_close(built(x), normed(built.norm, expected))


# --- heads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [None, 0.7])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_logits_and_loss_are_their_formulas(bias: bool, tied: bool, cap: float | None) -> None:
    capped = "" if cap is None else f", final_logit_softcapping: {cap}"
    head = f"head: {{kind: lm, bias: {str(bias).lower()}, tie_word_embeddings: {str(tied).lower()}{capped}}}"
    built, x, y = made(head), tokens(2, 9), tokens(2, 9, seed=1)
    assert (built.lm_head.weight is built.embed_tokens.weight) == tied
    assert (built.lm_head.bias is not None) == bias
    logits = body(built, built.embed_tokens.weight[x]) @ built.lm_head.weight.T
    logits = logits + built.lm_head.bias if bias else logits
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    torch.testing.assert_close(built(x), logits)
    picked = torch.log_softmax(logits, -1).gather(-1, y[..., None])
    torch.testing.assert_close(built.loss(x, y), -picked.mean())


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("pooling", [None, "first", "last", "mean"])
def test_a_classifier_pools_real_tokens(pooling: str | None, side: str) -> None:
    said = "" if pooling is None else f", pooling: {pooling}"
    built = made(f"head: {{kind: classifier, num_labels: 3{said}}}", policy=FULL)
    x, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    if side != "none":
        mask[1] = torch.tensor([0] * 4 + [1] * 5 if side == "left" else [1] * 5 + [0] * 4)
    scores = []
    for row, real in zip(x, mask, strict=True):
        hidden = body(built, built.embed_tokens.weight[row[real > 0]][None])[0]
        scores.append({"first": hidden[0], "last": hidden[-1], "mean": hidden.mean(0)}[pooling or "last"])
    expected = torch.stack(scores) @ built.score.weight.T
    given = {} if side == "none" else {"attention_mask": mask}
    torch.testing.assert_close(built(x, **given), expected)
    labels = torch.tensor([2, 0])
    picked = torch.log_softmax(expected, -1)[torch.arange(2), labels]
    torch.testing.assert_close(built.loss(x, labels, **given), -picked.mean())


def test_without_a_head_the_last_hidden_states_are_given_and_there_is_no_loss() -> None:
    built, x = made("head: {kind: none}"), tokens(2, 9)
    torch.testing.assert_close(built(x), body(built, built.embed_tokens.weight[x]))
    assert not hasattr(built, "lm_head")
    with pytest.raises(InputError, match="E403 this model has no head"):
        built.loss(x, x)


def test_embeddings_that_are_fed_are_scaled_and_normed_too() -> None:
    written = text(WINDOW, layers=1, model="head: {kind: none}\n  embedding: {multiplier: 3.0, norm: true}")
    built = drawn(written.replace("input: tokens", "input: embeds").replace("  vocab_size: 64\n", ""))
    fed_in = torch.randn(2, 9, 32, dtype=torch.float64)
    torch.testing.assert_close(built(inputs_embeds=fed_in), body(built, normed(built.embed_norm, 3 * fed_in)))
