"""The walk along a chain: what runs, what is refused, what fails, and what stays on record."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace

import pytest
import torch

from attncompiler.errors import InputError, KernelError, fail
from attncompiler.mechanisms import base
from attncompiler.mechanisms.attention.layer import AttentionSite
from attncompiler.mechanisms.attention.op import AttentionOptions, attention
from attncompiler.mechanisms.attention.pattern import SlidingWindow
from attncompiler.runtime import dispatch, inputs, registry
from attncompiler.runtime.context import Chain
from attncompiler.runtime.dispatch import KernelFallbackWarning
from attncompiler.runtime.implementation import Implementation


def _broken(*_: object) -> dict[str, torch.Tensor]:
    raise RuntimeError("the kernel broke")


BROKEN = Implementation(_broken, _broken)
FORWARD_ONLY = Implementation(base.load_entry("attncompiler.mechanisms.attention.reference:EAGER").forward, None)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention with two more kernels: `broken`, which fails, and `forward_only`, which has no backward."""
    found = dict(base.discover())
    mechanism = found["attention"]
    eager = mechanism.kernel("eager")
    assert eager is not None
    extra = tuple(replace(eager, name=name, entry=f"{__name__}:{name.upper()}") for name in ("broken", "forward_only"))
    found["attention"] = replace(
        mechanism, kernels=mechanism.kernels + extra, names=(*mechanism.names, "broken", "forward_only")
    )
    implementations = {f"{__name__}:BROKEN": BROKEN, f"{__name__}:FORWARD_ONLY": FORWARD_ONLY}
    load = base.load_entry
    for module in (dispatch, inputs):
        monkeypatch.setattr(module, "discover", lambda: found)
    monkeypatch.setattr(dispatch, "load_entry", lambda entry: implementations.get(entry) or load(entry))


def qkv(length: int = 6) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, length, 2, 4, generator=generator).requires_grad_() for _ in range(3))


def site(*chain: str, on_failure: str = "next", **options: object) -> AttentionSite:
    return AttentionSite(AttentionOptions(**options), Chain("layers.0.mixer", chain, on_failure))


def test_the_first_kernel_of_the_chain_runs_and_is_recorded() -> None:
    one = site("chunkwise", "eager")
    out, _ = one(*qkv())
    out.sum().backward()
    assert one.record.calls == {("chunkwise", "forward"): 1, ("chunkwise", "backward"): 1}
    assert not one.record.failures
    assert not one.record.refusals


def test_the_backward_may_begin_with_another_kernel_and_goes_on_along_the_chain() -> None:
    options = AttentionOptions()
    one = AttentionSite(options, Chain("a", ("chunkwise", "sdpa", "eager"), backward="eager"))
    two = AttentionSite(options, Chain("b", ("chunkwise",)))
    inputs = qkv()
    gradients = []
    for each in (one, copy.deepcopy(one), two):
        out, _ = each(*inputs)
        gradients.append(torch.autograd.grad(out.square().sum(), inputs))
        backward = "eager" if each is not two else "chunkwise"
        assert each.record.calls == {("chunkwise", "forward"): 1, (backward, "backward"): 1}
    torch.testing.assert_close(gradients[0], gradients[-1])
    assert "backward by eager" in repr(one)


@pytest.mark.usefixtures("planted")
def test_a_kernel_without_a_backward_leaves_it_to_the_chain() -> None:
    one = AttentionSite(AttentionOptions(), Chain("a", ("eager", "forward_only"), backward="forward_only"))
    out, _ = one(*qkv())
    out.sum().backward()
    assert one.record.calls == {("eager", "forward"): 1, ("eager", "backward"): 1}


@pytest.mark.usefixtures("planted")
def test_a_failure_moves_on_with_a_warning_and_a_record_and_the_same_result() -> None:
    q, k, v = qkv()
    one = site("broken", "eager")
    with pytest.warns(KernelFallbackWarning, match=r"layers\.0\.mixer: broken \(forward\) failed with RuntimeError"):
        out, _ = one(q, k, v)
    with pytest.warns(KernelFallbackWarning, match=r"broken \(backward\) failed"):
        out.sum().backward()
    assert one.record.calls == {("eager", "forward"): 1, ("eager", "backward"): 1}
    assert one.record.failures["broken", "forward"] == "RuntimeError: the kernel broke"
    torch.testing.assert_close(out, attention(q, k, v, kernel="eager"), rtol=0, atol=0)


@pytest.mark.usefixtures("planted")
def test_on_failure_raise_stops_with_the_kernels_own_error() -> None:
    with pytest.raises(RuntimeError, match="the kernel broke"):
        site("broken", "eager", on_failure="raise")(*qkv())


@pytest.mark.usefixtures("planted")
def test_an_error_of_the_caller_is_never_taken_for_a_failure_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> dict[str, torch.Tensor]:
        raise fail(InputError, "E403", "not so")

    load = dispatch.load_entry
    refusing = Implementation(refuse, refuse)
    monkeypatch.setattr(dispatch, "load_entry", lambda entry: refusing if entry.endswith(":BROKEN") else load(entry))
    one = site("broken", "eager")
    with pytest.raises(InputError, match="E403 not so"):
        one(*qkv())
    assert not one.record.failures


