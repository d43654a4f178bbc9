"""Hybrids of Mamba-2, sliding windows and full attention: as a spec, and by hand in PyTorch on the libraries' kernels.

The second is the peer of `bench.train_step`. Its parameters have the names, shapes and dtypes of our model's.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from attncompiler.errors import UsageError, fail

EPS, THETA, TAPS = 1e-5, 10000.0, 4
CHUNK = 256
"""mamba-ssm's default"""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q (B, H, T, D), k, v (B, K, T, D) → (B, H, T, D)"""

SPEC = """
spec_version: 1
name: hybrid
model:
  vocab_size: {vocabulary}
  hidden_size: {width}
  norm: {{kind: rmsnorm, eps: {EPS}}}
  mlp: {{kind: gated, intermediate_size: {intermediate}, hidden_act: silu}}
  head: {{kind: lm, tie_word_embeddings: true}}
policies:
  mamba2: {{kind: mamba2, state_size: {state}, head_dim: {ssm_head_dim}, expand: 2, chunk_size: {CHUNK}}}
  local: {{{attention}, rope_parameters: {{rope_type: default, rope_theta: {THETA}}},
    pattern: {{kind: sliding_window, window: {window}}}}}
  full: {{{attention}, pattern: {{kind: causal}}}}
layers:
{layers}
targets: [cpu]
"""


@dataclass(frozen=True)
class Hybrid:
    """Its sizes, and the policies of its layers. Full attention has no rotary, as in specs/hybrid_tiny.yaml."""

    vocabulary: int = 256
    width: int = 256
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 32
    intermediate: int = 704
    state: int = 64
    ssm_head_dim: int = 32
    window: int = 128
    layers: tuple[str, ...] = ("mamba2", "local", "mamba2", "full")

    @property
    def spec(self) -> str:
        attention = (
            f"kind: attention, num_attention_heads: {self.heads}, num_key_value_heads: {self.kv_heads}, "
            f"head_dim: {self.head_dim}"
        )
        layers = "\n".join(f"  - {{policy: {policy}}}" for policy in self.layers)
        given = {**vars(self), "attention": attention, "layers": layers}
        return SPEC.format(**given, EPS=EPS, THETA=THETA, CHUNK=CHUNK)


BILLION = Hybrid(
    32000, 2048, 16, 4, 128, 4096, 128, 64, 2048, ("mamba2", "local", "mamba2", "local", "mamba2", "full") * 4
)


# --- the libraries' kernels -------------------------------------------------------------------------------------------


