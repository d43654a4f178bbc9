"""Options that a mixer's layer passes on to its operator, against formulas written out here.

A model of one layer without an MLP is x + mixer(norm(x)): its emitted graph gives what the mixer made of norm(x).
Everything is in fp64, but for what Mamba keeps in fp32; weights are drawn far from their start.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import ENCODERS, MIXERS, text
from torch import Tensor, nn

from attncompiler import spec as specs
from attncompiler.emit import CompiledModel
from attncompiler.mechanisms.attention.pattern import Random
from attncompiler.mechanisms.attention.visibility import pattern_visible
from attncompiler.mechanisms.base import discover
from attncompiler.mechanisms.mamba2.op import Mamba2Options
from attncompiler.pipeline import build

EPS = 0.5
"""of the model's norms, and so of those inside a mixer"""
Turn = Callable[[Tensor], Tensor]


def compiled(*policies: str, extra: str = "", dtype: torch.dtype = torch.float64, layers: int = 1) -> CompiledModel:
    written = text(*policies, extra=extra, layers=layers, model="mlp: {kind: none}").replace(
        "  hidden_size: 32", f"  hidden_size: 32\n  norm: {{eps: {EPS}}}"
    )
    return build(specs.parse(written), device="cpu", dtype=dtype)


def with_option(policy: str, option: str) -> str:
    return policy[:-1] + f", {option}}}" if option else policy


def mechanism(policy: str) -> str:
    return policy.removeprefix("{kind: ").partition(",")[0]


def run(options: str, **inputs: Tensor) -> tuple[nn.Module, Tensor, Tensor]:
    """The mixer of a policy, what went into it (2, 11, 32) and what came out."""
    layer = compiled(f"{{{options}}}").layers["0"]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            matrix = name.endswith("proj.weight")
            norm = name.endswith("norm.weight")
            parameter.copy_(value / parameter.shape[-1] ** 0.5 if matrix else 1 + value / 4 if norm else value / 2)
    hidden = torch.randn(2, 11, 32, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        return layer.mixer, layer.mixer_norm(hidden), layer(hidden, **inputs)[0] - hidden


def linear(module: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, module.weight, module.bias)


def heads(module: nn.Module, x: Tensor, count: int) -> Tensor:
    """(B, heads, T, width), by way of a projection."""
    return linear(module, x).unflatten(-1, (count, -1)).transpose(1, 2)


def merged(module: nn.Module, out: Tensor) -> Tensor:
    return linear(module, out.transpose(1, 2).flatten(-2))


def projected(mixer: nn.Module) -> tuple[int, ...]:
    return tuple(module.out_features for module in (mixer.q_proj, mixer.k_proj, mixer.v_proj))


def unchanged(x: Tensor) -> Tensor:
    return x


def root_mean_square(weight: Tensor) -> Turn:
    return lambda x: x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def length_one(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt().clamp(min=EPS)


def turned(width: int, theta: float, interleaved: bool, positions: Tensor) -> Turn:
    """Rotary as products of complex numbers, of the first `width` channels."""

    def turn(x: Tensor) -> Tensor:
        first, rest = x[..., :width], x[..., width:]
        pairs = first.unflatten(-1, (-1, 2)) if interleaved else first.unflatten(-1, (2, -1)).transpose(-1, -2)
        angle = positions[:, None] * theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        found = torch.view_as_real(
            torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angle), angle)
        )
        return torch.cat([(found if interleaved else found.transpose(-1, -2)).flatten(-2), rest], -1)

    return turn


# --- attention --------------------------------------------------------------------------------------------------


