"""What `explain` says: plain data that adds up, and whether training fits."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_specs import NAMES, example, small

from attncompiler import pipeline, targets
from attncompiler.errors import PlanError, SpecError, UsageError
from attncompiler.mechanisms.attention.visibility import visible
from attncompiler.planning import plan
from attncompiler.planning.cost import Memory, model_cost
from attncompiler.planning.explanation import _devices, explain
from attncompiler.planning.planner import too_long


def explained(name: str, target: str, batch: int = 1, seq_len: int = 2048) -> dict[str, Any]:
    spec = example(name)
    return explain(spec, plan(spec, target, batch=batch, seq_len=seq_len))


@pytest.mark.parametrize("name", NAMES)
def test_an_explanation_is_json_and_covers_every_layer_once(name: str) -> None:
    spec = example(name)
    data = explained(name, "cpu", batch=2, seq_len=256)
    assert json.loads(json.dumps(data)) == data
    indices: list[int] = []
    for layer in data["layers"]:
        for run in layer["indices"].split(", "):
            first, _, last = run.partition("-")
            indices += range(int(first), int(last or first) + 1)
    assert sorted(indices) == list(range(len(spec.resolved_layers)))
    assert sum(layer["count"] for layer in data["layers"]) == len(indices)


@pytest.mark.parametrize("tokens", [24, 48])
@pytest.mark.parametrize(
    "pattern",
    [
        "{kind: causal}",
        "{kind: full}",
        "{kind: sliding_window, window: 5, global_tokens: 2}",
        "{kind: sliding_window, window: 5, causal: false}",
        "{kind: strided, stride: 3, window: 2, block_size: 2}",
        "{kind: local_global, block_size: 4, local_blocks: 2, global_blocks: 1}",
        "{kind: random, block_size: 4, random_blocks: 1, global_blocks: 1, causal: false}",
        "{kind: chunked, chunk: 7}",
    ],
)
def test_the_density_is_the_masks(pattern: str, tokens: int) -> None:
    """The share of all pairs that the layer sees, of that many tokens."""
    spec = small(f"{{kind: attention, num_attention_heads: 4, pattern: {pattern}}}")
    [layer] = pipeline.explain(spec, target="cpu", seq_len=tokens)["cpu"]["layers"]
    policy = spec.resolved_layers[0].policy
    empty = torch.zeros(1, tokens, 1, 1)
    seen = visible({"q": empty, "k": empty}, policy.pattern).expand(1, tokens, tokens)
    assert layer["pattern"] == policy.pattern.kind
    assert layer["density"] == int(seen.sum()) / tokens**2


def test_a_mixer_without_a_pattern_has_no_density() -> None:
    [layer] = pipeline.explain(small("{kind: mamba}"), target="cpu", seq_len=24)["cpu"]["layers"]
    assert (layer["pattern"], layer["density"]) == (None, None)


def test_layers_add_up_to_the_model() -> None:
    data = explained("llama_tiny", "cpu", batch=2, seq_len=256)
    (layer,) = data["layers"]
    embedding, norm = 256 * 256, 256
    assert data["model"]["parameters"] == layer["count"] * layer["parameters"] + embedding + norm
    head = 2 * 2 * 256 * 256 * 256
    assert data["model"]["forward_flops"] == layer["count"] * layer["forward_flops"] + head


def test_refusals_are_given_with_their_source() -> None:
    (layer,) = explained("llama_tiny", "h200")["layers"]
    by_kernel = {refused["kernel"]: refused["reasons"] for refused in layer["refusals"]}
    assert by_kernel["cudnn"] == [{"source": "option", "reason": "cudnn does not take float32"}]
    assert by_kernel["host"] == [{"source": "option", "reason": "host is not built in this version of attncompiler"}]
    listed = "{kind: attention, num_attention_heads: 4, kernel: [cudnn, sdpa]}"
    (layer,) = pipeline.explain(small(listed), target="cpu")["cpu"]["layers"]
    assert {"source": "target", "reason": "cudnn runs on cuda only"} in layer["refusals"][0]["reasons"]


def test_13_billion_parameters_do_not_train_on_one_a6000() -> None:
    data = explained("hybrid_13b", "a6000")
    fit = data["fit"]["plain"]
    assert not fit["fits"]
    # parameters, gradients and both moments in bfloat16, and the update's square roots
    assert fit["peak_bytes"] > 8 * data["model"]["parameters"]
    assert fit["missing_bytes"] == fit["peak_bytes"] - data["fit"]["usable_bytes"]
    assert fit["verdict"].startswith("does not fit: needs ")
    assert f"fits {fit['devices']} devices under FSDP" in fit["verdict"]
    assert 3 <= fit["devices"] <= 16
    # at eight layers to a kind the explanation is short, whatever the depth
    assert len(data["layers"]) == 3


@pytest.mark.parametrize("size", [{"batch": 0}, {"seq_len": 0}, {"batch": -1}])
def test_a_step_without_tokens_is_an_error(size: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="E602 batch and seq_len must be at least 1"):
        pipeline.explain(example("llama_tiny"), **size)


@pytest.mark.parametrize("size", [{"batch": 10**320}, {"seq_len": 10**320}, {"seq_len": pipeline.MOST + 1}])
def test_a_size_that_no_float_holds_is_an_error(size: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="E602 batch and seq_len must be at most 1,099,511,627,776"):
        pipeline.explain(example("llama_tiny"), **size)


@pytest.mark.parametrize("name", NAMES)
def test_the_largest_size_is_explained(name: str) -> None:
    spec = example(name)
    longest = pipeline.MOST if too_long(spec, pipeline.MOST) is None else spec.model.max_position_embeddings
    for data in pipeline.explain(spec, batch=pipeline.MOST, seq_len=longest).values():
        assert not data["fit"]["plain"]["fits"]


def test_overrides_reach_a_spec_that_is_read_already() -> None:
    spec = example("llama_tiny")
    assert pipeline.check(spec, overrides=["seed=7"]).model_dump() == spec.model_dump() | {"seed": 7}
    with pytest.raises(SpecError, match=r"--set model\.hidden_size=0: E014"):
        pipeline.check(spec, overrides=["model.hidden_size=0"])


def test_a_small_model_fits_and_says_so() -> None:
    fit = explained("llama_tiny", "t4", batch=4, seq_len=512)["fit"]["plain"]
    assert (fit["fits"], fit["devices"], fit["missing_bytes"]) == (True, 1, 0)
    assert fit["verdict"].startswith("fits: needs ")


def test_more_devices_are_never_needed_with_checkpointing_or_more_memory() -> None:
    spec = example("hybrid_13b")
    needed = []
    for target in ("a6000", "a100-80", "h200", "b200"):
        fit = explain(spec, plan(spec, target, seq_len=1024))["fit"]
        assert fit["checkpointed"]["devices"] <= fit["plain"]["devices"]
        needed.append(fit["plain"]["devices"])
    assert needed == sorted(needed, reverse=True)


def test_activations_that_do_not_fit_are_not_solved_by_sharding() -> None:
    fit = explained("hybrid_13b", "a6000", batch=16, seq_len=8192)["fit"]["plain"]
    assert fit["devices"] is None
    assert "sharding alone does not help" in fit["verdict"]


def test_time_is_a_bound_of_flops_and_bandwidth() -> None:
    spec = small("{kind: attention, num_attention_heads: 4}")
    cost = model_cost(spec, plan(spec, "h200", batch=8, seq_len=2048))
    target = targets.get("h200")
    assert cost.time.forward >= cost.forward_flops / target.matrix_flops["float32"]
    assert cost.time.optimizer == pytest.approx(7 * cost.memory.parameters / target.bandwidth)
    slower = model_cost(spec, plan(spec, "t4", batch=8, seq_len=2048))
    assert slower.time.step > cost.time.step


def test_shared_layers_are_stored_once_and_run_each_time() -> None:
    attention = "{kind: attention, num_attention_heads: 4}"
    apart = small(attention, layers="[{policy: p0, repeat: 3}]")
    tied = small(attention, layers="[{policy: p0, share: one, repeat: 3}]")
    one = small(attention, layers="[{policy: p0}]")
    costs = [model_cost(spec, plan(spec, "cpu", seq_len=64)) for spec in (apart, tied, one)]
    assert costs[0].forward_flops == costs[1].forward_flops
    assert costs[1].parameters == costs[2].parameters
    assert costs[1].memory.activations == costs[0].memory.activations


def test_a_kernel_that_refuses_at_that_length_alone_is_refused_and_not_costed() -> None:
    """sdpa's dense mask of 8192 × 8192 in fp32 is above its limit of 64 MiB, that of 2048 × 2048 is not."""
    window = "{{kind: attention, num_attention_heads: 4, kernel: {}, pattern: {{kind: sliding_window, window: 64}}}}"
    spec = small(window.format("[sdpa, eager]"))
    short, long = (pipeline.explain(spec, target="cpu", seq_len=length)["cpu"] for length in (2048, 8192))
    assert short["layers"][0]["chain"] == ["sdpa", "eager"]
    assert long["layers"][0]["chain"] == ["eager"]
    [refused] = long["layers"][0]["refusals"]
    assert refused["kernel"] == "sdpa"
    assert refused["reasons"][0]["reason"].startswith(f"sdpa does not offer band_mask_bytes = {8192 * 8192 * 4} ")
    alone = pipeline.explain(small(window.format("eager")), target="cpu", seq_len=8192)["cpu"]
    assert long["fit"] == alone["fit"]
    with pytest.raises(PlanError, match=r"E202.*mask_bytes"):
        pipeline.explain(small(window.format("sdpa")), target="cpu", seq_len=8192)