@torch.library.custom_op("attncompiler_bench::mamba_ssm", mutates_args=())
def mamba_ssm(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    """What mamba-ssm's `mamba_chunk_scan_combined` runs, as an operator: torch.compile breaks no graph around it."""
    return _ssd("_mamba_chunk_scan_combined_fwd")(x, dt, A, B, C, CHUNK, D=D, dt_bias=dt_bias, dt_softplus=True)[0]


@torch.library.custom_op("attncompiler_bench::mamba_ssm_backward", mutates_args=())
def mamba_ssm_backward(
    grad: Tensor, out: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same of its backward: the gradients of all inputs."""
    run = _ssd("_mamba_chunk_scan_combined_bwd")
    dx, ddt, dA, dB, dC, dD, _, ddt_bias, _ = run(
        grad, x, dt, A, B, C, out, CHUNK, D=D, dt_bias=dt_bias, dt_softplus=True
    )
    given = (x, dt, A, B, C, D, dt_bias)
    found = (dx, ddt, dA, dB, dC, dD, ddt_bias)
    dx, ddt, dA, dB, dC, dD, ddt_bias = (
        made.to(tensor.dtype).contiguous() for made, tensor in zip(found, given, strict=True)
    )
    return dx, ddt, dA, dB, dC, dD, ddt_bias


def _ssd(name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module("mamba_ssm.ops.triton.ssd_combined"), name)


mamba_ssm.register_fake(lambda x, *rest: x.new_empty(x.shape))
mamba_ssm_backward.register_fake(lambda grad, out, *given: tuple(tensor.new_empty(tensor.shape) for tensor in given))
mamba_ssm.register_autograd(
    lambda ctx, grad: mamba_ssm_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output, *inputs),
)


@dataclass(frozen=True)
class Kernels:
    """What the peer's Mamba-2 mixers run on."""

    scan: Callable[..., Tensor]
    """x (B, T, H, P), dt (B, T, H), A (H,), B, C (B, T, G, N), D, dt_bias (H,) → (B, T, H, P)"""
    convolution: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    """x (B, T, E), weight (E, W), bias (E,) → (B, T, E), with silu"""
    name: str


def kernels(device: str) -> Kernels:
    """mamba-ssm's and causal-conv1d's on a GPU; elsewhere the scan of transformers in torch, at sizes of tests.

    Raises UsageError (E602) on a GPU without mamba-ssm: nothing slower may stand for it.
    """
    if device != "cuda":
        module = importlib.import_module("transformers.models.mamba2.modeling_mamba2")
        torch_scan = inspect.unwrap(module.mamba2_chunk_scan)  # below what runs mamba-ssm where it is installed

        def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
            out: Tensor = torch_scan(x, dt, A, B, C, min(CHUNK, x.shape[1]), D=D, dt_bias=dt_bias, dt_softplus=True)
            return out.to(x.dtype)

        return Kernels(scan, _torch_convolution, "PyTorch alone")
    if importlib.util.find_spec("mamba_ssm") is None:
        message = "the hybrid's peer runs on mamba-ssm, which is not installed"
        raise fail(UsageError, "E602", message, remedy="pip install mamba-ssm --no-build-isolation")
    if importlib.util.find_spec("causal_conv1d") is None:
        return Kernels(mamba_ssm, _torch_convolution, "PyTorch, mamba-ssm, torch's conv1d")
    causal_conv1d = importlib.import_module("causal_conv1d").causal_conv1d_fn

    def convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = causal_conv1d(x.mT, weight, bias, activation="silu")
        return out.mT

    return Kernels(mamba_ssm, convolution, "PyTorch, mamba-ssm, causal-conv1d")


def _torch_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    channels, width = weight.shape
    sums = F.conv1d(x.mT, weight[:, None], bias, padding=width - 1, groups=channels)[..., : x.shape[1]]
    return F.silu(sums).mT.contiguous()  # mamba-ssm would copy B and C


def windowed(window: int, tokens: int, device: str) -> Attend:
    """Attention of q (B, H, T, D) to the `window` keys up to each query's own: FlexAttention on a GPU, elsewhere, where
    that has no backward, SDPA with a mask of all pairs."""

    def seen(batch: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < window)

    if device == "cuda":
        flex = importlib.import_module("torch.nn.attention.flex_attention")
        blocks = flex.create_block_mask(seen, None, None, tokens, tokens, device)
        run = torch.compile(flex.flex_attention)

        def by_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = run(q, k, v, block_mask=blocks, enable_gqa=True)
            return out

        return by_blocks
    position = torch.arange(tokens, device=device)
    mask = seen(0, 0, position[:, None], position)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def _full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention: FlashAttention-2, torch's own, on a GPU."""
    if q.device.type != "cuda":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # torch itself would take cuDNN's where it is
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


# --- the peer ---------------------------------------------------------------------------------------------------------


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class Mamba2(nn.Module):
    """The mixer of Dao & Gu 2024, figure 6."""

    def __init__(self, sizes: Hybrid, run: Kernels):
        super().__init__()
        E, N = 2 * sizes.width, sizes.state
        H, mixed = E // sizes.ssm_head_dim, E + 2 * N
        self.run, self.widths, self.parts = run, (E, mixed, H), (E, N, N)
        self.in_proj = _linear(sizes.width, E + mixed + H)
        self.conv1d = nn.Conv1d(mixed, mixed, TAPS, groups=mixed)
        self.A_log, self.D, self.dt_bias = (nn.Parameter(torch.empty(H)) for _ in range(3))
        self.norm = nn.RMSNorm(E, EPS)
        self.out_proj = _linear(E, sizes.width)

    def forward(self, hidden: Tensor) -> Tensor:
        z, mixed, dt = self.in_proj(hidden).split(self.widths, -1)
        mixed = self.run.convolution(mixed, self.conv1d.weight[:, 0], self.conv1d.bias)
        x, B, C = mixed.split(self.parts, -1)
        x, A = x.unflatten(-1, (self.widths[2], -1)), -self.A_log.float().exp()
        out = self.run.scan(x, dt, A, B[:, :, None], C[:, :, None], self.D, self.dt_bias)
        gated = out.flatten(-2).float() * F.silu(z.float())
        return self.out_proj(F.rms_norm(gated, gated.shape[-1:], self.norm.weight.float(), EPS).to(hidden.dtype))


class Attention(nn.Module):
    """Grouped-query attention, with rotary in windows."""

    def __init__(self, sizes: Hybrid, attend: Attend, rotary: tuple[Tensor, Tensor] | None):
        super().__init__()
        self.attend, self.rotary, self.head_dim = attend, rotary, sizes.head_dim
        self.q_proj = _linear(sizes.width, sizes.heads * sizes.head_dim)
        self.k_proj = _linear(sizes.width, sizes.kv_heads * sizes.head_dim)
        self.v_proj = _linear(sizes.width, sizes.kv_heads * sizes.head_dim)
        self.o_proj = _linear(sizes.heads * sizes.head_dim, sizes.width)

    def forward(self, hidden: Tensor) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (each(hidden).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for each in projections)
        if self.rotary is not None:
            q, k = (_turned(each, *self.rotary) for each in (q, k))
        return self.o_proj(self.attend(q, k, v).transpose(1, 2).flatten(-2))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, sizes: Hybrid):
        super().__init__()
        self.gate_proj, self.up_proj = (_linear(sizes.width, sizes.intermediate) for _ in range(2))
        self.down_proj = _linear(sizes.intermediate, sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """x + mixer(norm(x)), then the same with the MLP."""

    def __init__(self, sizes: Hybrid, mixer: nn.Module):
        super().__init__()
        self.mixer_norm, self.mlp_norm = (nn.RMSNorm(sizes.width, EPS) for _ in range(2))
        self.mixer, self.mlp = mixer, MLP(sizes)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Peer(nn.Module):
    """The model, on meta until it takes our weights. `name` says what it runs on."""

    def __init__(self, sizes: Hybrid, tokens: int, device: str, dtype: torch.dtype):
        super().__init__()
        run = kernels(device)
        self.name = run.name
        rates = THETA ** -(torch.arange(0, sizes.head_dim, 2, device=device) / sizes.head_dim)
        angles = (torch.arange(tokens, device=device)[:, None] * rates).repeat(1, 2)
        rotary = (angles.cos().to(dtype), angles.sin().to(dtype))
        local = windowed(sizes.window, tokens, device)
        make: dict[str, Callable[[], nn.Module]] = {
            "mamba2": lambda: Mamba2(sizes, run),
            "local": lambda: Attention(sizes, local, rotary),
            "full": lambda: Attention(sizes, _full, None),
        }
        with torch.device("meta"):
            self.embed_tokens = nn.Embedding(sizes.vocabulary, sizes.width)
            self.layers = nn.ModuleList(Layer(sizes, make[policy]()) for policy in sizes.layers)
            self.norm = nn.RMSNorm(sizes.width, EPS)

    def take(self, ours: nn.Module) -> None:
        """Copies of the weights of our model, whose head is its embedding."""
        weights = {name: tensor.clone() for name, tensor in ours.state_dict().items() if name != "lm_head.weight"}
        self.load_state_dict(weights, assign=True)

    def loss(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        logits = F.linear(self.norm(hidden), self.embed_tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
