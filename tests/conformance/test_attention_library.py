"""What can be said of the libraries' kernels without a GPU: refusals, the operators they call, masks and tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from attncompiler import targets
from attncompiler.mechanisms.attention import fused, op
from attncompiler.mechanisms.attention.cases import CASES
from attncompiler.mechanisms.attention.kernels import flash_attention_4
from attncompiler.mechanisms.attention.kernels import flex_attention as flex
from attncompiler.mechanisms.attention.mechanism import MECHANISM
from attncompiler.mechanisms.attention.op import OPERATOR, AttentionOptions, as_pattern
from attncompiler.mechanisms.attention.visibility import visible
from attncompiler.mechanisms.base import refusals
from attncompiler.mechanisms.case import Case
from attncompiler.targets.detect import Environment

WINDOW = {"kind": "sliding_window", "window": 9}
GLOBAL = {**WINDOW, "global_tokens": 2}
RANDOM = {"kind": "random", "block_size": 4, "random_blocks": 2}


def inputs_of(
    T: int = 40, S: int = 40, D: int = 64, V: int = 64, dtype: torch.dtype = torch.bfloat16, **others: Tensor
) -> dict[str, Tensor]:
    q, k, v = (torch.zeros(2, n, heads, d, dtype=dtype) for n, heads, d in ((T, 4, D), (S, 2, D), (S, 2, V)))
    return {"q": q, "k": k, "v": v, **others}


def reasons(name: str, inputs: dict[str, Tensor], target: str = "h100", **options: Any) -> list[str]:
    """What a kernel says against a call on that target, where everything is installed."""
    pattern = as_pattern(options.pop("pattern", "causal"))
    request = OPERATOR.request(inputs, AttentionOptions(pattern=pattern, **options))
    kernel = MECHANISM.kernel(name)
    assert kernel is not None
    return [str(reason) for reason in refusals(kernel, request, targets.get(target))]


LIBRARY = ("flash_attention_4", "cudnn", "flex_attention", "sdpa")


@pytest.mark.parametrize("name", LIBRARY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_all_of_them_serve(name: str, dtype: torch.dtype) -> None:
    sinks = torch.zeros(4)
    for pattern in ("full", "causal"):
        assert reasons(name, inputs_of(dtype=dtype), pattern=pattern) == []
        assert reasons(name, inputs_of(dtype=dtype, D=20, V=12, sinks=sinks), pattern=pattern) == []


MASKS = {
    "padding": {"attention_mask": torch.ones(2, 40, dtype=torch.bool)},
    "segments": {"segment_ids": torch.zeros(2, 40, dtype=torch.int64)},
    "positions": {name: torch.arange(40).expand(2, -1) for name in ("q_positions", "kv_positions")},
}
REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    *(("cudnn", MASKS[mask], {}, f"cudnn does not offer {mask}: its backward gives NaN") for mask in MASKS),
    ("cudnn", {}, {"pattern": WINDOW}, "pattern = sliding_window (only causal, full)"),
    ("cudnn", {"T": 30}, {}, "lengths = fewer queries than keys: it is causal from the top left"),
    ("cudnn", {"S": 30}, {}, "lengths = more queries than keys: it is causal from the top left"),
    ("cudnn", {"T": 1}, {"pattern": "full"}, "single_token: it builds no backward for one (pytorch #138529)"),
    ("cudnn", {"D": 136, "V": 136}, {}, "head_dim = 136 (at most 128)"),
    ("cudnn", {"V": 136}, {}, "value_width = 136 (at most 128)"),
    ("cudnn", {"dtype": torch.float32}, {}, "cudnn does not take float32"),
    ("cudnn", {}, {"softcap": 3.0}, "softcap = 3.0"),
    ("cudnn", {"alibi_slopes": torch.ones(4)}, {}, "alibi"),
    ("cudnn", {}, {"deterministic": True}, "deterministic: nothing says that its backward is repeatable"),
    ("cudnn", {}, {"scale": -1.0}, "non_positive_scale"),
    ("flash_attention_4", {}, {"softcap": 3.0}, "softcap = 3.0: its backward hangs (flash-attention #2466)"),
    ("flash_attention_4", {}, {"pattern": GLOBAL}, "its backward does not read masks that its forward does"),
    ("flash_attention_4", {}, {"pattern": {"kind": "chunked", "chunk": 8}}, "wrong at D = 64 (flash-attention #2623)"),
    ("flash_attention_4", {"D": 256, "V": 256}, {}, "wrong at D = 256 (TransformerEngine #3216)"),
    (
        "flash_attention_4",
        {"S": 30},
        {},
        "more queries than keys (only fewer queries than keys): rows that see nothing",
    ),
    ("flash_attention_4", MASKS["segments"], {}, "segments: they need a host read of their lengths"),
    ("flash_attention_4", MASKS["padding"], {}, "padding"),
    ("flash_attention_4", {}, {"deterministic": True}, "deterministic"),
    ("flash_attention_4", {}, {"scale": 0.0}, "non_positive_scale"),
    ("flash_attention_4", {"dtype": torch.float32}, {}, "flash_attention_4 does not take float32"),
    ("flex_attention", {"dtype": torch.float64}, {}, "flex_attention does not take float64"),
    ("flex_attention", MASKS["positions"], {"pattern": RANDOM}, "drawn_on_device"),
    ("flex_attention", MASKS["padding"], {"pattern": {**RANDOM, "causal": False}}, "drawn_on_device"),
    ("flex_attention", {"dropout_seed": torch.zeros(1, dtype=torch.int64)}, {"dropout": 0.5}, "dropout = 0.5"),
    ("flex_attention", {"D": 264, "V": 264}, {}, "head_dim = 264 (at most 256)"),
    ("sdpa", {"dtype": torch.float64}, {}, "sdpa does not take float64"),
    ("sdpa", {}, {"scale": -1.0}, "non_positive_scale"),
    ("sdpa", {"T": 6000, "S": 6000}, {"pattern": GLOBAL}, "mask_bytes = 72000000 (at most 6.71089e+07 bytes)"),
    ("sdpa", {}, {"softcap": 3.0}, "softcap = 3.0"),
    ("sdpa", {"alibi_slopes": torch.ones(4)}, {}, "alibi"),
]


@pytest.mark.parametrize(("name", "tensors", "options", "said"), REFUSED, ids=lambda value: str(value)[:40])
def test_each_refusal_is_a_sentence(name: str, tensors: dict[str, Any], options: dict[str, Any], said: str) -> None:
    found = reasons(name, inputs_of(**tensors), **options)
    assert any(said in reason for reason in found), found


def test_what_is_refused_of_one_is_served_by_another() -> None:
    for mask in MASKS.values():
        assert reasons("flex_attention", inputs_of(**mask)) == reasons("sdpa", inputs_of(**mask)) == []
    assert reasons("flash_attention_4", inputs_of(), pattern=WINDOW) == []
    assert reasons("flash_attention_4", inputs_of(T=30)) == []
    assert reasons("sdpa", inputs_of(T=6000, S=6000), pattern=WINDOW) == [], "a band needs no mask on a GPU"
    assert reasons("sdpa", inputs_of(T=6000, S=6000), "cpu", pattern=WINDOW) != []
    assert reasons("flex_attention", inputs_of(T=30), scale=-1.0, softcap=3.0, deterministic=True) == []


def test_older_gpus_other_makers_and_missing_packages_are_refused() -> None:
    assert "flash_attention_4 needs compute capability 9.0 or later" in reasons("flash_attention_4", inputs_of(), "l4")
    for name in ("cudnn", "flex_attention"):
        assert f"{name} needs compute capability 8.0 or later" in reasons(name, inputs_of(), "t4")
    for name in LIBRARY:
        assert f"{name} needs nvidia hardware, mi300x is amd" in reasons(name, inputs_of(), "mi300x")
    kernel = MECHANISM.kernel("flash_attention_4")
    assert kernel is not None
    request = OPERATOR.request(inputs_of(), AttentionOptions())
    for packages, installed in (({"flash_attn": "2.8"}, False), ({"flash-attn-4": "4.0", "flash_attn": "4.0"}, True)):
        found = refusals(kernel, request, targets.get("h100"), Environment(packages, "3.12", "Linux x86_64"))
        said = ["flash-attn-4 is not installed: pip install 'attncompiler[fa4]'"]
        assert [str(reason) for reason in found] == ([] if installed else said)


# --- the operators that are called ----------------------------------------------------------------------------------

SCHEMAS = {
    "_scaled_dot_product_cudnn_attention": "Tensor query, Tensor key, Tensor value, Tensor? attn_bias, "
    "bool compute_log_sumexp, float dropout_p=0., bool is_causal=False, bool return_debug_mask=False, *, "
    "float? scale=None) -> (Tensor output, Tensor logsumexp,",
    "_scaled_dot_product_cudnn_attention_backward": "Tensor grad_out, Tensor query, Tensor key, Tensor value, "
    "Tensor out, Tensor logsumexp, Tensor philox_seed, Tensor philox_offset, Tensor attn_bias, Tensor cum_seq_q, "
    "Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, *, float? scale=None) -> "
    "(Tensor, Tensor, Tensor)",
    "_flash_attention_forward": "Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, "
    "SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, bool return_debug_mask, *, float? scale=None, "
    "SymInt? window_size_left=None, SymInt? window_size_right=None,",
    "_flash_attention_backward": "Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, "
    "Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, "
    "bool is_causal, Tensor rng_state, Tensor unused, *, float? scale=None, SymInt? window_size_left=None, "
    "SymInt? window_size_right=None) -> (Tensor, Tensor, Tensor)",
    "_efficient_attention_forward": "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, SymInt? max_seqlen_q, SymInt? max_seqlen_k, float dropout_p, int custom_mask_type, "
    "bool compute_log_sumexp=False, *, float? scale=None, Tensor? seqlen_k=None, int? window_size=None) -> "
    "(Tensor output, Tensor logsumexp,",
    "_efficient_attention_backward": "Tensor grad_out_, Tensor query, Tensor key, Tensor value, Tensor? bias, "
    "Tensor out, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "Tensor logsumexp, float dropout_p, Tensor philox_seed, Tensor philox_offset, int custom_mask_type, "
    "bool bias_requires_grad, *, float? scale=None, int? num_splits_key=None, int? window_size=None,",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_torchs_private_operators_are_those_that_the_kernels_were_written_for(name: str) -> None:
    assert str(getattr(torch.ops.aten, name).default._schema).startswith(f"aten::{name}({SCHEMAS[name]}")


def test_the_lse_of_cudnn_has_four_axes() -> None:
    """As its backward takes it."""
    q = torch.empty(2, 4, 8, 16, device="meta", dtype=torch.bfloat16)
    _, stats, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, q, q, None, True)
    assert stats.shape == (2, 4, 8, 1)


def test_flash_attention_4_is_told_the_window_that_is_asked_for() -> None:
    """Its window does not count the query itself, ours does; one that reaches every key is none."""

    def said(pattern: Any) -> tuple[Any, ...]:
        return tuple(flash_attention_4.visibility(AttentionOptions(pattern=as_pattern(pattern)), 64).values())

    assert said("full") == (False, None, None)
    assert said("causal") == (True, None, None)
    assert said({"kind": "sliding_window", "window": 16}) == (False, 15, 0)
    assert said({"kind": "sliding_window", "window": 64}) == (True, None, None)


def test_grouped_heads_come_apart_and_together() -> None:
    tensor = torch.randn(2, 5, 6, 3)
    apart = fused.apart(tensor, 2)
    assert apart.shape == (4, 5, 3, 3)
    assert torch.equal(apart[1], tensor[0, :, 3:])
    assert torch.equal(fused.together(apart, 2), tensor)


# --- FlexAttention's masks and tiles ---------------------------------------------------------------------------------


def held(inputs: dict[str, Tensor], options: AttentionOptions) -> tuple[Tensor, flex.Kind, dict[str, Tensor]]:
    """The mask (B, T, S) that FlexAttention's mask_mod says, and what it is made of."""
    data = flex.captured(inputs, options)
    kind = flex.Kind(options.pattern, 1.0, options.softcap, frozenset())
    mask_mod, _ = flex.mods(kind, flex.formula(options.pattern), data)
    B, T, S = inputs["q"].shape[0], inputs["q"].shape[1], inputs["k"].shape[1]
    index = torch.meshgrid(*map(torch.arange, (B, 1, T, S)), indexing="ij")
    said = torch.vmap(mask_mod)(*(each.flatten() for each in index)).view(B, T, S)
    return said, kind, data


