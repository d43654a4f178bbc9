"""What an emitted model is: graphs, keys, copies, and that it survives what users do to a module."""

from __future__ import annotations

import copy
import io
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import ENCODERS, FORMS, MIXERS, gradients, model, tokens
from torch import fx, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from attncompiler.emit.trace import Emitted
from attncompiler.errors import InputError
from attncompiler.runtime.site import Site

ALL = {**MIXERS, **ENCODERS}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ALL)
def test_graphs_are_sound_and_only_the_site_is_opaque(kind: str) -> None:
    built = model(ALL[kind])
    assert isinstance(built, fx.GraphModule)
    for graph in (built.graph, *built.graphs.values(), *(layer.graph for layer in built.layers.values())):
        graph.lint()
    layer = built.layers["0"]
    sites = [n for n in layer.graph.nodes if n.op == "call_module" and isinstance(layer.get_submodule(n.target), Site)]
    assert len(sites) == 1
    assert set(sites[0].meta["attncompiler"]) == {"policy", "chain", "backward", "refusals"}
    assert sites[0].meta["attncompiler"]["chain"] == layer.mixer.site.chain.kernels
    opaque = [n.target for n in layer.graph.nodes if n.op == "call_module"]
    homes = {type(layer.get_submodule(name)).__module__.split(".")[0:2][-1] for name in opaque}
    assert homes <= {"nn", "blocks", "mechanisms"}


@pytest.mark.parametrize("kind", ALL)
def test_layers_is_a_container_and_keys_are_as_documented(kind: str) -> None:
    built = model(ALL[kind])
    assert list(built.layers.keys()) == ["0", "1"]
    assert all(isinstance(layer, fx.GraphModule) for layer in built.layers.values())
    layer = r"layers\.\d+\.((mixer_norm|mlp_norm)\.weight|(mixer|mlp)\..+)"
    assert all(
        re.fullmatch(rf"embed_tokens\.weight|{layer}|norm\.weight|lm_head\.weight", key) for key in built.state_dict()
    )
    assert len(set(built.state_dict())) == len(built.state_dict())


@pytest.mark.parametrize("kind", ALL)
def test_batch_and_length_are_dynamic(kind: str) -> None:
    """A longer or wider batch gives, row by row and (when causal) token by token, what the smaller one gave."""
    built = model(ALL[kind]).eval()
    long = tokens(3, 40)
    whole = built(long)
    assert whole.shape == (3, 40, 64)
    torch.testing.assert_close(built(long[1:2]), whole[1:2])
    if kind in MIXERS:
        for length in (1, 7, 33):
            torch.testing.assert_close(built(long[:, :length]), whole[:, :length])


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_layer_trains(form: str) -> None:
    built = model(MIXERS["attention"], form=FORMS[form])
    x = tokens()
    built.loss(x, x).backward()
    grads = gradients(built)
    assert set(grads) == {name for name, _ in built.named_parameters()}
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in grads.values())


@pytest.mark.parametrize("kind", ALL)
def test_compiles_as_one_graph_with_the_same_outputs_and_gradients(kind: str) -> None:
    built = model(ALL[kind])
    x, y = tokens(), tokens(seed=1)
    expected = built(x)
    loss = built.loss(x, y)
    loss.backward()
    wanted = gradients(built)
    compiled = torch.compile(built, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    compiled_loss = torch.compile(built.loss, fullgraph=True, backend="aot_eager")(x, y)
    compiled_loss.backward()
    torch.testing.assert_close(compiled_loss, loss)
    torch.testing.assert_close(gradients(built), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALL)
def test_compiles_with_inductor(kind: str) -> None:
    built = model(ALL[kind])
    x, y = tokens(), tokens(seed=1)
    loss = built.loss(x, y)
    loss.backward()
    wanted = gradients(built)
    compiled = torch.compile(built.loss, fullgraph=True)(x, y)
    compiled.backward()
    torch.testing.assert_close(compiled, loss)
    torch.testing.assert_close(gradients(built), wanted, rtol=1e-4, atol=1e-6)


def test_equal_layers_compile_once() -> None:
    built = model(MIXERS["attention"], layers=5)
    counter = CompileCounterWithBackend("eager")
    hidden = torch.randn(1, 9, 32)
    for layer in built.layers.values():
        layer.compile(backend=counter, fullgraph=True)
    for layer in built.layers.values():
        layer(hidden)
    assert counter.frame_count == 1


def test_editing_one_layers_graph_changes_that_layer_alone() -> None:
    built = model(MIXERS["attention"], layers=3)
    hidden = torch.randn(1, 9, 32)
    before = [layer(hidden)[0] for layer in built.layers.values()]
    layer = built.layers["1"]
    output = next(node for node in layer.graph.nodes if node.op == "output")
    with layer.graph.inserting_before(output):
        doubled = layer.graph.call_function(torch.mul, (output.args[0][0], 2.0))
    output.args = ((doubled, output.args[0][1]),)
    layer.recompile()
    after = [layer(hidden)[0] for layer in built.layers.values()]
    torch.testing.assert_close(after, [before[0], 2 * before[1], before[2]])
    copied = copy.deepcopy(built)
    torch.testing.assert_close([layer(hidden)[0] for layer in copied.layers.values()], after)


@pytest.mark.parametrize("kind", ALL)
def test_exports(kind: str) -> None:
    built = model(ALL[kind]).eval()
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=64)
    exported = torch.export.export(built, (tokens(),), dynamic_shapes={"input_ids": {0: batch, 1: length}})
    for shape in ((2, 19), (3, 40)):
        torch.testing.assert_close(exported.module()(tokens(*shape, seed=3)), built(tokens(*shape, seed=3)))


