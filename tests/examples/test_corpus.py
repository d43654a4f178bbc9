"""The corpus of the examples: what is in it, and that the two sides never meet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripts import load_example

corpus = load_example("corpus")


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for index in range(60):
        (tmp_path / f"module_{index}.py").write_bytes(b"file %d\n" % index * (index + 1))
    for folder in ("test", "package/tests", "idlelib/idle_test", "site-packages/x", "dist-packages", "a/__pycache__"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "secret.py").write_bytes(b"SECRET")
    (tmp_path / "notes.txt").write_bytes(b"SECRET")
    return tmp_path


def test_tests_and_packages_are_left_out(library: Path) -> None:
    made = corpus.read_standard_library(library)
    assert made.files == 60
    assert b"SECRET" not in made.train.tobytes() + made.held_out.tobytes()


def test_every_file_is_on_one_side_whole(library: Path) -> None:
    made = corpus.read_standard_library(library)
    sides = {True: made.held_out.tobytes().split(b"\0")[:-1], False: made.train.tobytes().split(b"\0")[:-1]}
    for index in range(60):
        text = (library / f"module_{index}.py").read_bytes()
        held_out = corpus.is_held_out(f"module_{index}.py")
        assert (text in sides[held_out], text in sides[not held_out]) == (True, False)
    assert len(sides[True]) + len(sides[False]) == 60


def test_the_hash_tells_every_byte_and_every_name(library: Path) -> None:
    before = corpus.read_standard_library(library).sha256
    assert corpus.read_standard_library(library).sha256 == before
    (library / "module_3.py").write_bytes(b"file 4\n" * 4)
    changed = corpus.read_standard_library(library).sha256
    (library / "module_3.py").rename(library / "module_03.py")
    assert len({before, changed, corpus.read_standard_library(library).sha256}) == 3


def test_too_few_files_are_refused(library: Path) -> None:
    with pytest.raises(ValueError, match="too few"):
        corpus.read_standard_library(library, max_files=1)


@given(step=st.integers(0, 2**40), batch=st.integers(1, 4), seq_len=st.integers(1, 40))
def test_a_batch_is_of_the_corpus_and_of_its_step_alone(step: int, batch: int, seq_len: int) -> None:
    data = np.random.default_rng(0).integers(0, 256, 50 + seq_len, dtype=np.uint8)
    made = corpus.Corpus(data, data, 1, "")
    input_ids, labels = made.batch(step, batch, seq_len)
    assert input_ids.shape == labels.shape == (batch, seq_len)
    assert torch.equal(input_ids[:, 1:], labels[:, :-1])
    text = data.tobytes()
    for row, last in zip(input_ids, labels[:, -1], strict=True):
        assert bytes([*row.tolist(), int(last)]) in text
    assert torch.equal(made.batch(step, batch, seq_len)[0], input_ids)


def test_held_out_windows_reach_from_the_first_to_the_last_byte() -> None:
    data = np.arange(200, dtype=np.uint8)
    input_ids, labels = corpus.Corpus(data, data, 1, "").held_out_windows(5, 20)
    assert (int(input_ids[0, 0]), int(labels[-1, -1])) == (0, 199)


def test_the_bigram_table_is_what_counting_gives() -> None:
    train, held_out = np.frombuffer(b"abab", dtype=np.uint8), np.frombuffer(b"ab", dtype=np.uint8)
    made = corpus.Corpus(train, held_out, 1, "")
    # ab twice, and each of 256 pairs once more
    assert made.bigram_loss(*made.held_out_windows(1, 1)) == pytest.approx(-np.log(3 / 258))


def test_all_held_out_bytes_are_windows_beside_one_another() -> None:
    data = np.arange(200, dtype=np.uint8)
    input_ids, labels = corpus.Corpus(data, data, 1, "").all_held_out(30)
    assert input_ids.flatten().tolist() == list(range(180))
    assert labels.flatten().tolist() == list(range(1, 181))


def test_the_running_interpreters_library_is_large_enough(capsys: pytest.CaptureFixture[str]) -> None:
    made = corpus.read_standard_library()
    corpus.main()
    assert made.sha256 in capsys.readouterr().out
    assert len(made.train) > 5_000_000
    assert 0.03 < len(made.held_out) / len(made.train) < 0.3