def test_the_mask_of_flex_attention_is_what_is_visible(for_cases: Any) -> None:
    def check(case: Case) -> None:
        if reasons_of(case):
            return
        said, _, _ = held(case.tensors, case.options)
        seen = visible(case.tensors, case.options.pattern, layer=case.options.layer)
        assert torch.equal(said, seen.expand(said.shape))

    def reasons_of(case: Case) -> bool:
        return bool(OPERATOR.features(case.tensors, case.options)["drawn_on_device"])

    for_cases(check, CASES.extras(), share=6)


def dense(number: Tensor, indices: Tensor, columns: int) -> Tensor:
    """(1, 1, rows), (1, 1, rows, most) → which tiles are listed, (rows, columns)."""
    found = torch.zeros(number.shape[-1], columns, dtype=torch.int64)
    for row, count in enumerate(number[0, 0].tolist()):
        found[row, indices[0, 0, row, :count].long()] += 1
    assert found.max() <= 1
    return found.bool()


PATTERNS: list[dict[str, Any]] = [
    {"kind": "full"},
    {"kind": "causal"},
    {"kind": "sliding_window", "window": 150, "global_tokens": 3},
    {"kind": "sliding_window", "window": 70, "causal": False},
    {"kind": "local_global", "block_size": 64, "local_blocks": 2, "global_blocks": 1},
    {"kind": "random", "block_size": 64, "random_blocks": 1},
    {"kind": "chunked", "chunk": 200},
]


