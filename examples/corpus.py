"""The text of the examples: the source files of the Python standard library, split by file into train and held-out.

    python examples/corpus.py        # what is in it, its hash, and how well a table of byte pairs predicts it

Nothing is downloaded: the files are those of the interpreter that runs. Two interpreters of equal version have the same
corpus; `sha256` tells.
"""

from __future__ import annotations

import hashlib
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

EXCLUDED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
HELD_OUT_EVERY = 10
"""one file in so many is held out, by the checksum of its path"""


@dataclass(frozen=True)
class Corpus:
    """Bytes for training, and others that are never trained on. `sha256` is of every path and every byte, in order."""

    train: np.ndarray
    held_out: np.ndarray
    files: int
    sha256: str

    def batch(self, step: int, batch_size: int, seq_len: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """The windows of one step: input_ids and labels (B, T) int64, labels[b, t] the byte after input_ids[b, t].

        Their places depend on (seed, step) alone, so that a resumed run reads what an unbroken one would have read.
        """
        starts = np.random.default_rng((seed, step)).integers(len(self.train) - seq_len, size=batch_size)
        return _windows(self.train, starts, seq_len)

    def held_out_windows(self, count: int, seq_len: int) -> tuple[Tensor, Tensor]:
        """Fixed windows, spread evenly over the held-out bytes: input_ids and labels (count, T)."""
        return _windows(self.held_out, np.linspace(0, len(self.held_out) - seq_len - 1, count).astype(int), seq_len)

    def all_held_out(self, seq_len: int) -> tuple[Tensor, Tensor]:
        """Windows beside one another that hold all of the held-out bytes but the last few: input_ids and labels."""
        return _windows(self.held_out, np.arange(0, len(self.held_out) - seq_len, seq_len), seq_len)

    def bigram_loss(self, input_ids: Tensor, labels: Tensor) -> float:
        """Nats per byte of windows under a table of the training bytes' pairs, each counted once more."""
        pairs = self.train[:-1].astype(np.int64) * 256 + self.train[1:]
        table = np.bincount(pairs, minlength=256 * 256).reshape(256, 256) + 1.0
        log_probability = torch.from_numpy(np.log(table / table.sum(1, keepdims=True)))
        return -log_probability[input_ids, labels].mean().item()


def read_standard_library(root: Path | None = None, max_files: int | None = None) -> Corpus:
    """The .py files under `root` (default: the running interpreter's standard library), tests and packages excluded.

    Files are sorted by their relative path; a NUL byte, which no source file holds, ends each. With `max_files` only
    the first so many are read. Raises ValueError when either side of the split would be empty.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    paths = [path for path in paths if EXCLUDED_FOLDERS.isdisjoint(path.split("/"))][:max_files]
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    digest = hashlib.sha256()
    for path in paths:
        text = (root / path).read_bytes() + b"\0"
        digest.update(path.encode() + b"\0" + text)
        parts[is_held_out(path)].append(text)
    if not (parts[True] and parts[False]):
        raise ValueError(f"{root} holds too few source files to be split: {len(paths)}")
    train, held_out = (np.frombuffer(b"".join(parts[side]), dtype=np.uint8) for side in (False, True))
    return Corpus(train, held_out, len(paths), digest.hexdigest())


def is_held_out(path: str) -> bool:
    """Whether the CRC-32 of the path (relative, with slashes) is divisible by ten: other files have no say in it."""
    return zlib.crc32(path.encode()) % HELD_OUT_EVERY == 0


def _windows(data: np.ndarray, starts: np.ndarray, seq_len: int) -> tuple[Tensor, Tensor]:
    rows = torch.from_numpy(data[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def main() -> None:
    """Print what the corpus is."""
    corpus = read_standard_library()
    print(f"{corpus.files:,} files, sha256 {corpus.sha256}")
    print(f"{len(corpus.train):,} bytes to train on, {len(corpus.held_out):,} held out")
    print(f"a bigram table gives {corpus.bigram_loss(*corpus.all_held_out(512)):.3f} nats per held-out byte")


if __name__ == "__main__":
    main()
