"""The built-in GPU kernel, interpreted where there is no GPU, on inputs that lie or count otherwise than is usual."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attncompiler import ops
from attncompiler.mechanisms.attention.op import OPERATOR, AttentionOptions, as_pattern, check
from attncompiler.mechanisms.base import discover
from attncompiler.mechanisms.case import Case
from attncompiler.testing.conformance import reference_call

launch = pytest.importorskip("attncompiler.mechanisms.attention.flash.launch")


def heads(device: str, T: int = 6, H: int = 4) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, T, H, 16, generator=generator).to(device) for _ in range(3))


def triton(q: Tensor, k: Tensor, v: Tensor, pattern: Any = "causal", **inputs: Tensor) -> dict[str, Tensor]:
    """Its results, and gradients of what it read under the names of the inputs."""
    from attncompiler.mechanisms.attention.kernels.triton import KERNEL

    tensors = {name: x for name, x in check(q=q, k=k, v=v, **inputs).items() if x is not None}
    options = AttentionOptions(pattern=as_pattern(pattern))
    results = KERNEL.forward(tensors, options)
    return results | KERNEL.backward({"out": torch.ones_like(results["out"])}, tensors, results, options)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], msg=lambda said, name=name: f"{name}: {said}")


@pytest.mark.parametrize("name", ["sinks", "alibi_slopes"])
@pytest.mark.parametrize("lay", [lambda x: torch.stack([x, -x], 1)[:, 0], lambda x: x[:1].expand(4)])
def test_numbers_of_heads_may_lie_anywhere(name: str, lay: Callable[[Tensor], Tensor], device: str) -> None:
    numbers = lay(torch.tensor([0.5, 1.5, -1.0, 2.0], device=device))
    assert not numbers.is_contiguous()
    q, k, v = heads(device)
    same(triton(q, k, v, **{name: numbers}), triton(q, k, v, **{name: numbers.clone().contiguous()}))


def test_heads_may_lie_farther_apart_than_32_bits_count(device: str) -> None:
    step = 2**30 + 64  # the third head begins beyond 2^31; what nobody writes to takes no memory
    far = torch.empty(2 * step + 6 * 16, dtype=torch.float16, device=device).as_strided((1, 6, 3, 16), (0, 16, step, 1))
    near = tuple(x.half() for x in heads(device, H=3))
    expected = triton(*near)
    for place in range(3):
        far.copy_(near[place])
        same(triton(*(far if n == place else x for n, x in enumerate(near))), expected)


def test_segment_ids_have_64_bits(device: str) -> None:
    q, k, v = heads(device)
    ids = torch.tensor([[0, 0, 2**32, 2**32, -(2**40), -(2**40)]], device=device)
    named = {"segment_ids": ids, "kv_segment_ids": ids}
    numbered = torch.tensor([[0, 0, 1, 1, 2, 2]], device=device)
    same(triton(q, k, v, "full", **named), triton(q, k, v, "full", segment_ids=numbered))


@pytest.mark.parametrize(
    "pattern",
    [
        {"kind": "causal"},
        {"kind": "chunked", "chunk": 4},
        {"kind": "strided", "stride": 2, "window": 1},
        {"kind": "strided", "stride": 3, "window": 1, "block_size": 2},
        {"kind": "local_global", "block_size": 4, "local_blocks": 1},
        {"kind": "random", "block_size": 1, "local_blocks": 1, "random_blocks": 2},
    ],
    ids=lambda pattern: f"{pattern['kind']}-{pattern.get('block_size', 1)}",
)
def test_keys_at_negative_positions_are_seen_as_others_see_them(pattern: dict[str, Any], device: str) -> None:
    """As the empty slots of a ring of keys may be marked."""
    q, k, v = heads(device)
    kept = torch.tensor([[-2, -1, 0, 1, 2, 3]], device=device)
    places = {"q_positions": torch.arange(6, device=device)[None], "kv_positions": kept}
    expected = ops.attention(q, k, v, pattern=pattern, kernel="eager", **places)
    torch.testing.assert_close(triton(q, k, v, pattern, **places)["out"], expected)


@pytest.mark.parametrize("place", [torch.backends, torch.backends.cuda.matmul], ids=["all", "matmul"])
def test_tf32_is_asked_for_by_either_of_torchs_switches(place: Any) -> None:
    before = place.fp32_precision
    try:
        for said, precision in (("tf32", "tf32"), ("ieee", "ieee")):
            place.fp32_precision = said
            assert launch.precision(torch.float32) == precision
            assert launch.precision(torch.bfloat16) == "ieee"
    finally:
        place.fp32_precision = before
    legacy = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        assert launch.precision(torch.float32) == "tf32"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = legacy


def test_what_is_made_for_a_device_is_kept_once_it_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    from attncompiler.mechanisms.attention.flash import kept

    asked: list[int] = []
    done: list[torch.device] = []

    @kept.kept
    def make(number: int, device: torch.device) -> list[int]:
        asked.append(number)
        return [number]

    class Stream:
        def __init__(self, device: torch.device):
            self.synchronize = lambda: done.append(device)

    capturing = True
    gpu = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(kept, "MOST", 2)
    assert make(1, gpu) is not make(1, gpu), "what is captured is not computed"
    assert not done
    capturing = False
    assert make(1, gpu) is make(1, gpu)
    assert done == [gpu]
    for number in (2, 3, 1):
        make(number, torch.device("cpu"))
    assert asked == [1, 1, 1, 2, 3, 1], "another device, and no more than two"
    make(3, torch.device("cpu"))
    assert len(asked) == 6
    assert done == [gpu], "a CPU computes at once"


@pytest.mark.parametrize(
    "pattern",
    [
        {"kind": "full"},
        {"kind": "sliding_window", "window": 3, "causal": False},
        {"kind": "sliding_window", "window": 3, "global_tokens": 1, "causal": False},
        {"kind": "strided", "stride": 2, "window": 1, "block_size": 1, "causal": False},
        {"kind": "random", "block_size": 1, "local_blocks": 2, "random_blocks": 1, "causal": False},
        {"kind": "causal"},
    ],
    ids=lambda pattern: "-".join(map(str, pattern.values())),
)
def test_queries_before_the_first_key_stand_before_the_first_real_one(pattern: dict[str, Any], device: str) -> None:
    """Padding on the left moves the keys, and with them the queries that are before them all."""
    q, k, v = heads(device, T=7)
    mask = torch.tensor([[0, 0, 1, 1]], dtype=torch.bool, device=device)
    given = {"attention_mask": mask, "alibi_slopes": torch.tensor([0.7, 0.1, 0.0, 1.0], device=device)}
    tensors = {name: x for name, x in check(q=q, k=k[:, :4], v=v[:, :4], **given).items() if x is not None}
    case = Case(OPERATOR, tensors, AttentionOptions(pattern=as_pattern(pattern)), causal=True)
    expected = reference_call(discover()["attention"])(case)
    found = triton(q, k[:, :4], v[:, :4], pattern, **given)
    same({name: found[name] for name in expected}, expected)


@pytest.mark.parametrize("sequences", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_one_query_with_one_drawn_block_sees_no_other(sequences: int, masked: bool, device: str) -> None:
    """Block 16 of queries sees the blocks 14 to 16 and a drawn one: not block 0, which nobody drew."""
    q, k, v = (x[:, :, :1].expand(sequences, -1, -1, -1).contiguous() for x in heads(device, T=34))
    pattern = {"kind": "random", "block_size": 2, "random_blocks": 1, "local_blocks": 3}
    given = {"attention_mask": torch.ones(sequences, 34, dtype=torch.bool, device=device)} if masked else {}
    tensors = {name: x for name, x in check(q=q[:, :1], k=k, v=v, **given).items() if x is not None}
    case = Case(OPERATOR, tensors, AttentionOptions(pattern=as_pattern(pattern)), causal=True)
    expected = reference_call(discover()["attention"])(case)
    found = triton(q[:, :1], k, v, pattern, **given)
    same({name: found[name] for name in expected}, expected)