@pytest.mark.parametrize("lengths", [(512, 512), (390, 390), (200, 520), (300, 140)], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: str(pattern["kind"]))
def test_the_tiles_of_flex_attention_are_those_of_the_dense_mask(
    pattern: dict[str, Any], lengths: tuple[int, int]
) -> None:
    T, S = lengths
    inputs, options = inputs_of(T, S), AttentionOptions(pattern=as_pattern(pattern), layer=2)
    found = flex.Tiles.of(inputs, options).tensors
    mask_mod, _ = flex.mods(
        flex.Kind(options.pattern, 1.0, None, frozenset()),
        flex.formula(options.pattern),
        flex.captured(inputs, options),
    )
    block = create_block_mask(mask_mod, None, None, T, S, device="cpu")
    rows, columns = -(-T // flex.TILE), -(-S // flex.TILE)
    for name in ("kv_indices", "q_indices"):
        assert found[name].stride() == found[f"full_{name}"].stride(), "the kernel reads both by the strides of one"
    for prefix in ("", "full_"):
        ours = dense(found[f"{prefix}kv_num_blocks"], found[f"{prefix}kv_indices"], columns)
        theirs = dense(getattr(block, f"{prefix}kv_num_blocks"), getattr(block, f"{prefix}kv_indices"), columns)
        assert torch.equal(ours, theirs), prefix
        across = dense(found[f"{prefix}q_num_blocks"], found[f"{prefix}q_indices"], rows)
        assert torch.equal(across.T, ours), prefix


def test_where_positions_are_others_no_tile_that_is_seen_is_left_out(for_cases: Any) -> None:
    def check(case: Case) -> None:
        inputs = case.tensors
        if not inputs.keys() & {"segment_ids", "attention_mask", "q_positions"}:
            return
        found = flex.Tiles.of(inputs, case.options).tensors
        assert not found["full_kv_num_blocks"].any()
        seen = visible(inputs, case.options.pattern, layer=case.options.layer).any(0)
        tiles = dense(found["kv_num_blocks"], found["kv_indices"], -(-seen.shape[1] // flex.TILE))
        assert not (
            seen
            & ~tiles.repeat_interleave(flex.TILE, 0).repeat_interleave(flex.TILE, 1)[: seen.shape[0], : seen.shape[1]]
        ).any()

    for_cases(check, CASES.extras(), share=4)


@pytest.mark.parametrize("pattern", [*PATTERNS[1:4], PATTERNS[5]], ids=lambda pattern: str(pattern))
def test_scores_of_flex_attention_are_the_references(pattern: dict[str, Any]) -> None:
    """The whole call, as torch computes it on a CPU without compiling it."""
    from attncompiler.mechanisms.attention.reference import attention

    generator = torch.Generator().manual_seed(0)
    T, S = 150, 200
    inputs = {
        "q": torch.randn(2, T, 4, 16, generator=generator),
        "k": torch.randn(2, S, 2, 16, generator=generator),
        "v": torch.randn(2, S, 2, 12, generator=generator),
        "alibi_slopes": torch.rand(4, generator=generator),
        "attention_mask": torch.arange(S) >= torch.tensor([[0], [61]]),
    }
    options = AttentionOptions(pattern=as_pattern(pattern), softcap=3.0, scale=0.3)
    _, kind, data = held(inputs, options)
    kind = flex.Kind(kind.pattern, 0.3, 3.0, kind.given)
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    run = torch.compile(flex.attend, backend="aot_eager", fullgraph=True)
    out, lse = run(q, k, v, kind, flex.formula(kind.pattern), data, flex.Tiles.of(inputs, options).tensors)
    exact = attention(inputs, options)
    torch.testing.assert_close(out, exact["out"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, exact["lse"], rtol=1e-4, atol=1e-5)


def test_one_kernel_serves_all_layers() -> None:
    """What a kernel is compiled for does not name the layer, whose draws are data."""
    first, other = (AttentionOptions(pattern=as_pattern(RANDOM), layer=layer) for layer in (0, 1))
    (_, kind, data), (_, again, others) = (held(inputs_of(), options) for options in (first, other))
    assert kind == again
    assert not torch.equal(data["drawn"], others["drawn"])


def test_a_call_states_its_lengths_only_where_the_pattern_reads_them() -> None:
    def lengths(T: int, S: int, pattern: str) -> Any:
        return op.OPERATOR.features(inputs_of(T, S), AttentionOptions(pattern=as_pattern(pattern)))["lengths"]

    assert lengths(4, 4, "causal") is lengths(4, 9, "full") is None
    assert (lengths(4, 9, "causal"), lengths(9, 4, "causal")) == ("fewer queries than keys", "more queries than keys")


@pytest.mark.parametrize(("B", "K", "copies"), [(3, 4, 3), (3, 2, 6), (1, 2, 1)])
def test_a_dense_mask_is_counted_for_each_key_head_where_heads_are_grouped(B: int, K: int, copies: int) -> None:
    """As often as `sdpa` has it in memory, whose key heads are sequences of their own then."""
    inputs = {"q": torch.empty(B, 8, 4, 16), "attention_mask": torch.ones(B, 8, dtype=torch.bool)}
    inputs |= {name: torch.empty(B, 8, K, 16) for name in "kv"}
    assert OPERATOR.request(inputs, AttentionOptions()).features["mask_bytes"] == copies * 8 * 8 * 4