def softmax_attention(
    mixer: nn.Module,
    x: Tensor,
    seen: Tensor,
    *,
    counts: tuple[int, int] = (4, 4),
    scale: float | None = None,
    normed: tuple[Turn, Turn] = (unchanged, unchanged),
    turn: Turn = unchanged,
    bias: Tensor | float = 0.0,
) -> Tensor:
    q = heads(mixer.q_proj, x, counts[0])
    k, v = (heads(module, x, counts[1]) for module in (mixer.k_proj, mixer.v_proj))
    q, k = turn(normed[0](q)), turn(normed[1](k))
    k, v = (each.repeat_interleave(counts[0] // counts[1], 1) for each in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale) + bias
    return merged(mixer.o_proj, scores.masked_fill(~seen, -math.inf).softmax(-1) @ v)


CAUSAL = torch.ones(11, 11, dtype=torch.bool).tril()
DISTANCE = (torch.arange(11)[:, None] - torch.arange(11)).abs()
ATTENTION = "kind: attention, num_attention_heads: 4"


@pytest.mark.parametrize(
    ("options", "widths", "given"),
    [
        ("", (32, 32, 32), {}),
        ("query_pre_attn_scalar: 3.0", (32, 32, 32), {"scale": 3**-0.5}),
        ("num_key_value_heads: 2", (32, 16, 16), {"counts": (4, 2)}),
        ("num_key_value_heads: 1, head_dim: 6", (24, 6, 6), {"counts": (4, 1)}),
        ("v_head_dim: 3", (32, 32, 12), {}),
        ("v_head_dim: 10, head_dim: 6, num_key_value_heads: 2", (24, 12, 20), {"counts": (4, 2)}),
    ],
)
def test_attention_scales_and_shapes_its_heads(
    options: str, widths: tuple[int, int, int], given: dict[str, Any]
) -> None:
    """Widths are those of all heads of queries, keys and values."""
    mixer, x, out = run(f"{ATTENTION}, {options}")
    assert projected(mixer) == widths
    torch.testing.assert_close(out, softmax_attention(mixer, x, CAUSAL, **given))


@pytest.mark.parametrize(
    ("pattern", "seen"),
    [
        ("{kind: causal}", CAUSAL),
        ("{kind: full}", CAUSAL | True),
        ("{kind: sliding_window, window: 3}", CAUSAL & (DISTANCE < 3)),
        ("{kind: sliding_window, window: 3, global_tokens: 2}", CAUSAL & ((DISTANCE < 3) | (torch.arange(11) < 2))),
        ("{kind: sliding_window, window: 3, causal: false}", DISTANCE < 3),
    ],
    ids=["causal", "full", "window", "global", "both ways"],
)
def test_attention_sees_what_its_pattern_says(pattern: str, seen: Tensor) -> None:
    mixer, x, out = run(f"{ATTENTION}, pattern: {pattern}")
    torch.testing.assert_close(out, softmax_attention(mixer, x, seen))


def test_each_layer_of_a_random_pattern_draws_blocks_of_its_own() -> None:
    """Two layers of equal weights see what the pattern shows layers 0 and 1, which is not the same."""
    pattern = Random(block_size=1, random_blocks=2)
    layers = compiled(f"{{{ATTENTION}, pattern: {{kind: random, block_size: 1, random_blocks: 2}}}}", layers=2).layers
    layers["1"].load_state_dict(layers["0"].state_dict())
    hidden = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outs = []
    for number, layer in enumerate(layers.values()):
        i = torch.arange(11)
        seen = pattern_visible(pattern, i[:, None], i, layer=number)
        with torch.no_grad():
            outs.append(layer(hidden)[0] - hidden)
            torch.testing.assert_close(outs[-1], softmax_attention(layer.mixer, layer.mixer_norm(hidden), seen))
    assert not torch.allclose(*outs)


@pytest.mark.parametrize("kernel", ["chunkwise", "eager"])
@pytest.mark.parametrize("pattern", ["causal", "full"])
def test_alibi_lowers_the_scores_of_keys_that_are_far(pattern: str, kernel: str) -> None:
    """By slope · |i − j|: 1/4, 1/16, 1/64 and 1/256 are the paper's slopes for four heads."""
    mixer, x, out = run(f"{ATTENTION}, alibi: true, pattern: {{kind: {pattern}}}, kernel: {kernel}")
    slopes = torch.tensor([4.0, 16.0, 64.0, 256.0], dtype=torch.float64).reciprocal()
    seen = CAUSAL if pattern == "causal" else CAUSAL | True
    torch.testing.assert_close(out, softmax_attention(mixer, x, seen, bias=-slopes[:, None, None] * DISTANCE))


@pytest.mark.parametrize("turn", [True, False])
def test_queries_and_keys_are_normed_with_the_models_eps_before_they_are_turned(turn: bool) -> None:
    """In heads so narrow that some are shorter than eps."""
    options = f"{ATTENTION}, head_dim: 2" + (", rope_parameters: {rope_theta: 100.0}" if turn else "")
    by = turned(2, 100.0, False, torch.arange(11.0)) if turn else unchanged
    mixer, x, out = run(f"{options}, qk_norm: rms")
    norms = root_mean_square(mixer.q_norm.weight), root_mean_square(mixer.k_norm.weight)
    torch.testing.assert_close(out, softmax_attention(mixer, x, CAUSAL, normed=norms, turn=by))
    mixer, x, out = run(f"{options}, qk_norm: l2")
    assert not [name for name, _ in mixer.named_parameters() if "norm" in name]
    torch.testing.assert_close(out, softmax_attention(mixer, x, CAUSAL, normed=(length_one, length_one), turn=by))


@pytest.mark.parametrize("kind", ["attention", "linear_attention"])
@pytest.mark.parametrize(
    ("rope", "width", "theta", "interleaved"),
    [
        ("{}", 8, 10000.0, False),
        ("{rope_theta: 30.0}", 8, 30.0, False),
        ("{partial_rotary_factor: 0.5}", 4, 10000.0, False),
        ("{interleaved: true}", 8, 10000.0, True),
        ("{rope_theta: 30.0, partial_rotary_factor: 0.25, interleaved: true}", 2, 30.0, True),
    ],
)
def test_rotary_turns_pairs_of_queries_and_keys(
    kind: str, rope: str, width: int, theta: float, interleaved: bool
) -> None:
    """At the positions counted, and at those given."""
    formula = softmax_attention if kind == "attention" else kernel_attention
    given = torch.tensor([[3, 0, 1, 2, 17, 4, 5, 5, 60, 7, 8]])
    for inputs, positions in (({}, torch.arange(11)), ({"position_ids": given}, given[0])):
        mixer, x, out = run(f"kind: {kind}, num_attention_heads: 4, rope_parameters: {rope}", **inputs)
        turn = turned(width, theta, interleaved, positions.double())
        torch.testing.assert_close(out, formula(mixer, x, CAUSAL, turn=turn), rtol=1e-6, atol=1e-6)


ALL_KINDS = {
    "attention": ATTENTION,
    "linear_attention": "kind: linear_attention, num_attention_heads: 4",
    "linformer": "kind: linformer, num_attention_heads: 4, projected_length: 3",
}


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize(("bias", "places"), [(None, ""), ("none", ""), ("qkv", "qkv"), ("all", "qkvo")])
def test_biases_are_where_they_are_asked_for(kind: str, bias: str | None, places: str) -> None:
    mixer, x, out = run(ALL_KINDS[kind] + (f", attention_bias: {bias}" if bias else ""))
    assert [name for name in "qkvo" if getattr(mixer, f"{name}_proj").bias is not None] == list(places)
    formula = {"attention": softmax_attention, "linear_attention": kernel_attention, "linformer": projected_attention}
    torch.testing.assert_close(out, formula[kind](mixer, x, CAUSAL))


# --- linear attention and Linformer -----------------------------------------------------------------------------


FEATURES: Mapping[str, Turn] = {
    "elu": lambda x: F.elu(x) + 1,
    "relu": lambda x: x.clamp(min=0),
    "identity": unchanged,
}


def positive_features(projection: Tensor) -> Turn:
    """exp(w·x̂ − |x̂|²/2) / √R."""
    R, D = projection.shape
    return lambda x: torch.exp(x @ projection.mT / D**0.25 - x.square().sum(-1, keepdim=True) / D**0.5 / 2) / R**0.5


def kernel_attention(
    mixer: nn.Module,
    x: Tensor,
    seen: Tensor,
    *,
    feature_map: str = "elu",
    normalize: bool = True,
    eps: float = 1e-6,
    scale: float = 1.0,
    turn: Turn = unchanged,
    decay: Tensor | float = 1.0,
) -> Tensor:
    """scale · Σ φ(q)·φ(k) v / (Σ φ(q)·φ(k) + eps), or without the division; decay (heads, 1, 1) or (B, heads, T, 1)."""
    q, k, v = (heads(module, x, 4) for module in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    features = FEATURES[feature_map] if feature_map != "favor" else positive_features(mixer.random_features.projection)
    weights = (features(turn(q)) @ features(turn(k)).mT) * seen
    if isinstance(decay, Tensor):
        since = decay.log().expand(2, 4, x.shape[1], 1).cumsum(2)
        weights = weights * torch.exp(torch.where(seen, since - since.mT, 0))
    total = weights.sum(-1, keepdim=True) + eps if normalize else 1
    return merged(mixer.o_proj, scale * (weights @ v) / total)


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ("", {}),
        ("eps: 0.7", {"eps": 0.7}),
        ("scale: 2.5", {"scale": 2.5}),
        ("normalize: false", {"normalize": False}),
        ("normalize: false, scale: 0.3, eps: 0.7", {"normalize": False, "scale": 0.3}),
        ("feature_map: relu, eps: 0.1", {"feature_map": "relu", "eps": 0.1}),
        ("feature_map: identity, normalize: false", {"feature_map": "identity", "normalize": False}),
    ],
)
@pytest.mark.parametrize("causal", [None, True, False])
def test_linear_attention_is_its_formula(options: str, given: dict[str, Any], causal: bool | None) -> None:
    said = "" if causal is None else f", causal: {str(causal).lower()}"
    mixer, x, out = run(f"{ALL_KINDS['linear_attention']}{said}, {options}")
    seen = torch.ones_like(CAUSAL) if causal is False else CAUSAL
    torch.testing.assert_close(out, kernel_attention(mixer, x, seen, **given))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ("", (int(8 * math.log(8)), 8)),
        ("num_features: 5", (5, 8)),
        ("orthogonal: true, eps: 0.1", (16, 8)),
        ("orthogonal: false, num_features: 40", (40, 8)),
        ("head_dim: 6, v_head_dim: 10", (10, 6)),
        ("redraw_interval: 1", (16, 8)),
    ],
)
def test_a_performer_is_its_formula(options: str, shape: tuple[int, int], causal: bool) -> None:
    said = f"feature_map: favor, causal: {str(causal).lower()}"
    mixer, x, out = run(f"{ALL_KINDS['linear_attention']}, {said}, {options}")
    projection = mixer.random_features.projection
    assert tuple(projection.shape) == shape
    rows = projection[: shape[1]]
    apart = (rows @ rows.T - (rows @ rows.T).diagonal().diag()).abs().max() < 1e-5
    assert bool(apart) == ("orthogonal: false" not in options)
    seen = CAUSAL if causal else torch.ones_like(CAUSAL)
    eps = 0.1 if "eps" in options else 1e-6
    torch.testing.assert_close(out, kernel_attention(mixer, x, seen, feature_map="favor", eps=eps))


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ("", {}),
        ("feature_map: identity, normalize: false, scale: 0.5", {"feature_map": "identity", "normalize": False}),
        ("feature_map: favor, num_features: 12", {"feature_map": "favor"}),
    ],
)
def test_decays_are_those_of_the_formula(options: str, given: dict[str, Any]) -> None:
    given = {**given, "scale": 0.5} if "scale" in options else given
    mixer, x, out = run(f"{ALL_KINDS['linear_attention']}, decay: retention, {options}")
    gamma = 1 - 2.0 ** (-5 - torch.arange(4, dtype=torch.float64))
    torch.testing.assert_close(out, kernel_attention(mixer, x, CAUSAL, decay=gamma[:, None, None], **given))
    assert not [name for name, _ in mixer.named_parameters() if name.startswith("g")]
    mixer, x, out = run(f"{ALL_KINDS['linear_attention']}, decay: scalar, {options}")
    gates = linear(mixer.gk_proj, x).sigmoid() ** (1 / 16)
    torch.testing.assert_close(out, kernel_attention(mixer, x, CAUSAL, decay=gates.mT[..., None], **given))


