"""A training step of a whole model against HF transformers' model of the same shape (the extra `hf`), or a hybrid's
against the same network written by hand (`bench.hybrid`).

    python -m attncompiler.bench.train_step                       # llama and mamba2
    python -m attncompiler.bench.train_step --models mamba        # minutes: HF's takes over a minute a step
    python -m attncompiler.bench.train_step --models mamba --seq-len 128
    python -m attncompiler.bench.train_step --models llama-1b --device cuda --dtype bfloat16 --compile --batch-size 1 \\
        --seq-len 8192 --curve 50
    python -m attncompiler.bench.train_step --models hybrid-1b --device cuda --dtype bfloat16 --compile \\
        --batch-size 1 --seq-len 16384 --curve 50

Four layers, 256 wide, 4 × 512 tokens, fp32, or a Llama or a hybrid of a billion parameters; loss, gradients, and a step
of AdamW on both sides. Weights are each side's own first ones, a hybrid's the same; the shapes of all parameters are
checked to be equal in number. With `--curve` both sides of a Llama too begin with the same weights, and first take so
many steps on one batch: how far their losses lie apart at most is a column of the table. Another is, for a Llama of 16
bits, how far either lies from the same training in fp32, which is what both stand for.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import attncompiler
from attncompiler.bench import hybrid
from attncompiler.bench.measure import Work, compare
from attncompiler.bench.report import Format, FormatOption, ThreadsOption, comparison_row, show
from attncompiler.errors import UsageError, fail
from attncompiler.spec import parse


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes."""

    vocabulary: int = 256
    width: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 32
    intermediate: int = 704

    @property
    def gated(self) -> str:
        return f"{{kind: gated, intermediate_size: {self.intermediate}, hidden_act: silu}}"

    @property
    def attention(self) -> str:
        return (
            f"{{kind: attention, num_attention_heads: {self.heads}, num_key_value_heads: {self.kv_heads}, "
            f"head_dim: {self.head_dim}, pattern: {{kind: causal}}, "
            "rope_parameters: {rope_type: default, rope_theta: 10000.0}}"
        )


SMALL = Shape()
BILLION = Shape(32000, 2048, 18, 16, 4, 128, 8192)

SPEC = """
spec_version: 1
name: bench
model:
  vocab_size: {vocabulary}
  hidden_size: {width}
  norm: {{kind: rmsnorm, eps: 1e-5}}
  mlp: {mlp}
  head: {{kind: lm, tie_word_embeddings: true}}
policies:
  mixer: {mixer}
layers:
  - {{repeat: {layers}, policy: mixer}}
targets: [cpu]
"""

MIXERS = {
    "llama": (SMALL, SMALL.attention, SMALL.gated),
    "llama-1b": (BILLION, BILLION.attention, BILLION.gated),
    "mamba2": (
        SMALL,
        "{kind: mamba2, state_size: 64, head_dim: 32, expand: 2, n_groups: 1, chunk_size: 64}",
        "{kind: none}",
    ),
    "mamba": (SMALL, "{kind: mamba, state_size: 16, expand: 2}", "{kind: none}"),
}

HYBRIDS = {"hybrid": hybrid.Hybrid(), "hybrid-1b": hybrid.BILLION}
MODELS = (*MIXERS, *HYBRIDS)


class DType(StrEnum):
    """Of parameters and activations."""

    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclass(frozen=True)
class Setting:
    """How both sides run."""

    batch_size: int = 4
    seq_len: int = 512
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    compile: bool = False
    """by torch.compile, forward and loss as one function"""
    curve: int = 0
    """steps from the same weights on one batch"""


DEFAULT = Setting()


