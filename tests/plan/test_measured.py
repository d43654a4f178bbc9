"""Measured tables: what they hold, what they refuse, and the orders that follow from them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_specs import small
from tables import RUN, bucket, entry

from attncompiler import pipeline, targets
from attncompiler.errors import ArtifactError, UsageError
from attncompiler.measured import LAST, Entry, Order, Table, Times, ordered, save, store, walked
from attncompiler.measured.order import NEAR, nearest
from attncompiler.measured.table import read_json
from attncompiler.mechanisms.base import auto_order, discover
from attncompiler.planning import Plan, plan
from attncompiler.planning.explanation import kernels_text
from attncompiler.runtime.site import Site
from attncompiler.targets.detect import detect_environment, detect_target

CAUSAL = "{kind: attention, num_attention_heads: 4}"
STATIC = ("flash", "cudnn", "triton", "sdpa", "chunkwise", "eager", "host")
seconds = st.floats(1e-9, 1e6)
times = st.builds(Times, forward=seconds, both=st.none() | seconds)
levels = st.fixed_dictionaries({"width": st.integers(4, 8), "length": st.integers(0, 20)})
entries = st.builds(
    Entry,
    mechanism=st.sampled_from(["attention", "mamba"]),
    bucket=st.builds(
        type(bucket()),
        dtype=st.sampled_from(["float32", "bfloat16"]),
        kind=st.sampled_from(["causal", "sliding_window both ways"]),
        step=st.booleans(),
        levels=levels,
    ),
    run=st.just(RUN),
    kernels=st.dictionaries(st.sampled_from([*STATIC, "unheard-of"]), times, min_size=1),
)
tables = st.lists(entries, max_size=6).map(lambda each: Table(target="h200").merged(tuple(each)))


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a user's own tables, empty, and nothing read yet."""
    monkeypatch.setattr(store, "folder", lambda: tmp_path)
    store._entries.cache_clear()
    yield tmp_path
    store._entries.cache_clear()


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A function that makes a table come with the package."""
    root = tmp_path / "package"
    monkeypatch.setattr(store, "_tables", lambda: root)
    store._entries.cache_clear()
    yield lambda target, *each: save(each, target, root) and store._entries.cache_clear()
    store._entries.cache_clear()


# --- the order --------------------------------------------------------------------------------------------------------


@given(st.permutations(STATIC), entries, tables)
def test_an_order_is_a_permutation_in_which_those_that_were_measured_are_sorted(
    static: list[str], asked: Entry, table: Table
) -> None:
    order = ordered(tuple(static), asked.mechanism, asked.bucket, table.entries)
    assert sorted(order.kernels) == sorted(static)
    assert ordered(order.kernels, asked.mechanism, asked.bucket, table.entries).kernels == order.kernels
    if order.by is None:
        assert order.kernels == tuple(static)
        return
    times = {
        name: (each.forward, each.forward if asked.bucket.step else each.both)
        for name, each in order.by.kernels.items()
        if name in static and name not in LAST and (asked.bucket.step or each.both is not None)
    }
    assert len(times) > 1
    measured = [name for name in order.kernels if name in times]
    least = [min(way) for way in zip(*times.values(), strict=True)]
    worst = [max(time / best for time, best in zip(times[name], least, strict=True)) for name in measured]
    if order.backward is None:
        assert worst == sorted(worst)
    else:
        assert worst[1:] == sorted(worst[1:])
        assert times[measured[0]][0] == least[0]
        assert measured[0] != order.backward
    for name, before in zip(order.kernels, static, strict=True):
        if before not in times:
            assert name == before, "a kernel that was not measured keeps its place"


@given(st.permutations(STATIC), entries)
def test_without_a_table_the_order_is_the_mechanisms(static: list[str], asked: Entry) -> None:
    assert ordered(tuple(static), asked.mechanism, asked.bucket, ()) == Order(tuple(static))


def test_an_order_by_hand() -> None:
    known = entry({"flash": 3.0, "triton": 2.0, "sdpa": 1.0, "eager": 0.5})
    assert ordered(STATIC, "attention", bucket(), [known]).kernels == (
        "sdpa",
        "cudnn",
        "triton",
        "flash",
        "chunkwise",
        "eager",
        "host",
    )


def test_a_decoding_step_is_ordered_by_its_forward() -> None:
    kernels: Mapping[str, Any] = {"flash": (1.0, 9.0), "cudnn": (2.0, 8.0), "triton": (0.5, None)}
    trained = ordered(STATIC, "attention", bucket(), [entry(kernels)])
    stepped = ordered(STATIC, "attention", bucket(step=True), [entry(kernels, step=True)])
    assert trained.kernels[:3] == ("flash", "cudnn", "triton")
    assert stepped.kernels[:3] == ("triton", "flash", "cudnn")


def test_the_first_kernel_is_near_the_best_both_ways_where_one_is() -> None:
    """The best of either way would be 10% slower than another in the other way."""
    kernels = {"flash": (1.00, 3.30), "cudnn": (1.10, 3.00), "triton": (1.008, 2.92), "sdpa": (3.0, 5.0)}
    order = ordered(STATIC, "attention", bucket(), [entry(kernels)])
    assert (order.kernels[:4], order.backward) == (("triton", "cudnn", "flash", "sdpa"), None)


def test_two_kernels_share_a_call_where_none_is_near_the_best_both_ways() -> None:
    """The forward of one takes 1.0, the backward of the other 2.0: together 3.0, and neither alone below 3.05."""
    kernels = {"flash": (1.00, 3.10), "cudnn": (1.05, 3.05), "triton": (2.0, 4.5)}
    order = ordered(STATIC, "attention", bucket(), [entry(kernels)])
    assert order.kernels[:3] == ("flash", "cudnn", "triton")
    assert order.backward == "cudnn"
    assert walked(order.kernels, order.backward, "forward") == order.kernels
    assert walked(order.kernels, order.backward, "backward") == ("cudnn", "flash", *order.kernels[2:])
    refused = ordered(STATIC, "attention", bucket(), [entry(kernels)], lambda name: name != "cudnn")
    assert (refused.kernels[:3], refused.backward) == (("flash", "cudnn", "triton"), None), "who is refused joins none"
    assert ordered(("linformer", *STATIC), "attention", bucket(), [entry(kernels)]).backward is None, (
        "an unmeasured kernel comes first"
    )
    near = {**kernels, "sdpa": (1.0 * NEAR, 3.0 * NEAR)}
    alone = ordered(STATIC, "attention", bucket(), [entry(near)])
    assert (alone.kernels[0], alone.backward) == ("sdpa", None)
    assert ordered(STATIC, "attention", bucket(step=True), [entry(kernels, step=True)]).backward is None


def test_equal_times_keep_the_order_and_one_time_alone_changes_nothing() -> None:
    assert ordered(STATIC, "attention", bucket(), [entry({"sdpa": 1.0, "flash": 1.0})]).kernels == STATIC
    assert ordered(STATIC, "attention", bucket(), [entry({"sdpa": 1.0, "eager": 2.0})]) == Order(STATIC)


@given(entries, tables)
def test_the_nearest_bucket_is_of_the_same_kind_and_none_is_nearer(asked: Entry, table: Table) -> None:
    def alike(each: Entry) -> bool:
        kinds = [(e.mechanism, e.bucket.dtype, e.bucket.kind, e.bucket.step) for e in (asked, each)]
        return kinds[0] == kinds[1]

    def distance(each: Entry) -> list[int]:
        return [abs(each.bucket.levels[name] - level) for name, level in asked.bucket.levels.items()]

    found = nearest(asked.mechanism, asked.bucket, table.entries)
    like = [each for each in table.entries if alike(each)]
    assert (found is None) == (not like)
    if found is not None:
        assert alike(found)
        assert all(distance(found) <= distance(each) for each in like)


def test_of_two_lengths_equally_near_the_longer_counts_and_width_before_length() -> None:
    known = [entry({"flash": 1.0}, length=9), entry({"flash": 1.0}, length=13), entry({"flash": 1.0}, width=4)]
    found = nearest("attention", bucket(length=11), known[:2])
    assert found is not None
    assert found.bucket.levels["length"] == 13
    assert nearest("attention", bucket(length=20), known) is known[1]


# --- the table --------------------------------------------------------------------------------------------------------


@given(tables)
def test_a_table_is_read_as_it_was_written(table: Table) -> None:
    assert read_json(table.to_json().encode(), "h200", "h200.json") == table


@given(tables, st.lists(entries, max_size=4))
def test_what_is_merged_replaces_its_own_bucket_alone(table: Table, more: list[Entry]) -> None:
    merged = table.merged(tuple(more))
    last = {each.key: each for each in more}
    assert {each.key: each for each in merged.entries} == {each.key: each for each in table.entries} | last
    assert merged.merged(tuple(more)) == merged


GOOD = json.loads(Table(target="h200", entries=(entry({"sdpa": 1.0}),)).to_json())


def changed(**kernel: Any) -> str:
    data = json.loads(json.dumps(GOOD))
    data["entries"][0]["kernels"]["sdpa"] |= kernel
    return json.dumps(data)


CORRUPT = {
    "not JSON": ('{"format": 1,\n "target": }', r"h200\.json:2:12: E605"),
    "cut short": (json.dumps(GOOD)[:-30], "E605"),
    "empty": ("", "E605"),
    "not text": (b"\xff\xfe\x00", "E605"),
    "a list": ("[]", "E605"),
    "very deep": ("[" * 100_000, "E605"),
    "another format": (json.dumps({**GOOD, "format": 2}), "E605 .*format"),
    "another target": (json.dumps({**GOOD, "target": "h100"}), "of h100, not of h200"),
    "an unknown key": (json.dumps({**GOOD, "entry": "os:system"}), "entry"),
    "a time that is text": (changed(forward="1.0"), r"entries\.0\.kernels\.sdpa\.forward"),
    "no time": (changed(forward=0.0), "forward"),
    "less than no time": (changed(both=-1.0), "both"),
    "infinite": (changed(both=float("inf")), "both"),
    "no number": (changed(both=float("nan")), "both"),
    "a bucket twice": (json.dumps({**GOOD, "entries": GOOD["entries"] * 2}), "a bucket is there twice"),
    "a name with a path": (json.dumps(GOOD).replace("sdpa", "../sdpa"), "kernels"),
}


@pytest.mark.parametrize("kind", CORRUPT)
def test_a_corrupt_table_is_a_coded_error_with_its_place_and_is_left_alone(
    user: Path, packaged: Callable[..., None], kind: str
) -> None:
    text, said = CORRUPT[kind]
    path = user / "h200.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = path.read_bytes()
    target = targets.get("h200")
    for use in (lambda: store.entries(target, here=True), lambda: save([entry({"sdpa": 1.0})], "h200")):
        with pytest.raises(UsageError, match=said) as error:
            use()
        [fault] = error.value.diagnostics
        assert fault.code == "E605"
        assert fault.location is not None
        assert fault.location.file == str(path)
    assert path.read_bytes() == before
    assert store.entries(target, here=False) == ()
    path.unlink()


def test_saving_merges_with_what_stands_there_and_leaves_no_other_file(user: Path) -> None:
    first, second = entry({"sdpa": 1.0}), entry({"sdpa": 2.0}, kind="full")
    again = entry({"sdpa": 3.0, "eager": 4.0})
    for each in (first, second, again):
        assert save([each], "h200") == user / "h200.json"
    table = read_json((user / "h200.json").read_bytes(), "h200", "")
    assert {each.bucket.kind for each in table.entries} == {"causal", "full"}
    assert again in table.entries
    assert first not in table.entries
    assert os.listdir(user) == ["h200.json"]


def test_a_table_that_cannot_be_written_is_a_coded_error(user: Path) -> None:
    (user / "file").write_text("mine")
    with pytest.raises(UsageError, match=r"h200\.json: E601 the table cannot be written"):
        save([entry({"sdpa": 1.0})], "h200", user / "file")


def test_a_users_own_entries_count_here_for_the_same_device_and_before_the_packages(
    user: Path, packaged: Callable[..., None]
) -> None:
    target = targets.get("h200")
    own = entry({"sdpa": 1.0}, run=RUN.model_copy(update={"device": target.title}))
    elsewhere = entry({"sdpa": 2.0}, kind="full")
    common, other = entry({"sdpa": 3.0}), entry({"sdpa": 4.0}, kind="chunked")
    packaged("h200", common, other)
    save([own, elsewhere], "h200")
    store._entries.cache_clear()
    assert store.entries(target, here=True) == (own, other)
    assert store.entries(target, here=False) == (common, other)
    assert store.entries(targets.get("a100-80"), here=True) == ()


def test_a_gpu_without_a_table_is_planned_by_one_of_its_architecture(user: Path, packaged: Callable[..., None]) -> None:
    hopper, ampere = entry({"sdpa": 3.0}), entry({"sdpa": 4.0})
    packaged("h200", hopper)
    packaged("a100-40", ampere)
    found = {name: store.entries(targets.get(name), here=False) for name in ("h100", "a100-80", "b200", "cpu")}
    assert found == {"h100": (hopper,), "a100-80": (ampere,), "b200": (), "cpu": ()}
    own = entry({"sdpa": 5.0})
    packaged("h100", own)
    assert store.entries(targets.get("h100"), here=False) == (own,)
    assert store.entries(targets.get("h200"), here=False) == (hopper,)


# --- plans ------------------------------------------------------------------------------------------------------------

SLOW_SDPA = {"sdpa": 3.0, "chunkwise": 1.0, "eager": 0.1}


def test_a_listed_target_is_planned_by_the_packages_table_and_says_so(
    packaged: Callable[..., None], user: Path
) -> None:
    spec = small(CAUSAL)
    static = plan(spec, "cpu")
    assert (static.layers[0].chain, static.layers[0].choice.measured) == (("sdpa", "chunkwise", "eager"), None)
    packaged("cpu", entry(SLOW_SDPA))
    save([entry({"sdpa": 1.0, "chunkwise": 2.0})], "cpu", user)
    made = plan(spec, "cpu")
    assert made.layers[0].chain == ("chunkwise", "sdpa", "eager")
    by = made.layers[0].choice.measured
    assert by is not None
    assert (by.device, by.date) == ("Some Device", "2026-11-26")
    assert by.bucket.startswith("causal in float32 (width 3,")
    assert Plan.from_json(made.to_json()) == made
    [layer] = pipeline.explain(spec)["cpu"]["layers"]
    assert layer["measured"] == by.model_dump()
    assert plan(spec, "t4").layers[0].choice.measured is None


def test_a_plan_says_whose_backward_comes_first(packaged: Callable[..., None], user: Path) -> None:
    """The forward of chunkwise and the backward of sdpa are the fastest; of layers that it is not so for, nothing."""
    spec = small(CAUSAL)
    packaged("cpu", entry({"sdpa": (1.1, 2.0), "chunkwise": (1.0, 3.0)}))
    made = plan(spec, "cpu")
    choice = made.layers[0].choice
    assert (choice.chain, choice.backward) == (("chunkwise", "sdpa", "eager"), "sdpa")
    assert Plan.from_json(made.to_json()) == made
    [layer] = pipeline.explain(spec)["cpu"]["layers"]
    assert layer["backward"] == "sdpa"
    assert kernels_text(layer) == "chunkwise, sdpa, eager; backward first by sdpa"
    model = pipeline.build(spec, target="cpu")
    model(torch.zeros(1, 5, dtype=torch.long)).sum().backward()
    [record] = [each.record for each in model.modules() if isinstance(each, Site)]
    assert record.calls == {("chunkwise", "forward"): 1, ("sdpa", "backward"): 1}
    for wrong in ("eager2", "chunkwise"):
        text = made.to_json().replace('"backward": "sdpa"', f'"backward": "{wrong}"')
        with pytest.raises(ArtifactError, match="not one of the chain behind its first"):
            Plan.from_json(text)


def test_the_machine_is_planned_by_the_users_table(user: Path) -> None:
    spec, here = small(CAUSAL), detect_target("cpu")
    save([entry(SLOW_SDPA, run=RUN.model_copy(update={"device": here.title}))], here.name)
    made = plan(spec, here, detect_environment())
    assert made.layers[0].chain == ("chunkwise", "sdpa", "eager")
    assert plan(spec, here).layers[0].chain == ("sdpa", "chunkwise", "eager"), "a listed target has no machine"


@pytest.mark.parametrize(
    ("policy", "fallback"),
    [
        ("{kind: attention, num_attention_heads: 4, kernel: [eager, sdpa, chunkwise]}", "{}"),
        (CAUSAL, "{order: {attention: [eager, sdpa, chunkwise]}}"),
    ],
)
def test_lists_are_never_reordered(packaged: Callable[..., None], policy: str, fallback: str) -> None:
    packaged("cpu", entry(SLOW_SDPA))
    layer = plan(small(policy, fallback=fallback), "cpu").layers[0]
    assert layer.chain == ("eager", "sdpa", "chunkwise")
    assert layer.choice.measured is None


def test_fallback_auto_is_auto(packaged: Callable[..., None]) -> None:
    packaged("cpu", entry(SLOW_SDPA))
    spec = small(CAUSAL, fallback="{order: {attention: auto}}")
    assert plan(spec, "cpu").layers[0].chain[0] == "chunkwise"


def test_the_length_of_a_plan_finds_its_bucket(packaged: Callable[..., None]) -> None:
    packaged("cpu", entry(SLOW_SDPA, length=7), entry({"sdpa": 1.0, "chunkwise": 2.0}, length=12))
    spec = small(CAUSAL)
    assert plan(spec, "cpu", seq_len=128).layers[0].chain[0] == "chunkwise"
    assert plan(spec, "cpu", seq_len=4096).layers[0].chain[0] == "sdpa"


def test_other_dtypes_and_other_patterns_are_not_touched(packaged: Callable[..., None]) -> None:
    packaged("cpu", entry(SLOW_SDPA, dtype="bfloat16"), entry(SLOW_SDPA, kind="full"))
    assert plan(small(CAUSAL), "cpu").layers[0].chain[0] == "sdpa"


def test_a_corrupt_table_stops_the_plan_of_the_machine_and_no_other(user: Path) -> None:
    (user / "cpu.json").write_text("{")
    spec = small(CAUSAL)
    with pytest.raises(UsageError, match=r"cpu\.json.*E605"):
        plan(spec, detect_target("cpu"), detect_environment())
    assert plan(spec, "cpu").layers[0].chain[0] == "sdpa"


# --- attention's buckets ----------------------------------------------------------------------------------------------


@given(
    st.sampled_from(
        [
            "{kind: causal}",
            "{kind: full}",
            "{kind: sliding_window, window: 5, global_tokens: 2}",
            "{kind: sliding_window, window: 5, causal: false}",
            "{kind: strided, stride: 3, window: 2, block_size: 2}",
            "{kind: random, block_size: 4, random_blocks: 1, global_blocks: 1, causal: false}",
            "{kind: chunked, chunk: 7}",
        ]
    ),
    st.integers(1, 2**20),
)
def test_a_layer_and_its_call_are_in_the_same_bucket_and_doubling_the_length_is_one_level(
    pattern: str, tokens: int
) -> None:
    import torch

    from attncompiler.mechanisms.attention.op import OPERATOR, AttentionOptions
    from attncompiler.planning.planner import mixer_size

    mechanism = discover()["attention"]
    assert mechanism.bucket is not None
    assert mechanism.shapes is not None
    spec = small(f"{{kind: attention, num_attention_heads: 4, num_key_value_heads: 2, pattern: {pattern}}}")
    policy = spec.resolved_layers[0].policy
    planned = mechanism.shapes(policy, mixer_size(spec, batch=1, seq_len=tokens))
    found = mechanism.bucket(planned, policy, "float32")
    q, k = torch.empty(1, tokens, 4, 8, device="meta"), torch.empty(1, tokens, 2, 8, device="meta")
    inputs = {"q": q, "k": k, "v": k}
    request = OPERATOR.request(inputs, AttentionOptions(pattern=policy.pattern))
    shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
    assert mechanism.bucket(shapes, AttentionOptions(pattern=policy.pattern), str(request.dtype)) == found
    assert found.step == (tokens == 1)
    assert found.levels["length"] == tokens.bit_length() - 1
    assert (found.levels["width"], found.levels["group"]) == (3, 1)
    longer = mechanism.bucket(
        mechanism.shapes(policy, mixer_size(spec, batch=1, seq_len=2 * tokens)), policy, "float32"
    )
    assert longer.levels["length"] == found.levels["length"] + 1
    assert longer.kind == found.kind
    assert longer.levels["density"] >= found.levels["density"]


def test_what_lets_fewer_kernels_serve_a_pattern_is_a_kind_of_its_own() -> None:
    def kind(pattern: str) -> str:
        spec = small(f"{{kind: attention, num_attention_heads: 4, pattern: {pattern}}}")
        mechanism, policy = discover()["attention"], spec.resolved_layers[0].policy
        assert mechanism.bucket is not None
        return mechanism.bucket({"q": (1, 64, 4, 8), "k": (1, 64, 4, 8)}, policy, "float32").kind

    assert kind("{kind: full}") == "full"
    assert kind("{kind: sliding_window, window: 5}") == "sliding_window"
    assert kind("{kind: sliding_window, window: 5, global_tokens: 1}") == "sliding_window with globals"
    assert kind("{kind: sliding_window, window: 5, causal: false}") == "sliding_window both ways"


def test_a_mechanism_without_buckets_keeps_its_order() -> None:
    mechanism = discover()["mamba"]
    other = entry({"chunkwise": 2.0, "eager": 1.0}).model_copy(update={"mechanism": "mamba"})

    def never(*_: object) -> Any:
        raise AssertionError("it is not asked")

    assert auto_order(mechanism, "cpu", {}, [other], never, never) == Order(mechanism.order("cpu", {}))
