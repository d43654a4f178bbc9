"""The shape of the tree, and what may not be in it."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "attncompiler").rglob("*.py"))


def test_a_mechanism_folder_has_every_part() -> None:
    from attncompiler.mechanisms.base import discover

    parts = {"__init__.py", "mechanism.py", "reference.py", "op.py", "layer.py", "cases.py", "cost.py", "kernels"}
    for name in discover():
        folder = ROOT / "attncompiler" / "mechanisms" / name
        assert parts <= {path.name for path in folder.iterdir()}, name


def test_every_kernel_file_is_in_its_mechanisms_table() -> None:
    from attncompiler.mechanisms.base import discover

    for name, mechanism in discover().items():
        folder = ROOT / "attncompiler" / "mechanisms" / name / "kernels"
        files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
        entries = {kernel.entry.partition(":")[0].rpartition(".")[2] for kernel in mechanism.kernels}
        assert files == entries - {"reference"}, name


def test_a_kernel_imports_no_other_kernel() -> None:
    found = []
    for path in (ROOT / "attncompiler" / "mechanisms").glob("*/kernels/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            found += [f"{path.relative_to(ROOT)}: {module}"] if ".kernels" in module or ".reference" in module else []
    assert not found


def test_mechanisms_are_named_nowhere_outside_their_folder() -> None:
    """A mechanism enters by its folder alone: no other source file imports one."""
    from attncompiler.mechanisms.base import discover

    found = []
    for path in SOURCES:
        inside = "mechanisms" in path.parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            if (
                module
                and not inside
                and any(module.startswith(f"attncompiler.mechanisms.{name}") for name in discover())
            ):
                found.append(f"{path.relative_to(ROOT)}: {module}")
    assert not found


def test_nothing_executes_text_or_unpickles() -> None:
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
                found.append(f"{path.name}:{node.lineno}")
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                found += [
                    f"{path.name}:{node.lineno}"
                    for name in names
                    if name.partition(".")[0] in ("pickle", "dill", "marshal")
                ]
    assert not found


def test_no_environment_variable_changes_behaviour() -> None:
    found = [str(p.relative_to(ROOT)) for p in SOURCES if "os.environ" in p.read_text() or "getenv" in p.read_text()]
    assert not found


def test_failures_are_caught_in_one_place() -> None:
    """Only the walk along a chain may catch every exception: it records what it caught."""
    found = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                caught = node.type
                if caught is None or (isinstance(caught, ast.Name) and caught.id in ("Exception", "BaseException")):
                    found.add(str(path.relative_to(ROOT / "attncompiler")))
    assert found == {"runtime/dispatch.py"}


def test_mechanisms_never_import_one_another() -> None:
    """Not by a list of them, so that a new folder is held to it as it enters."""
    from attncompiler.mechanisms.base import discover

    found = []
    for name in discover():
        for path in (ROOT / "attncompiler" / "mechanisms" / name).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                others = tuple(f"attncompiler.mechanisms.{other}" for other in discover() if other != name)
                found += [
                    f"{path.relative_to(ROOT)}: {m}"
                    for m in modules
                    if m in others or m.startswith(tuple(f"{o}." for o in others))
                ]
    assert not found