@pytest.mark.parametrize("name", NAMES)
def test_by_default_it_speaks_of_a_length_that_the_model_takes(name: str) -> None:
    spec = example(name)
    for data in pipeline.explain(spec).values():
        assert data["seq_len"] == min(2048, spec.model.max_position_embeddings)


def test_more_tokens_than_the_model_can_take_are_an_error() -> None:
    with pytest.raises(
        UsageError, match=r"E602 the model takes at most 512 tokens, not 513: policy '.*' projects no more"
    ):
        pipeline.explain(example("encoder_tiny"), seq_len=513)
    attention = "{kind: attention, num_attention_heads: 4}"
    learned = small(attention, max_position_embeddings="64", embedding="{positions: learned}")
    with pytest.raises(UsageError, match="at most 64 tokens, not 65: its learned positions are no more"):
        pipeline.explain(learned, seq_len=65)
    pipeline.explain(small(attention, max_position_embeddings="64"), seq_len=65)


def test_a_model_that_cannot_decode_has_no_decode_state() -> None:
    data = explained("encoder_tiny", "cpu", seq_len=128)
    assert data["model"]["state_bytes"] == 0
    assert {layer["state_bytes"] for layer in data["layers"]} == {0}
    assert explained("llama_tiny", "cpu")["model"]["state_bytes"] > 0


