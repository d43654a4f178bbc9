"""The verb `generate`: prompts as text, as token ids and from stdin, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_runner import SPEC
from typer.testing import CliRunner, Result

import attncompiler
from attncompiler.cli import app

SIZES = {"bytes": 300, "ids": 31}


@pytest.fixture(params=SIZES)
def model(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder with a model that takes text, or one that takes token ids alone."""
    return made(request.param, tmp_path, monkeypatch)


def made(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("spec.yaml").write_text(SPEC.replace("31", str(SIZES[kind])))
    attncompiler.save(attncompiler.build("spec.yaml", device="cpu"), kind)
    return kind


def run(*arguments: object, stdin: str | bytes = "") -> Result:
    result = CliRunner().invoke(app, ["generate", *map(str, arguments)], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def generated(*arguments: object, stdin: str | bytes = "") -> dict[str, object]:
    result = run(*arguments, "--format", "json", stdin=stdin)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def expected(folder: str, prompt: list[int], count: int, **options: object) -> list[int]:
    model = attncompiler.load(folder, device="cpu")
    return attncompiler.generate(model, [prompt], max_new_tokens=count, **options)[0, len(prompt) :].tolist()


def test_token_ids(model: str) -> None:
    found = generated(model, "--tokens", "1 2, 30", "--max-new-tokens", 7)
    tokens = expected(model, [1, 2, 30], 7)
    assert found == {"path": model, "prompt_tokens": [1, 2, 30], "tokens": tokens, "text": None}
    assert run(model, "--tokens", "1 2 30", "--max-new-tokens", 7).stdout == " ".join(map(str, tokens)) + "\n"
    assert len(generated(model, "--tokens", "1")["tokens"]) == 128


def test_text_is_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made("bytes", tmp_path, monkeypatch)
    prompt = list("zwölf\n".encode())
    for arguments, stdin in ((["--prompt", "zwölf\n"], ""), ([], "zwölf\n".encode())):
        found = generated(folder, *arguments, "--max-new-tokens", 20, "--seed", 3, "--temperature", 5, stdin=stdin)
        assert found["prompt_tokens"] == prompt
        drawn = {"do_sample": True, "temperature": 5.0, "generator": torch.Generator().manual_seed(3)}
        assert found["tokens"] == expected(folder, prompt, 20, **drawn)
        shown = run(folder, *arguments, "--max-new-tokens", 20, "--seed", 3, "--temperature", 5, stdin=stdin).stdout
        assert shown.isascii() or shown.replace("\n", "").isprintable()


def test_what_tokens_say() -> None:
    from attncompiler.cli.generate import _text

    assert _text([*"é\n".encode(), 256, 299, 97, 0xC3]) == "é\n<256><299>a\N{REPLACEMENT CHARACTER}"


def test_ids_from_stdin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made("ids", tmp_path, monkeypatch)
    assert generated(folder, "--max-new-tokens", 4, stdin="3 4\n5\n")["tokens"] == expected(folder, [3, 4, 5], 4)


def test_drawing_and_ends(model: str) -> None:
    arguments = (model, "--tokens", "1 2", "--max-new-tokens", 40, "--top-k", 9, "--top-p", 0.9, "--seed", 5)
    options = {"do_sample": True, "top_k": 9, "top_p": 0.9}
    first = generated(*arguments)["tokens"]
    assert first == expected(model, [1, 2], 40, **options, generator=torch.Generator().manual_seed(5))
    assert generated(*arguments[:-1], 6)["tokens"] != first
    end = first[10]
    found = generated(*arguments, "--eos", end, "--eos", first[20])["tokens"]
    assert found == first[: min(first.index(end), first.index(first[20])) + 1]


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("E602", ("--prompt", "a", "--tokens", "1")),
        ("E602", ("--tokens", "1 b")),
        ("E602", ("--tokens", "-1")),
        ("E602", ("--tokens", " ")),
        ("E602", ()),
        ("E403", ("--tokens", "1 31000")),
        ("E403", ("--tokens", "1", "--temperature", "0")),
        ("E403", ("--tokens", "1", "--top-p", "2")),
        ("E403", ("--tokens", "1", "--top-k", "0")),
        ("E403", ("--tokens", "1", "--eos", "31000")),
    ],
)
def test_bad_arguments(model: str, code: str, arguments: tuple[str, ...]) -> None:
    result = run(model, *arguments)
    assert result.exit_code == 1
    assert code in result.stderr
    assert "Traceback" not in result.output


def test_text_for_a_model_of_few_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(made("ids", tmp_path, monkeypatch), "--prompt", "a")
    assert result.exit_code == 1
    assert "E602 small has 31 tokens, fewer than there are bytes" in result.stderr


def test_seeds_and_temperatures_at_the_edge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made("ids", tmp_path, monkeypatch)
    arguments = (folder, "--tokens", "1 2", "--max-new-tokens", 4)
    for seed in (-1, 2**64, 2**70):
        assert run(*arguments, "--seed", seed).exit_code == 2
    found = generated(*arguments, "--seed", 2**64 - 1, "--temperature", "1e-300")
    assert found["tokens"] == expected(folder, [1, 2], 4)


@pytest.mark.parametrize("device", ["meta", "tpu"])
def test_a_device_that_cannot_run(model: str, device: str) -> None:
    assert run(model, "--tokens", "1", "--device", device).exit_code == 2


def test_folders_that_cannot_generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made("ids", tmp_path, monkeypatch)
    attncompiler.save(attncompiler.build("spec.yaml", device="meta"), "empty")
    encoder = SPEC.replace("window: 4", "window: 4, causal: false")
    Path("encoder.yaml").write_text(encoder)
    attncompiler.save(attncompiler.build("encoder.yaml", device="cpu"), "encoder")
    Path(folder, "model.safetensors").write_bytes(b"broken")
    for path, code in (("empty", "E307"), ("encoder", "E503"), (folder, "E302"), ("nowhere", "E301")):
        result = run(path, "--tokens", "1")
        assert result.exit_code == 1
        assert f"{code} " in result.stderr, path
