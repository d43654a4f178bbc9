"""What imports what: the contracts, and what a fresh process loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def fresh(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_import_contracts_hold() -> None:
    from importlinter.cli import lint_imports

    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0


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
    importlib.import_module(module.name)
import torch
model = attncompiler.build("specs/hybrid_tiny.yaml", device="cpu")
tokens = torch.randint(256, (1, 9))
model.loss(tokens, tokens).backward()
"""
    )
    assert done.returncode == 0, done.stderr


def test_no_library_of_an_extra_is_imported_at_module_level() -> None:
    """Extras are imported inside functions alone, so their absence is met where it can be said."""
    import ast

    extras = {"triton", "transformers", "matplotlib", "fla", "mamba_ssm", "flash_attn", "prometheus_client"}
    found = []
    for path in sorted((ROOT / "attncompiler").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
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