def main(
    models: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(MODELS)}; several times")] = None,
    batch_size: Annotated[int, typer.Option(help="B")] = 4,
    seq_len: Annotated[int, typer.Option(help="T: less than 512 scales a comparison down")] = 512,
    repeats: Annotated[int | None, typer.Option(help="timed turns of each side (default 15; of mamba 1)")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[DType, typer.Option(help="of parameters and activations")] = DType.float32,
    compile: Annotated[bool, typer.Option("--compile", help="both sides by torch.compile")] = False,
    curve: Annotated[
        int, typer.Option(min=0, help="steps of a Llama or a hybrid from the same weights, whose losses are compared")
    ] = 0,
    threads: ThreadsOption = None,
    format: FormatOption = Format.text,
) -> None:
    """Compare training steps with HF transformers', or with a network that is written by hand."""
    if threads is not None:
        torch.set_num_threads(threads)
    chosen = models or ["llama", "mamba2"]
    unknown = [name for name in chosen if name not in MODELS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(MODELS)}")
    if curve and not all(name.startswith(("llama", "hybrid")) for name in chosen):
        raise typer.BadParameter("--curve compares Llamas and hybrids: name them with --models")
    # a hybrid's peer has a part of it on a CPU
    transformers = None if device == "cuda" and HYBRIDS.keys() >= set(chosen) else import_transformers()
    setting = Setting(batch_size, seq_len, device, getattr(torch, dtype.value), compile, curve)
    rows = [row(name, transformers, setting, repeats) for name in chosen]
    where = torch.cuda.get_device_name() if device == "cuda" else device
    show(f"Training step, {batch_size} × {seq_len} tokens, {dtype.value} on {where}", rows, format)


def import_transformers() -> Any:
    """The transformers package. Raises UsageError (E602) where it is not installed."""
    if importlib.util.find_spec("transformers") is None:
        message = "this benchmark compares with transformers, which is not installed"
        raise fail(UsageError, "E602", message, remedy="pip install 'attncompiler[hf]'")
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers


def row(name: str, transformers: Any, setting: Setting, repeats: int | None) -> dict[str, Any]:
    """The table's row of one model. A slow peer is timed once and not warmed up: what it does first costs it little."""
    slow = name == "mamba"
    ours, peer = our_model(name, setting), peer_model(name, transformers, setting)
    size = (setting.batch_size, setting.seq_len + 1)
    vocabulary = (HYBRIDS[name] if name in HYBRIDS else MIXERS[name][0]).vocabulary
    tokens = torch.randint(vocabulary, size, generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(setting.device)
    input_ids, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def our_loss() -> Tensor:
        return ours.loss(input_ids, labels)

    def peer_loss() -> Tensor:
        if name in HYBRIDS:
            return peer.loss(input_ids, labels)
        return peer(input_ids=input_ids, labels=labels, shift_labels=labels).loss

    losses = (our_loss, peer_loss)
    if setting.compile:
        losses = (torch.compile(our_loss), torch.compile(peer_loss))
    if name in HYBRIDS:
        peer.take(ours)
    elif setting.curve:
        take_weights(ours, peer)
    exact = None
    if setting.curve and setting.dtype != torch.float32 and name not in HYBRIDS:
        exact = curve_in_fp32(name, transformers, setting, peer.state_dict(), input_ids, labels)
    our_step, peer_step = training_step(ours, losses[0]), training_step(peer, losses[1])
    more: dict[str, Any] = {}
    if setting.curve:
        curves = [losses_of(step, setting.curve) for step in (our_step, peer_step)]
        more["loss, first and last"] = f"{curves[0][0]:.4f} → {curves[0][-1]:.4f}"
        more["apart at most"] = apart(curves[0], curves[1])
        if exact is not None:
            more["ours, the peer from fp32"] = f"{apart(curves[0], exact)}, {apart(curves[1], exact)}"
    if slow:
        our_step()
    comparison = compare(
        settled(our_step, setting), settled(peer_step, setting), repeats or (1 if slow else 15), warmup=0 if slow else 2
    )
    counts = (count(ours), count(peer))
    against = peer.name if name in HYBRIDS else f"HF transformers {transformers.__version__}"
    parameters = counts[0] if counts[0] == counts[1] else counts
    return comparison_row(name, comparison, parameters=parameters, **more, against=against)


def losses_of(step: Callable[[], Tensor], count: int) -> Tensor:
    """The losses before each of so many steps."""
    return torch.stack([step() for _ in range(count)]).double().cpu()


def curve_in_fp32(
    name: str, transformers: Any, setting: Setting, weights: dict[str, Tensor], input_ids: Tensor, labels: Tensor
) -> Tensor:
    """The losses of transformers' model in fp32 from the same weights: products in TF32 where the device has it, and
    layers run again for their gradients, since of a billion parameters a device holds no more in fp32. Key heads are
    repeated: of grouped ones torch has no kernel in fp32 but one that writes all pairs."""
    model = peer_model(name, transformers, replace(setting, dtype=torch.float32))
    model.load_state_dict(weights)
    transformers.AttentionInterface.register("repeated", repeated_attention)
    model.set_attn_implementation("repeated")
    newer = getattr(model, "activation_checkpointing_enable", None)  # transformers 5.24 warns of the other
    (newer or model.gradient_checkpointing_enable)()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        step = training_step(model, lambda: model(input_ids=input_ids, labels=labels, shift_labels=labels).loss)
        return losses_of(step, setting.curve)
    finally:
        torch.set_float32_matmul_precision(before)


def repeated_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Causal attention for transformers: query (B, H, T, D), key and value (B, K, T, D) → (B, T, H, D), no weights."""
    key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], 1) for each in (key, value))
    out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def apart(ours: Tensor, theirs: Tensor) -> str:
    """How far two curves of losses lie apart where they do most, and where that is."""
    differences = (ours - theirs).abs()
    step = int(differences.argmax())
    return f"{float(differences[step]):.2g} at step {step} ({float(theirs[step]):.3g})"


def settled(step: Callable[[], Tensor], setting: Setting) -> Work:
    """The step until the device has done it."""

    def work() -> None:
        step()
        if setting.device == "cuda":
            torch.cuda.synchronize()

    return work


def our_model(name: str, setting: Setting = DEFAULT) -> Any:
    """This package's model, from a spec."""
    if name in HYBRIDS:
        text = HYBRIDS[name].spec
    else:
        shape, mixer, mlp = MIXERS[name]
        text = SPEC.format(vocabulary=shape.vocabulary, width=shape.width, layers=shape.layers, mixer=mixer, mlp=mlp)
    spec = parse(text, filename=f"bench/{name}")
    return attncompiler.build(spec, device=setting.device, dtype=setting.dtype).train()


def peer_model(name: str, transformers: Any, setting: Setting = DEFAULT) -> Any:
    """The model of transformers that has the same shape, or a hybrid that is on meta until it takes weights."""
    if name in HYBRIDS:
        return hybrid.Peer(HYBRIDS[name], setting.seq_len, setting.device, setting.dtype).train()
    shape = MIXERS[name][0]
    common = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "tie_word_embeddings": True,
        "use_cache": False,
    }
    if name.startswith("llama"):
        config = transformers.LlamaConfig(
            **common,
            intermediate_size=shape.intermediate,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            max_position_embeddings=max(2048, setting.seq_len),
            rms_norm_eps=1e-5,
            attn_implementation="sdpa",
        )
        made = transformers.LlamaForCausalLM(config)
    elif name == "mamba2":
        config = transformers.Mamba2Config(
            **common, state_size=64, head_dim=32, num_heads=16, expand=2, n_groups=1, chunk_size=64
        )
        made = transformers.Mamba2ForCausalLM(config)
    else:
        made = transformers.MambaForCausalLM(transformers.MambaConfig(**common, state_size=16, expand=2))
    return made.to(setting.device, setting.dtype).train()


def take_weights(ours: Any, theirs: Any) -> None:
    """HF's Llama weights in our model of its shape."""
    names = {"self_attn": "mixer", "input_layernorm": "mixer_norm", "post_attention_layernorm": "mlp_norm"}
    weights = {}
    for name, tensor in theirs.state_dict().items():
        parts = name.removeprefix("model.").split(".")
        weights[".".join(names.get(part, part) for part in parts)] = tensor
    ours.load_state_dict(weights)


def training_step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Loss, gradients, AdamW; the loss before the step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> Tensor:
        found = loss()
        found.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return found.detach()

    return step


def count(model: nn.Module) -> int:
    """Trainable parameters, ties once."""
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    try:
        typer.run(main)
    except attncompiler.AttnCompilerError as error:
        sys.exit(str(error))
