"""A user's proof: it passes for the kernels there are, and fails, in the right row, for one with a fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from planted import FAULTS, planted

from attncompiler.measured import Bucket, Entry, Run, Times, save, store
from attncompiler.mechanisms.attention.op import OPERATOR, AttentionOptions
from attncompiler.mechanisms.base import discover, load_entry
from attncompiler.mechanisms.case import Case
from attncompiler.planning import plan
from attncompiler.runtime import dispatch
from attncompiler.spec import ModelSpec, parse
from attncompiler.targets.detect import detect_target
from attncompiler.testing import verify as verifying
from attncompiler.testing.conformance import evaluate, pair_call
from attncompiler.testing.verify import Verification, fitting_length, verify

SMALL = """
name: small
model: {{vocab_size: 32, hidden_size: 16, max_position_embeddings: 32, mlp: {{kind: none}}, dtype: {dtype}}}
policies:
  w:
    {{kind: attention, num_attention_heads: 2, attn_logit_softcapping: 2.0,
    pattern: {{kind: sliding_window, window: 4}}}}
  a: {{kind: attention, num_attention_heads: 2, num_key_value_heads: 1}}
  e: {{kind: linear_attention, num_attention_heads: 2}}
  m: {{kind: mamba, state_size: 4}}
  s: {{kind: mamba2, state_size: 4, head_dim: 8}}
layers: [{{policy: w}}, {{policy: a}}, {{policy: e}}, {{policy: m}}, {{policy: s}}, {{policy: a}}]
"""


def small(dtype: str = "float32") -> ModelSpec:
    return parse(SMALL.format(dtype=dtype))


def faulty(found: Verification) -> set[tuple[str, str]]:
    """The policies and kernels that are over the budget."""
    return {(row.policy, row.kernel) for row in found.rows if row.ok is False}


@pytest.fixture(scope="module")
def sound() -> Verification:
    return verify(small(), device="cpu")


def test_every_kernel_of_every_chain_is_run_with_outputs_and_all_gradients(sound: Verification) -> None:
    assert sound.ok
    assert faulty(sound) == set()
    chains = {(choice.policy, kernel) for choice in plan(small(), "cpu").policies for kernel in choice.chain}
    run = {(row.policy, row.kernel) for row in sound.rows if row.ok is not None}
    assert run == chains
    assert len(run) >= 11
    for policy, kernel in run:
        kind = next(row.mechanism for row in sound.rows if row.policy == policy)
        mechanism = discover()[kind]
        operator = load_entry(mechanism.operator)
        tensors = {row.tensor for row in sound.rows if (row.policy, row.kernel) == (policy, kernel)} - {None}
        assert tensors >= set(operator.outputs) | {
            f"grad {name}" for name in ("q", "k", "v", "u", "x") if name in operator.inputs
        }


def test_layers_lengths_and_refusals_are_stated(sound: Verification) -> None:
    rows = {row.policy: row for row in sound.rows}
    assert rows["a"].layers == "1, 5"
    assert {row.length for row in sound.rows} == {32}
    refused = [row for row in sound.rows if (row.policy, row.kernel) == ("w", "sdpa")]
    assert refused, "softcap is not served by it"
    assert all(row.ok is None and "softcap" in str(row.reason) for row in refused)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_kernel_with_a_fault_is_over_the_budget_and_no_other_is(dtype: str) -> None:
    names = ("a softcap dropped", "a scale of 1.01", "a bias behind the softplus", "a key mask ignored")
    expected = {
        "a softcap dropped": {("w", "chunkwise")},
        "a scale of 1.01": {("w", "chunkwise"), ("a", "chunkwise")},
        "a bias behind the softplus": {("m", "chunkwise")},
        "a key mask ignored": {("w", "chunkwise"), ("a", "chunkwise")},
    }
    assert {fault.name for fault in FAULTS} >= set(names)
    for fault in (fault for fault in FAULTS if fault.name in names):
        with planted(fault):
            found = verify(small(dtype), device="cpu")
        assert faulty(found) == expected[fault.name], fault.name
        assert not found.ok


def test_other_targets_chains_are_run_as_far_as_they_can_be() -> None:
    found = verify(small(), target=["h200", "cpu"], device="cpu")
    assert {row.target for row in found.rows} == {"h200", "cpu"}
    assert found.ok
    assert any(row.target == "h200" and row.ok is not None for row in found.rows)


def test_kernels_that_share_a_call_are_run_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = detect_target("cpu")
    monkeypatch.setattr(store, "folder", lambda: tmp_path)
    levels = {"width": 3, "block": 0, "group": 1, "density": 0, "length": 5}
    times = {"chunkwise": Times(forward=1.0, both=3.0), "sdpa": Times(forward=1.1, both=2.0)}
    bucket = Bucket(dtype="float32", kind="causal", levels=levels)
    run = Run(device=here.title, date="2026-11-27", versions={})
    save([Entry(mechanism="attention", bucket=bucket, run=run, kernels=times)], here.name)
    store._entries.cache_clear()
    try:
        found = verify(small(), device="cpu")
    finally:
        store._entries.cache_clear()
    assert found.ok
    rows = [row for row in found.rows if row.policy == "a" and row.kernel == "chunkwise, backward sdpa"]
    assert {row.tensor for row in rows} >= {"out", "grad q", "grad k", "grad v"}


def test_a_pair_runs_each_direction_by_its_own_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, str]] = []
    attempt = dispatch._attempt

    def spied(kernel: Any, site: Any, direction: str, *rest: Any) -> Any:
        ran.append((kernel.name, direction))
        return attempt(kernel, site, direction, *rest)

    monkeypatch.setattr(dispatch, "_attempt", spied)
    tensors = {name: torch.randn(1, 5, 2, 4) for name in "qkv"}
    case = Case(OPERATOR, tensors, AttentionOptions(), causal=True)
    evaluate(pair_call("chunkwise", "sdpa"), case, {"out": torch.ones(1, 5, 2, 4)})
    assert ran == [("chunkwise", "forward"), ("sdpa", "backward")]


def test_a_policy_that_no_kernel_serves_here_is_no_proof() -> None:
    row = verifying.Row("p", "0", "attention", "cpu", "triton", 8, reason="needs a GPU")
    assert not Verification("s", "cpu", "float32", 2, 8, (row,)).ok


def test_the_length_is_halved_until_the_reference_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = small()
    policy = spec.policies["a"]
    assert fitting_length(spec, policy) == 32
    monkeypatch.setattr(verifying, "MOST_FLOPS", 1)
    assert fitting_length(spec, policy) == 1
