"""A training step of a whole model against HF transformers' model of the same shape (the extra `hf`).

    python -m attncompiler.bench.train_step                       # llama and mamba2
    python -m attncompiler.bench.train_step --models mamba        # minutes: HF's takes over a minute a step
    python -m attncompiler.bench.train_step --models mamba --seq-len 128

Four layers, 256 wide, 4 × 512 tokens, fp32: loss, gradients, and a step of AdamW on both sides. Weights are each side's
own first ones; the shapes of all parameters are checked to be equal in number.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import attncompiler
from attncompiler.bench.measure import Work, compare
from attncompiler.bench.report import Format, FormatOption, ThreadsOption, comparison_row, show
from attncompiler.errors import UsageError, fail
from attncompiler.spec import parse

VOCABULARY, WIDTH, LAYERS = 256, 256, 4

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

GATED = "{kind: gated, intermediate_size: 704, hidden_act: silu}"
MIXERS = {
    "llama": (
        "{kind: attention, num_attention_heads: 8, head_dim: 32, pattern: {kind: causal}, "
        "rope_parameters: {rope_type: default, rope_theta: 10000.0}}",
        GATED,
    ),
    "mamba2": ("{kind: mamba2, state_size: 64, head_dim: 32, expand: 2, n_groups: 1, chunk_size: 64}", "{kind: none}"),
    "mamba": ("{kind: mamba, state_size: 16, expand: 2}", "{kind: none}"),
}


def main(
    models: Annotated[list[str] | None, typer.Option(help="llama, mamba2 or mamba; several times")] = None,
    batch_size: Annotated[int, typer.Option(help="B")] = 4,
    seq_len: Annotated[int, typer.Option(help="T: less than 512 scales a comparison down")] = 512,
    repeats: Annotated[int | None, typer.Option(help="timed turns of each side (default 15; of mamba 1)")] = None,
    threads: ThreadsOption = None,
    format: FormatOption = Format.text,
) -> None:
    """Compare training steps with HF transformers'."""
    if threads is not None:
        torch.set_num_threads(threads)
    transformers = import_transformers()
    chosen = models or ["llama", "mamba2"]
    unknown = [name for name in chosen if name not in MIXERS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(MIXERS)}")
    rows = [row(name, transformers, batch_size, seq_len, repeats) for name in chosen]
    show(
        f"Training step, {batch_size} × {seq_len} tokens, against HF transformers {transformers.__version__}",
        rows,
        format,
    )


def import_transformers() -> Any:
    """The transformers package. Raises UsageError (E602) where it is not installed."""
    if importlib.util.find_spec("transformers") is None:
        message = "this benchmark compares with transformers, which is not installed"
        raise fail(UsageError, "E602", message, remedy="pip install 'attncompiler[hf]'")
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers


def row(name: str, transformers: Any, batch_size: int, seq_len: int, repeats: int | None) -> dict[str, Any]:
    """The table's row of one model. A slow peer is timed once and not warmed up: what it does first costs it little."""
    slow = name == "mamba"
    ours, peer = our_model(name), peer_model(name, transformers)
    tokens = torch.randint(VOCABULARY, (batch_size, seq_len + 1), generator=torch.Generator().manual_seed(0))
    input_ids, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    our_step = training_step(ours, lambda: ours.loss(input_ids, labels))
    peer_step = training_step(peer, lambda: peer(input_ids=input_ids, labels=labels, shift_labels=labels).loss)
    if slow:
        our_step()
    comparison = compare(our_step, peer_step, repeats or (1 if slow else 15), warmup=0 if slow else 2)
    counts = (count(ours), count(peer))
    return comparison_row(name, comparison, parameters=counts[0] if counts[0] == counts[1] else counts)


def our_model(name: str) -> Any:
    """This package's model, from a spec."""
    mixer, mlp = MIXERS[name]
    text = SPEC.format(vocabulary=VOCABULARY, width=WIDTH, layers=LAYERS, mixer=mixer, mlp=mlp)
    return attncompiler.build(parse(text, filename=f"bench/{name}"), device="cpu").train()


def peer_model(name: str, transformers: Any) -> Any:
    """The model of transformers that has the same shape."""
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "tie_word_embeddings": True,
        "use_cache": False,
    }
    if name == "llama":
        config = transformers.LlamaConfig(
            **common,
            intermediate_size=704,
            num_attention_heads=8,
            head_dim=32,
            rms_norm_eps=1e-5,
            attn_implementation="sdpa",
        )
        return transformers.LlamaForCausalLM(config).train()
    if name == "mamba2":
        config = transformers.Mamba2Config(
            **common, state_size=64, head_dim=32, num_heads=16, expand=2, n_groups=1, chunk_size=64
        )
        return transformers.Mamba2ForCausalLM(config).train()
    return transformers.MambaForCausalLM(transformers.MambaConfig(**common, state_size=16, expand=2)).train()


def training_step(model: nn.Module, loss: Callable[[], Tensor]) -> Work:
    """Loss, gradients, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def count(model: nn.Module) -> int:
    """Trainable parameters, ties once."""
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    try:
        typer.run(main)
    except attncompiler.AttnCompilerError as error:
        sys.exit(str(error))
