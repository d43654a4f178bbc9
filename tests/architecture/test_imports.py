"""What imports what: the contracts, and what a fresh process loads."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def fresh(code: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, timeout=120)


def lint(folder: Path) -> tuple[int, str]:
    """The exit code of the contracts of pyproject.toml on the package in `folder`, and what was said, on one line."""
    done = fresh("from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))", folder)
    return done.returncode, " ".join(done.stdout.split())


def test_import_contracts_hold() -> None:
    code, said = lint(ROOT)
    assert code == 0, said


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder with a copy of the package and its contracts, to plant imports in."""
    shutil.copytree(ROOT / "attncompiler", tmp_path / "attncompiler", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def plant(folder: Path, module: str, statement: str) -> None:
    """`statement` at the end of a module, which need not be there."""
    with open(folder / f"{module.replace('.', '/')}.py", "a", encoding="utf-8") as file:
        file.write(f"\n{statement}\n")


MIXERS = "attncompiler.mechanisms"


@pytest.mark.parametrize(
    ("module", "statement", "imported"),
    [
        ("attncompiler.errors", "from attncompiler import targets", "attncompiler.targets"),
        ("attncompiler.targets.target", "from ..mechanisms.base import Needs", f"{MIXERS}.base"),
        (f"{MIXERS}.base", "from attncompiler.blocks.cost import FP32", "attncompiler.blocks.cost"),
        (f"{MIXERS}.base", "from attncompiler.runtime import registry", "attncompiler.runtime.registry"),
        (f"{MIXERS}.attention.mechanism", "def lazy():\n    import torch.fx", "torch"),
        (f"{MIXERS}.attention.cost", "from torch import Tensor", "torch"),
        (f"{MIXERS}.attention.layer", "import attncompiler.report", "attncompiler.report"),
        (f"{MIXERS}.attention.layer", "from . import cases", f"{MIXERS}.attention.cases"),
        (f"{MIXERS}.attention.kernels.sdpa", "from ..reference import attention", f"{MIXERS}.attention.reference"),
        (
            f"{MIXERS}.attention.kernels.chunkwise",
            f"import {MIXERS}.attention.kernels.sdpa as _x",
            f"{MIXERS}.attention.kernels.sdpa",
        ),
        (
            f"{MIXERS}.linformer.op",
            "def lazy():\n    from attncompiler.mechanisms.attention import op",
            f"{MIXERS}.attention.op",
        ),
        ("attncompiler.blocks.norm", f"from {MIXERS}.attention.layer import Attention", f"{MIXERS}.attention.layer"),
        ("attncompiler.runtime.site", "import attncompiler.spec", "attncompiler.spec"),
        ("attncompiler.spec.model", "def lazy():\n    import numpy as np", "numpy"),
        ("attncompiler.emit.emit", f"import {MIXERS}.attention.cases", f"{MIXERS}.attention.cases"),
        ("attncompiler.pipeline", f"from {MIXERS} import mamba", f"{MIXERS}.mamba"),
    ],
)
def test_a_contract_finds(copied: Path, module: str, statement: str, imported: str) -> None:
    plant(copied, module, statement)
    code, said = lint(copied)
    assert code == 1
    assert f"{module} -> {imported} (" in said


def test_a_new_part_of_the_package_must_be_placed(copied: Path) -> None:
    plant(copied, "attncompiler.fresh", "import torch")
    code, said = lint(copied)
    assert code == 1
    assert "not listed as layers: - attncompiler.fresh" in said


def test_imports_for_types_alone_are_free(copied: Path) -> None:
    statement = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import attncompiler.pipeline, torch"
    plant(copied, "attncompiler.spec.model", statement)
    code, said = lint(copied)
    assert code == 0, said


@pytest.mark.parametrize(
    "code",
    [
        "import attncompiler",
        "import attncompiler.spec",
        "import attncompiler.planning",
        "import attncompiler.cli",
        "import attncompiler; attncompiler.check('specs/hybrid_tiny.yaml')",
        "import attncompiler; attncompiler.plan('specs/hybrid_13b.yaml')",
        "from attncompiler.mechanisms.base import discover; assert len(discover()) >= 5",
    ],
)
def test_the_front_of_the_pipeline_imports_no_heavy_library(code: str) -> None:
    names = "{'torch', 'numpy', 'hypothesis', 'triton', 'safetensors'}"
    heavy = f"import sys; loaded = {names} & set(sys.modules); assert not loaded, loaded"
    done = fresh(f"{code}\n{heavy}")
    assert done.returncode == 0, done.stderr


def test_the_package_works_without_any_extra() -> None:
    """With every optional library made unimportable, a model builds, runs and trains."""
    done = fresh(
        """
import sys
class Absent:
    names = {"triton", "transformers", "matplotlib", "fla", "mamba_ssm", "flash_attn", "prometheus_client", "pytest"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import pkgutil, importlib, attncompiler
for module in pkgutil.walk_packages(attncompiler.__path__, "attncompiler."):
    if not {"flash", "recurrence", "streaming", "launching"} & set(module.name.split(".")[:-1]):  # what Triton compiles
        importlib.import_module(module.name)
import torch
model = attncompiler.build("specs/hybrid_tiny.yaml", device="cpu")
tokens = torch.randint(256, (1, 9))
model.loss(tokens, tokens).backward()
"""
    )
    assert done.returncode == 0, done.stderr


TRITON = {"flash", "recurrence", "streaming", "launching"}
"""folders of what Triton compiles: mechanisms, what they share, blocks around them, and how all are launched"""


def test_no_library_of_an_extra_is_imported_at_module_level() -> None:
    """Extras are imported inside functions alone, so their absence is met where it can be said.

    What Triton compiles is the exception, and is itself imported inside the functions of its kernel alone.
    """
    import ast

    extras = {"triton", "transformers", "matplotlib", "fla", "mamba_ssm", "flash_attn", "prometheus_client"}
    found = []
    for path in sorted((ROOT / "attncompiler").rglob("*.py")):
        if path.parent.name in TRITON:
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            names = ["triton" if TRITON & set(name.split(".")) else name for name in names]
            found += [f"{path.name}: {name}" for name in names if name.partition(".")[0] in extras]
    assert not found


def test_public_names_are_what_they_say_however_often_they_are_used() -> None:
    """A subpackage imported on the way must not take the place of a public function of its name."""
    done = fresh(
        """
import attncompiler, types
attncompiler.check("specs/llama_tiny.yaml")
for _ in range(2):
    assert list(attncompiler.plan("specs/llama_tiny.yaml")) == ["h200", "a5000", "cpu"]
    attncompiler.explain("specs/llama_tiny.yaml")
model = attncompiler.build("specs/llama_tiny.yaml", device="meta")
for name in attncompiler.__all__:
    if name != "ops":
        assert not isinstance(getattr(attncompiler, name), types.ModuleType), name
"""
    )
    assert done.returncode == 0, done.stderr
