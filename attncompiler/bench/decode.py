"""Decoding: against HF transformers' Llama (the extra `hf`), and far into a sequence against near its start.

    python -m attncompiler.bench.decode                   # both
    python -m attncompiler.bench.decode --only positions  # without transformers

The Llama-like model of `bench.train_step` with the same weights on both sides, greedy, with a cache; the tokens of both
sides are checked to be the same. The hybrid has every mixer whose state does not grow: a window with global tokens,
linear attention, Mamba-2 and Mamba.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import attncompiler
from attncompiler.bench.measure import Work, compare, interleave
from attncompiler.bench.report import Format, FormatOption, ThreadsOption, comparison_row, show
from attncompiler.bench.train_step import SMALL, import_transformers, our_model, peer_model, take_weights
from attncompiler.spec import parse

HYBRID = """
spec_version: 1
name: bench-hybrid
model:
  vocab_size: 256
  hidden_size: 256
  mlp: {kind: gated, intermediate_size: 384, hidden_act: silu}
  head: {kind: lm, tie_word_embeddings: true}
policies:
  window:
    kind: attention
    num_attention_heads: 8
    num_key_value_heads: 2
    rope_parameters: {rope_type: default}
    pattern: {kind: sliding_window, window: 256, global_tokens: 4}
  linear: {kind: linear_attention, num_attention_heads: 8}
  mamba2: {kind: mamba2, state_size: 64, head_dim: 32, expand: 2}
  mamba: {kind: mamba, state_size: 16, expand: 2}
layers: [{policy: window}, {policy: linear}, {policy: mamba2}, {policy: mamba}]
targets: [cpu]
"""
PIECE = 512
"""tokens of a prompt at once"""


class Only(StrEnum):
    """What is measured where not both are."""

    peer = "peer"
    positions = "positions"


def main(
    only: Annotated[Only | None, typer.Option(help="peer: against HF; positions: far against near")] = None,
    prompt: Annotated[int, typer.Option(help="tokens before the first new one, against HF")] = 64,
    new_tokens: Annotated[int, typer.Option(help="tokens of a timed turn")] = 128,
    batch_size: Annotated[int, typer.Option(help="B, against HF")] = 1,
    positions: Annotated[list[int] | None, typer.Option("--position", help="several (default 300 and 30000)")] = None,
    repeats: Annotated[int, typer.Option(help="timed turns of each side")] = 9,
    compiled: Annotated[bool, typer.Option("--compiled", help="our steps through torch.compile")] = False,
    threads: ThreadsOption = None,
    format: FormatOption = Format.text,
) -> None:
    """Compare tokens a second: ours and HF's, and the hybrid's at each position."""
    if threads is not None:
        torch.set_num_threads(threads)
    rows = []
    if only is not Only.positions:
        rows = [against_peer(prompt, new_tokens, batch_size, repeats, compiled)]
        show(f"generate, {batch_size} × {new_tokens} tokens after {prompt}, against HF", rows, format)
    if only is not Only.peer:
        rows = list(by_position(tuple(positions or (300, 30000)), new_tokens, repeats, compiled))
        show(f"A hybrid's steps, {new_tokens} tokens, by position", rows, format)


def against_peer(prompt: int, new_tokens: int, batch_size: int, repeats: int, compiled: bool) -> dict[str, Any]:
    """The table's row of `generate` against HF's. Raises RuntimeError when the two say different tokens."""
    ours, theirs = our_model("llama"), peer_model("llama", import_transformers()).eval()
    take_weights(ours, theirs)
    input_ids = _tokens(batch_size, prompt)

    def our_side() -> Tensor:
        return attncompiler.generate(ours, input_ids, max_new_tokens=new_tokens, compiled=compiled)

    def their_side() -> Tensor:
        count = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
        return theirs.generate(input_ids, **count, do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=None)

    if not torch.equal(our_side(), their_side()):
        raise RuntimeError("the two sides say different tokens")
    comparison = compare(our_side, their_side, repeats, warmup=1)
    total = batch_size * new_tokens
    return comparison_row(
        "llama",
        comparison,
        **{"ours, tokens/s": total / comparison.ours.median, "peer, tokens/s": total / comparison.peer.median},
    )


@torch.no_grad()
def by_position(positions: tuple[int, ...], new_tokens: int, repeats: int, compiled: bool) -> Iterator[dict[str, Any]]:
    """A row for each position: the time of a token there, and the speed as a share of that at the first position."""
    model = attncompiler.build(parse(HYBRID, filename="bench/hybrid"), device="cpu").eval()
    room = max(positions) + (repeats + 2) * new_tokens
    sides = {str(position): steps(model, position, room, new_tokens, compiled) for position in positions}
    samples = interleave(sides, repeats)
    first = samples[str(positions[0])].median
    for position in positions:
        taken = samples[str(position)]
        yield {
            "position": position,
            "a token, ms": taken.scaled(1e3 / new_tokens),
            "tokens/s": new_tokens / taken.median,
            f"of that at {positions[0]:,}": first / taken.median,
        }


def steps(model: Any, position: int, room: int, count: int, compiled: bool) -> Work:
    """Work that goes on by so many greedy tokens; the first of them is at `position`."""
    state = model.init_state(1, room)
    for piece in _tokens(1, position).split(PIECE, 1):
        logits, state = model.step(piece, state)
    held = {"state": state, "token": logits[:, -1:].argmax(-1)}
    step = model.compiled_step if compiled else model.step

    @torch.no_grad()
    def work() -> None:
        for _ in range(count):
            logits, held["state"] = step(held["token"], held["state"])
            held["token"] = logits[:, -1:].argmax(-1)

    return work


def _tokens(batch_size: int, length: int) -> Tensor:
    return torch.randint(SMALL.vocabulary, (batch_size, length), generator=torch.Generator().manual_seed(0))


if __name__ == "__main__":
    try:
        typer.run(main)
    except attncompiler.AttnCompilerError as error:
        sys.exit(str(error))
