"""Attention dropout in models: in training alone, repeatable by torch.manual_seed, replayed by checkpointing."""

from __future__ import annotations

import torch
from tiny import gradients, model, tokens
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attncompiler.emit import CompiledModel
from attncompiler.testing.capture import recorded

DROPPING = "{kind: attention, num_attention_heads: 4, attention_dropout: 0.5, sinks: true}"
KEEPING = DROPPING.replace("0.5", "0.0")


def loss(built: CompiledModel, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return built.loss(tokens(), tokens(seed=1))


def test_dropout_acts_in_training_alone() -> None:
    built, plain = model(DROPPING), model(KEEPING)
    torch.testing.assert_close(built.eval()(tokens()), plain.eval()(tokens()))
    assert torch.equal(built(tokens()), built(tokens()))
    assert not torch.allclose(built.train()(tokens()), plain.train()(tokens()), atol=1e-2)


def test_a_seed_repeats_a_training_step() -> None:
    built = model(DROPPING).train()
    first = loss(built, 1)
    first.backward()
    grads = gradients(built)
    again = loss(built, 1)
    again.backward()
    assert torch.equal(first, again)
    torch.testing.assert_close(gradients(built), grads, rtol=0, atol=0)
    assert not torch.equal(loss(built, 2), first)


def test_the_share_that_is_dropped_is_the_policys() -> None:
    """Every site asks its operator for it in training, and for none in evaluation."""
    for policy, share in ((DROPPING, 0.5), (DROPPING.replace("0.5", "0.125"), 0.125), (KEEPING, 0.0)):
        built = model(policy)
        for training in (True, False):
            with torch.no_grad(), recorded() as seen:
                built.train(training)(tokens())
            assert [call.case.options.dropout for call in seen.calls] == [share if training else 0.0] * 2


def test_that_share_of_the_probabilities_is_dropped() -> None:
    """Values of 1 under a single probability of 1: a head gives 0, or 1 over the share that is kept."""
    built = model(DROPPING.replace("0.5", "0.25").replace("sinks: true", "attention_bias: all"), layers=1).train()
    mixer = built.layers["0"].mixer
    torch.manual_seed(0)
    with torch.no_grad():
        mixer.v_proj.weight.zero_()
        mixer.v_proj.bias.fill_(1)
        mixer.o_proj.weight.copy_(torch.eye(32))
        mixer.o_proj.bias.zero_()
        out = mixer(torch.zeros(1000, 1, 32))[0][..., ::8]
    kept = out > 0
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 4 / 3))
    assert not out[~kept].any()
    assert abs(float(kept.float().mean()) - 0.75) < 4 * (0.25 * 0.75 / out.numel()) ** 0.5


def test_layers_drop_otherwise() -> None:
    """Two layers of equal weights and equal input drop differently, as each draws a seed of its own."""
    built = model(DROPPING).train()
    layers = list(built.layers.values())
    layers[1].load_state_dict(layers[0].state_dict())
    hidden = torch.randn(2, 19, 32, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(layers[0](hidden)[0], layers[1](hidden)[0])


def test_checkpointing_drops_the_same_again() -> None:
    built = model(DROPPING).train()
    hidden = torch.randn(2, 19, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for run in (lambda layer, x: layer(x)[0], lambda layer, x: checkpoint(layer, x, use_reentrant=False)[0]):
        torch.manual_seed(4)
        x = hidden.clone().requires_grad_()
        y = x
        for layer in built.layers.values():
            y = run(layer, y)
        y.square().sum().backward()
        found.append((x.grad, gradients(built)))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_dropout_compiles_as_one_graph() -> None:
    built = model(DROPPING).train()
    compiled = torch.compile(built, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    first = compiled(tokens())
    assert not torch.equal(compiled(tokens()), first), "each call draws a seed"
    built.eval()
    torch.testing.assert_close(torch.compile(built, fullgraph=True, backend="aot_eager")(tokens()), built(tokens()))


def test_a_decode_step_drops_nothing_in_evaluation() -> None:
    built = model(DROPPING).eval()
    logits, _ = built.step(tokens(), built.init_state(2, 20))
    torch.testing.assert_close(logits, built(tokens()), rtol=1e-4, atol=1e-5)


def test_sinks_start_near_zero_and_learn() -> None:
    built = model(KEEPING)
    sinks = [p for name, p in built.named_parameters() if name.endswith("mixer.sinks")]
    assert [p.shape for p in sinks] == [(4,), (4,)]
    assert all(0 < float(p.detach().abs().max()) < 0.1 for p in sinks)
    loss(built, 0).backward()
    assert all(p.grad is not None and p.grad.abs().min() > 0 for p in sinks)