# --- how many devices -------------------------------------------------------------------------------------------

PARTS = SimpleNamespace(parts=[SimpleNamespace(parameter_bytes=size) for size in (100, 300, 200)])
"""600 bytes of parameters, the largest part 300"""


def memory(working: int, peak: int, update: int = 300) -> Memory:
    """Of PARTS: 600 bytes of parameters, 600 of gradients, 1200 of moments: 2400 are sharded."""
    return Memory(600, 600, 1200, update, activations=0, working=working, peak=peak)


@pytest.mark.parametrize(
    ("usable", "devices"),
    [
        (2900, 1),  # the peak itself
        (2899, 2),  # a byte is missing; each device's own are 500 + 3 · 300 = 1400: 2400 / 1499 = 1.6
        (2600, 2),  # 2400 / 1200 = 2
        (2599, 3),  # 2400 / 1199 = 2.002
        (2000, 4),  # 2400 / 600 = 4
        (1999, 5),  # 2400 / 599 = 4.007
        (1401, 2400),  # a byte of room on each device
        (1400, None),  # what is not sharded leaves none
        (1000, None),
    ],
)
def test_devices_by_hand(usable: int, devices: int | None) -> None:
    """Sharded: 2400. Each device's own: 500 of activations, parameters of 2 layers in flight, gradients of 1."""
    assert _devices(memory(500, 2900), PARTS, usable) == devices


def test_no_less_than_two_devices_share() -> None:
    """2400 / (4000 − 1400) is less than 1, and yet one device has too little for its peak of 4001."""
    assert _devices(memory(500, 4001), PARTS, 4000) == 2


@pytest.mark.parametrize(("usable", "devices"), [(1800, 2), (1799, 3), (900, 4), (899, 5)])
def test_the_update_is_shared_too_and_may_ask_for_more_devices(usable: int, devices: int) -> None:
    """2400 + 1200 in parts of `usable`, where forward and backward would fit fewer: 2400 / (900 − 13) = 2.7."""
    small_parts = SimpleNamespace(parts=[SimpleNamespace(parameter_bytes=1)] * 600)
    assert _devices(memory(10, 3600, update=1200), small_parts, usable) == devices


def test_a_model_fits_to_the_byte() -> None:
    """The least memory of which 92% hold the peak; with a byte less, one is missing."""
    spec, target = example("llama_tiny"), targets.get("t4")
    peak = explain(spec, plan(spec, target, seq_len=64))["fit"]["plain"]["peak_bytes"]
    least = math.ceil(peak / 0.92)
    for size, missing, devices in ((least, 0, 1), (least - 1, 1, 2)):
        held = target.model_copy(update={"memory_bytes": size})
        data = explain(spec, plan(spec, held, seq_len=64))["fit"]
        fit = data["plain"]
        assert data["usable_bytes"] == peak - missing
        assert (fit["fits"], fit["missing_bytes"], fit["devices"]) == (missing == 0, missing, devices)
        assert fit["verdict"].startswith("fits: " if missing == 0 else "does not fit: ")