def test_a_copy_keeps_keys_ties_and_values_and_is_independent() -> None:
    built = model(*MIXERS.values())
    copied = copy.deepcopy(built)
    x = tokens()
    assert list(copied.state_dict()) == list(built.state_dict())
    assert copied.lm_head.weight is copied.embed_tokens.weight
    assert copied.lm_head.weight is not built.lm_head.weight
    assert isinstance(copied.layers, nn.ModuleDict)
    assert torch.equal(copied(x), built(x))
    assert copied.spec == built.spec
    handles = {int(m.handle) for each in (built, copied) for m in each.modules() if isinstance(m, Site)}
    assert len(handles) == 2 * len(built.layers)
    with torch.no_grad():
        copied.norm.weight.mul_(2)
    assert not torch.equal(copied(x), built(x))
    calls = sum(built.layers["0"].mixer.site.record.calls.values())
    copied(x)
    assert sum(built.layers["0"].mixer.site.record.calls.values()) == calls
    state = copied.init_state(2, 32)
    copied.step(x, state)


def test_a_model_is_not_pickled_and_says_what_to_do() -> None:
    built = model(MIXERS["attention"])
    for write in (pickle.dumps, lambda given: torch.save(given, io.BytesIO())):
        with pytest.raises(InputError, match=r"E403 .* attncompiler\.save .* attncompiler\.load"):
            write(built)
    assert torch.equal(copy.copy(built)(tokens()), built(tokens()))
    assert torch.equal(copy.deepcopy([built])[0](tokens()), built(tokens()))
    torch.save(built.state_dict(), io.BytesIO())


@pytest.mark.parametrize("kind", ALL)
def test_activation_checkpointing_gives_the_same_gradients(kind: str) -> None:
    built = model(ALL[kind])
    hidden = torch.randn(2, 9, 32, requires_grad=True)

    def run(use: bool) -> list[torch.Tensor]:
        x = hidden
        for layer in built.layers.values():
            x = (checkpoint(layer, x, use_reentrant=False) if use else layer(x))[0]
        x.square().sum().backward()
        found = [hidden.grad.clone(), *gradients(built).values()]
        hidden.grad = None
        return found

    torch.testing.assert_close(run(True), run(False))


def test_autocast_runs_in_low_precision_and_stays_close() -> None:
    built = model(*MIXERS.values(), layers=1)
    x = tokens()
    with torch.autocast("cpu", torch.bfloat16):
        low = built.loss(x, x)
    low.backward()
    assert all(g.isfinite().all() for g in gradients(built).values())
    torch.testing.assert_close(low, built.loss(x, x), rtol=0.02, atol=0.02)


def test_print_readable_reads_like_a_model() -> None:
    built = model(MIXERS["attention"])
    top = built.print_readable(print_output=False)
    assert "embed_tokens" in top
    assert 'self.layers, "1")' in top
    assert "lm_head" in top
    layer = built.layers["0"].print_readable(print_output=False)
    order = [
        "mixer_norm",
        "q_proj",
        "k_proj",
        "v_proj",
        "rotary",
        "site",
        "o_proj",
        "mlp_norm",
        "gate_proj",
        "silu",
        "down_proj",
    ]
    places = [layer.index(name) for name in order]
    assert places == sorted(places)


def test_shared_layers_have_the_same_parameters_and_sites_of_their_own() -> None:
    from tiny import text

    from attncompiler import spec as specs
    from attncompiler.pipeline import build

    shared = text(MIXERS["attention"]).replace("{policy: p0}", "{policy: p0, share: one}")
    built = build(specs.parse(shared), device="cpu")
    first, second = (layer.mixer for layer in built.layers.values())
    assert first.q_proj.weight is second.q_proj.weight
    assert int(first.site.handle) != int(second.site.handle)
    assert isinstance(built.layers["0"], Emitted)
    unshared = model(MIXERS["attention"])
    per_layer = sum(p.numel() for p in unshared.layers["0"].parameters())
    count = sum(p.numel() for p in unshared.parameters())
    assert sum(p.numel() for p in built.parameters()) == count - per_layer


def test_embeds_input_and_classifier_head() -> None:
    from tiny import text

    from attncompiler import spec as specs
    from attncompiler.pipeline import build

    given = text(ENCODERS["full"], model="head: {kind: classifier, num_labels: 3, pooling: mean}")
    given = given.replace("input: tokens", "input: embeds").replace("  vocab_size: 64\n", "")
    built = build(specs.parse(given), device="cpu")
    x = torch.randn(2, 9, 32)
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    scores = built(x, attention_mask=mask)
    assert scores.shape == (2, 3)
    torch.testing.assert_close(scores[1:], built(x[1:, :6]))
    labels = torch.tensor([0, 2])
    torch.testing.assert_close(built.loss(x, labels, attention_mask=mask), nn.functional.cross_entropy(scores, labels))


def test_models_are_built_while_others_run() -> None:
    """fx patches nn.Module while it traces: neither a model that runs meanwhile nor another trace may notice."""
    built, x = model(MIXERS["attention"], MIXERS["mamba2"]), tokens()
    with torch.no_grad():
        expected = built(x)

    def run() -> None:
        for _ in range(40):
            with torch.no_grad():
                assert torch.equal(built(x), expected)

    def build_again() -> None:
        for _ in range(4):
            again = model(MIXERS["attention"], MIXERS["mamba2"])
            with torch.no_grad():
                assert torch.equal(again(x), expected)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work) for work in (run, build_again, run, build_again)]:
            done.result()