@pytest.mark.usefixtures("planted")
def test_a_call_without_a_site_never_falls_back() -> None:
    with pytest.raises(RuntimeError, match="the kernel broke"):
        attention(*qkv(), kernel=["broken", "eager"])


@pytest.mark.usefixtures("planted")
def test_a_kernel_may_supply_one_direction_alone() -> None:
    one = site("forward_only", "chunkwise")
    out, _ = one(*qkv())
    out.sum().backward()
    assert one.record.calls == {("forward_only", "forward"): 1, ("chunkwise", "backward"): 1}


@pytest.mark.usefixtures("planted")
def test_when_none_can_run_the_error_names_every_reason() -> None:
    with (
        pytest.warns(KernelFallbackWarning),
        pytest.raises(KernelError, match="E501") as caught,
    ):
        site("ring", "broken", pattern=SlidingWindow(window=2))(*qkv())
    message = str(caught.value)
    assert "ring: not built in this version" in message
    assert "broken: failed with RuntimeError: the kernel broke" in message


def test_what_a_call_asks_and_a_kernel_cannot_do_is_refused_and_recorded() -> None:
    """At this length sdpa would need a mask over its limit: the next kernel runs, and the reason is kept."""
    one = site("sdpa", "chunkwise", pattern=SlidingWindow(window=8))
    q, k, v = (torch.zeros(1, 4200, 1, 4) for _ in range(3))
    one(q, k, v)
    assert one.record.calls == {("chunkwise", "forward"): 1}
    (reason,) = one.record.refusals["sdpa", "forward"]
    assert reason.source == "option"
    assert "mask_bytes = 70560000" in reason.reason


def test_an_argument_no_kernel_offers_is_an_error_and_is_never_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    mechanism, expected = base.discover()["attention"], attention(*qkv(), kernel="eager")
    plain = base.Kernel(
        "plain",
        mechanism.kernels[-1].entry,
        base.Needs(features={"pattern": base.ANY, "head_dim": base.ANY}),
        "no option at all",
    )
    offering = replace(mechanism, kernels=(plain,), names=("plain",))
    monkeypatch.setitem(base.discover(), "attention", offering)  # type: ignore[arg-type]
    assert torch.equal(attention(*qkv(), kernel="plain"), expected)
    for argument in ({"softcap": 3.0}, {"dropout": 0.5}, {"sinks": torch.zeros(2)}, {"alibi_slopes": torch.ones(2)}):
        with pytest.raises(KernelError, match=f"does not offer {next(iter(argument)).partition('_')[0]}"):
            attention(*qkv(), **argument, kernel="plain")


def test_handles_are_found_while_their_site_lives_and_belong_to_it_alone() -> None:
    one = site("eager")
    handle = int(one.handle)
    assert registry.find(handle) is one.record
    other = copy.deepcopy(one)
    assert int(other.handle) != handle
    assert other.chain == one.chain
    assert registry.find(int(other.handle)) is other.record
    del one
    gc.collect()
    assert registry.find(handle) is None


def test_an_unknown_handle_runs_the_mechanisms_own_order() -> None:
    one = site("eager")
    one.handle = torch.tensor(12345)
    out, _ = one(*qkv())
    assert out.isfinite().all()
    assert not one.record.calls


def test_the_handle_stays_on_the_cpu_and_out_of_the_state_dict() -> None:
    with torch.device("meta"):
        one = site("eager")
    assert one.handle.device.type == "cpu"
    assert one.to(torch.float64).handle.dtype == torch.int64
    assert not one.state_dict()


def test_who_looks_on_sees_the_operator_and_who_does_not_gets_the_same() -> None:
    """Without gradients a call goes past torch's dispatcher, unless a mode, a transform or a profiler watches it."""
    from torch.profiler import profile
    from torch.utils.flop_counter import FlopCounterMode

    one, inputs_ = site("chunkwise", "eager"), [tensor.detach() for tensor in qkv()]
    seen = one(*qkv())[0].detach()
    with profile(acc_events=True) as plain, torch.no_grad():
        assert torch.equal(one(*inputs_)[0], seen)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        assert torch.equal(one(*inputs_)[0], seen)
    with torch.no_grad():
        assert torch.equal(one(*inputs_)[0], seen)
        with pytest.raises(RuntimeError, match="Batching rule not implemented for attncompiler::attention"):
            torch.vmap(lambda q: one(q, *inputs_[1:])[0])(inputs_[0][None])
    assert "attncompiler::attention" in {event.key for event in plain.key_averages()}
    assert counter.get_total_flops() > 0
    assert one.record.calls == {("chunkwise", "forward"): 4}
    with torch.no_grad():
        assert one(*(tensor.to("meta") for tensor in inputs_))[0].device.type == "meta"
