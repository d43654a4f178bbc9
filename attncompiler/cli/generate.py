"""`attncompiler generate`: a model in a folder continues a prompt."""

from __future__ import annotations

import re
import sys
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attncompiler.cli import output
from attncompiler.cli.options import AsFormat, Format

if TYPE_CHECKING:
    from attncompiler.spec.model import ModelSpec

BYTES = 256
"""tokens of a model that reads text as bytes, at least"""


def _device(value: str | None) -> str | None:
    if value is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", value):
        raise typer.BadParameter(f"{value!r} is not cpu, cuda or cuda:N")
    return value


def generate(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="the folder of a built model", show_default=False)],
    prompt: Annotated[str | None, typer.Option(help="text, read as its UTF-8 bytes; else --tokens or stdin")] = None,
    tokens: Annotated[str | None, typer.Option(metavar='"1 2 3"', help="token ids in the place of text")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="tokens to add at most")] = 128,
    temperature: Annotated[float | None, typer.Option(help="draw from softmax(logits / temperature)")] = None,
    top_k: Annotated[int | None, typer.Option(help="draw from so many of the likeliest tokens")] = None,
    top_p: Annotated[float | None, typer.Option(help="draw from the likeliest tokens of this mass")] = None,
    eos: Annotated[
        list[int] | None, typer.Option(metavar="ID", help="a token that ends the text; several times")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**64 - 1, help="draw, with this seed")] = None,
    device: Annotated[str | None, typer.Option(callback=_device, metavar="cpu|cuda", help="where it runs")] = None,
    format: AsFormat = Format.text,
) -> None:
    """Continue a prompt: by the likeliest tokens, or by drawn ones with --temperature, --top-k, --top-p or --seed.

    There is no tokenizer: a model of 256 tokens or more takes and gives text as bytes, any other token ids.
    """
    import torch

    from attncompiler import pipeline
    from attncompiler.generation import generate as continued

    with output.progress(f"loading {path}") as stage:
        model = pipeline.load(path, device=device, initialise=False)
        assert model.spec is not None
        by_bytes, given = _prompt(prompt, tokens, model.spec)
        drawn: dict[str, Any] = {}
        if any(each is not None for each in (temperature, top_k, top_p, seed)):
            here = model.device
            generator = torch.Generator(here)
            _ = generator.seed() if seed is None else generator.manual_seed(seed)
            heat = 1.0 if temperature is None else temperature
            drawn = {"do_sample": True, "temperature": heat, "top_k": top_k, "top_p": top_p, "generator": generator}
        stage("generating")
        found = continued(model, [given], max_new_tokens=max_new_tokens, eos_token_id=eos, **drawn)
    new = found[0, len(given) :].tolist()
    text = _text(new) if by_bytes else None
    if format == "json":
        output.as_json({"path": str(path), "prompt_tokens": given, "tokens": new, "text": text})
    elif text is None:
        output.line(" ".join(map(str, new)))
    else:
        for line in text.split("\n"):
            output.line(line)


def _prompt(prompt: str | None, tokens: str | None, spec: ModelSpec) -> tuple[bool, list[int]]:
    """Whether the model speaks in bytes here, and the prompt. Raises UsageError (E602) where there is none."""
    from attncompiler.errors import UsageError, fail

    if prompt is not None and tokens is not None:
        raise fail(UsageError, "E602", "--prompt and --tokens are two prompts", remedy="give one of them")
    wide = (spec.model.vocab_size or 0) >= BYTES
    if prompt is not None and not wide:
        message = f"{spec.name} has {spec.model.vocab_size} tokens, fewer than there are bytes, so it takes no text"
        raise fail(UsageError, "E602", message, remedy='give token ids: --tokens "1 2 3"')
    by_bytes = wide and tokens is None
    if by_bytes:
        raw = sys.stdin.buffer.read() if prompt is None else prompt.encode("utf-8", "surrogateescape")
        given = list(raw)
    else:
        given = _ids(sys.stdin.read() if tokens is None else tokens)
    if not given:
        remedy = 'give --prompt TEXT, --tokens "1 2 3", or either on stdin'
        raise fail(UsageError, "E602", "the prompt is empty", remedy=remedy)
    return by_bytes, given


def _ids(text: str) -> list[int]:
    from attncompiler.errors import UsageError, fail

    words = text.replace(",", " ").split()
    for word in words:
        if not re.fullmatch(r"\d{1,18}", word, flags=re.ASCII):
            raise fail(UsageError, "E602", f"{word!r} is no token id", remedy="token ids are whole numbers from 0")
    return [int(word) for word in words]


def _text(tokens: list[int]) -> str:
    """The tokens as UTF-8, what is none of it replaced; a token that is no byte as its number in angle brackets."""
    runs = groupby(tokens, key=lambda token: token < BYTES)
    return "".join(
        bytes(run).decode("utf-8", "replace") if are_bytes else "".join(f"<{token}>" for token in run)
        for are_bytes, run in runs
    )
