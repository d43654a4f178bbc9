"""Reading files: each way a file can be bad has its own words, and nothing but SpecError comes out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from attncompiler.errors import SpecError
from attncompiler.spec import parse, read
from attncompiler.spec.loader import MAX_BYTES

from .samples import BASE, SPECS


def error(path: Path) -> str:
    with pytest.raises(SpecError) as caught:
        read(path)
    return str(caught.value).removeprefix(str(path))


def test_a_file_reads_as_its_text(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("\ufeff" + BASE, encoding="utf-8")
    assert read(path, overrides=["seed=3"]) == parse(BASE, overrides=["seed=3"])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert error(tmp_path / "none.yaml") == ": E001 cannot be read: No such file or directory"
    assert error(tmp_path) == ": E001 cannot be read: Is a directory"
    assert "E001 cannot be read: embedded null byte" in error(Path("a\0b"))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a user who can be refused a file")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(BASE)
    path.chmod(0)
    assert error(path) == ": E001 cannot be read: Permission denied"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", ":1:1: E003 the document is empty"),
        (b"a: 1\nb: \xff", ":2:4: E001 the byte 0xff is not UTF-8"),
        (BASE.encode("utf-16"), ":1:1: E001 the byte 0xff is not UTF-8"),
        (b"[" * 10_000_000, f": E004 the spec is larger than {MAX_BYTES // 1024} KiB"),
        (b"just text", ":1:1: E003 the document is not a mapping"),
        (b"\x89PNG\r\n\x1a\n", ":1:1: E001 the byte 0x89 is not UTF-8"),
        (b"a: b: c", ":1:5: E002 not YAML: mapping values are not allowed here"),
    ],
    ids=lambda value: str(value[:10]),
)
def test_files_that_hold_no_spec(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    assert error(path) == expected


def test_reading_imports_no_array_library() -> None:
    code = (
        "import sys, attncompiler.spec as spec\n"
        f"spec.read({str(SPECS[0])!r}); spec.schema()\n"
        "print([name for name in ('torch', 'numpy', 'hypothesis', 'triton') if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"