@pytest.mark.parametrize(
    ("options", "widths"),
    [
        ("head_dim: 6", (24, 24, 24)),
        ("v_head_dim: 3", (32, 32, 12)),
        ("head_dim: 6, v_head_dim: 10", (24, 24, 40)),
    ],
)
def test_linear_attention_shapes_its_heads(options: str, widths: tuple[int, int, int]) -> None:
    mixer, x, out = run(f"{ALL_KINDS['linear_attention']}, {options}")
    assert projected(mixer) == widths
    torch.testing.assert_close(out, kernel_attention(mixer, x, CAUSAL))


def projected_attention(mixer: nn.Module, x: Tensor, seen: Tensor) -> Tensor:
    """softmax(q (E k)ᵀ / √D) F v; `seen` is not looked at, since every token sees every other."""
    q, k, v = (heads(module, x, 4) for module in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    along_keys = mixer.key_projection[..., : x.shape[1]]
    along_values = along_keys if mixer.value_projection is None else mixer.value_projection[..., : x.shape[1]]
    return merged(mixer.o_proj, (q @ (along_keys @ k).mT / q.shape[-1] ** 0.5).softmax(-1) @ (along_values @ v))


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ("", (3, 64)),
        ("share: heads", (3, 64)),
        ("share: none", (4, 3, 64)),
        ("share: kv", (3, 64)),
        ("head_dim: 6", (3, 64)),
    ],
)
def test_linformer_is_its_formula(options: str, shape: tuple[int, ...]) -> None:
    mixer, x, out = run(f"{ALL_KINDS['linformer']}, {options}")
    assert projected(mixer) == ((24,) * 3 if options == "head_dim: 6" else (32,) * 3)
    assert tuple(mixer.key_projection.shape) == shape
    assert (mixer.value_projection is None) == (options == "share: kv")
    torch.testing.assert_close(out, projected_attention(mixer, x, CAUSAL))


# --- Mamba and Mamba-2 ------------------------------------------------------------------------------------------


def convolved(module: nn.Module, x: Tensor) -> Tensor:
    """silu of the causal convolution, each channel by itself."""
    padded = F.pad(x.mT, (module.weight.shape[-1] - 1, 0))
    return F.silu(F.conv1d(padded, module.weight, module.bias, groups=x.shape[-1])).mT


def scan(decay: Tensor, write: Tensor, read: Tensor) -> Tensor:
    """h[t] = decay[t] · h[t−1] + write[t]; y[t] = h[t] · read[t] over the last axis."""
    state, out = torch.zeros_like(write[:, 0]), []
    for t in range(write.shape[1]):
        state = decay[:, t] * state + write[:, t]
        out.append((state * read[:, t]).sum(-1))
    return torch.stack(out, 1)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ("", (64, 2, 16, 4)),
        ("expand: 1, state_size: 3", (32, 2, 3, 4)),
        ("expand: 3, conv_kernel: 2, use_conv_bias: false", (96, 2, 16, 2)),
        ("conv_kernel: 1, use_bias: true, time_step_rank: 5", (64, 5, 16, 1)),
        ("dt_bc_norm: true, state_size: 4", (64, 2, 4, 4)),
    ],
)
def test_mamba_is_its_formula(options: str, sizes: tuple[int, int, int, int]) -> None:
    """Sizes are E, R, N, W: channels, the rank of the time steps, the width of the state and of the convolution."""
    mixer, x, out = run(f"kind: mamba, {options}")
    E, R, N, W = sizes
    assert mixer.conv1d.weight.shape == (E, 1, W)
    assert (mixer.in_proj.bias is not None, mixer.out_proj.bias is not None) == ("use_bias: true" in options,) * 2
    assert (mixer.conv1d.bias is None) == ("use_conv_bias: false" in options)
    u, z = linear(mixer.in_proj, x).split([E, E], -1)
    u = convolved(mixer.conv1d, u)
    dt, B, C = linear(mixer.x_proj, u).split([R, N, N], -1)
    if "dt_bc_norm" in options:
        norms = (mixer.dt_layernorm, mixer.b_layernorm, mixer.c_layernorm)
        dt, B, C = (root_mean_square(m.weight)(each) for m, each in zip(norms, (dt, B, C), strict=True))
    delta = F.softplus(dt @ mixer.dt_proj.weight.T + mixer.dt_proj.bias)[..., None]
    y = scan(torch.exp(-delta * mixer.A_log.double().exp()), delta * u[..., None] * B[:, :, None], C[:, :, None])
    torch.testing.assert_close(out, linear(mixer.out_proj, (y + mixer.D * u) * F.silu(z)))


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ("head_dim: 16", (64, 4, 1, 128, 4)),
        ("head_dim: 8, expand: 1, state_size: 3, num_heads: 4", (32, 4, 1, 3, 4)),
        ("head_dim: 16, expand: 3, n_groups: 3, state_size: 4, conv_kernel: 2", (96, 6, 3, 4, 2)),
        ("head_dim: 16, state_size: 4, use_bias: true, use_conv_bias: false", (64, 4, 1, 4, 4)),
        ("head_dim: 16, state_size: 4, time_step_limit: [0.4, 0.9]", (64, 4, 1, 4, 4)),
        ("head_dim: 16, state_size: 4, rms_norm: false, chunk_size: 3", (64, 4, 1, 4, 4)),
        ("head_dim: 16, state_size: 4, n_groups: 2, norm_before_gate: true, chunk_size: 3", (64, 4, 2, 4, 4)),
    ],
)
def test_mamba2_is_its_formula(options: str, sizes: tuple[int, int, int, int, int]) -> None:
    """Sizes are E, H, G, N, W: channels, heads, groups of B and C, the width of the state and of the convolution."""
    mixer, x, out = run(f"kind: mamba2, {options}")
    E, H, G, N, W = sizes
    assert mixer.conv1d.weight.shape == (E + 2 * G * N, 1, W)
    assert (mixer.in_proj.bias is not None, mixer.out_proj.bias is not None) == ("use_bias: true" in options,) * 2
    assert (mixer.conv1d.bias is None) == ("use_conv_bias: false" in options)
    z, xBC, dt = linear(mixer.in_proj, x).split([E, E + 2 * G * N, H], -1)
    u, B, C = convolved(mixer.conv1d, xBC).split([E, G * N, G * N], -1)
    u = u.unflatten(-1, (H, -1))
    B, C = (each.unflatten(-1, (G, 1, N)).repeat_interleave(H // G, 2) for each in (B, C))
    limits = (0.4, 0.9) if "limit" in options else (0.0, math.inf)
    delta = F.softplus(dt + mixer.dt_bias).clamp(*limits)[..., None, None]
    decay = torch.exp(-delta * mixer.A_log.double().exp()[:, None, None])
    y = (scan(decay, delta * u[..., None] * B, C) + mixer.D[:, None] * u).flatten(-2)

    def grouped_norm(each: Tensor) -> Tensor:
        return root_mean_square(mixer.norm.weight.unflatten(0, (G, -1)))(each.unflatten(-1, (G, -1))).flatten(-2)

    if "rms_norm: false" in options:
        y = y * F.silu(z)
    elif "norm_before_gate" in options:
        y = grouped_norm(y) * F.silu(z)
    else:
        y = grouped_norm(y * F.silu(z))
    torch.testing.assert_close(out, linear(mixer.out_proj, y))


def test_mamba2s_chunk_size_reaches_the_kernels() -> None:
    """No result shows it, only time and memory."""
    for option, size in {"": 256, "chunk_size: 3": 3}.items():
        site = compiled(with_option("{kind: mamba2, head_dim: 16}", option)).layers["0"].mixer.site
        assert Mamba2Options.model_validate_json(site.options).chunk_size == size


@pytest.mark.parametrize(("kind", "steps"), [("mamba", "dt_proj.bias"), ("mamba2, head_dim: 1", "dt_bias")])
def test_first_time_steps_lie_in_the_range_asked_for(kind: str, steps: str) -> None:
    ranges = {
        "": (0.001, 0.1),
        ", time_step_min: 0.3, time_step_max: 0.4": (0.3, 0.4),
        ", time_step_floor: 0.05": (0.05, 0.1),
        ", time_step_min: 2.0e-6, time_step_max: 3.0e-6": (1e-4, 1e-4),
    }
    for options, (low, high) in ranges.items():
        mixer = compiled(f"{{kind: {kind}{options}}}").layers["0"].mixer
        first = F.softplus(mixer.get_parameter(steps).double())
        assert low * 0.99 <= first.min() < low + (high - low) / 2 + low * 0.01, options
        assert high * 1.01 >= first.max() > low + (high - low) / 2 - high * 0.01, options


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_first_output_projections_shrink_with_the_number_of_layers_unless_told_otherwise(kind: str) -> None:
    """Uniform within 1/√E, over √layers; else normal as every matrix."""
    deviations = {"": (3 * 64 * 3) ** -0.5, "rescale_prenorm_residual: false": 0.02}
    for option, deviation in deviations.items():
        built = compiled(with_option(MIXERS[kind], option), MIXERS["window"], MIXERS["window"])
        assert abs(built.layers["0"].mixer.out_proj.weight.std().item() / deviation - 1) < 0.05


# --- what every site is told ------------------------------------------------------------------------------------


EVERY = {**MIXERS, **ENCODERS}


def test_every_mechanism_is_among_these() -> None:
    assert {mechanism(policy) for policy in EVERY.values()} == set(discover())


@pytest.mark.parametrize("kind", EVERY)
def test_what_a_failure_does_reaches_every_sites_record(kind: str) -> None:
    for extra, expected in {
        "": "next",
        "fallback: {on_failure: next}": "next",
        "fallback: {on_failure: raise}": "raise",
    }.items():
        assert compiled(EVERY[kind], extra=extra).layers["0"].mixer.site.chain.on_failure == expected


@pytest.mark.parametrize("kind", EVERY)
def test_deterministic_reaches_every_sites_options(kind: str) -> None:
    for extra, expected in {"": False, "deterministic: false": False, "deterministic: true": True}.items():
        site = compiled(EVERY[kind], extra=extra).layers["0"].mixer.site
        assert json.loads(site.options).get("deterministic", False) is expected


@pytest.mark.parametrize("kind", EVERY)
def test_the_kernels_asked_for_reach_every_sites_chain_and_run(kind: str) -> None:
    policy = EVERY[kind]
    auto = list(compiled(policy).layers["0"].mixer.site.chain.kernels)
    backwards = auto[::-1]
    assert len(auto) > 1
    for kernel, chain in {"eager": ["eager"], f"[{', '.join(backwards)}]": backwards, "auto": auto}.items():
        check_chain(compiled(with_option(policy, f"kernel: {kernel}"), dtype=torch.float32), chain)
    order = f"fallback: {{order: {{{mechanism(policy)}: [{', '.join(backwards)}]}}}}"
    check_chain(compiled(policy, extra=order, dtype=torch.float32), backwards)
    check_chain(compiled(with_option(policy, "kernel: eager"), extra=order, dtype=torch.float32), ["eager"])


def check_chain(built: CompiledModel, chain: list[str]) -> None:
    record = built.layers["0"].mixer.site.record
    assert list(record.chain.kernels) == chain
    built.layers["0"](torch.randn(1, 5, 32))[0].sum().backward()
    assert set(record.calls) == {(chain[0], "forward"), (chain[0], "backward")}
