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
    """Only the walk along a chain may catch every exception, the fuzzer and a benchmark's grid, whose peers may raise
    anything, and the probe of Triton, which stands for a chain where there is none: each tells what it caught."""
    found = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                caught = node.type
                if caught is None or (isinstance(caught, ast.Name) and caught.id in ("Exception", "BaseException")):
                    found.add(str(path.relative_to(ROOT / "attncompiler")))
    assert found == {"runtime/dispatch.py", "testing/fuzz.py", "bench/grid/measure.py", "blocks/launching/probe.py"}


def test_a_kernel_has_the_sizes_that_its_cost_reckons_with() -> None:
    """A name has its value in cost.py alone, and kernels import it: two values would drift apart unseen."""

    def assigned(path: Path) -> set[str]:
        body = ast.parse(path.read_text(encoding="utf-8")).body
        targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
        return {target.id for target in targets if isinstance(target, ast.Name)}

    for cost in sorted((ROOT / "attncompiler" / "mechanisms").glob("*/cost.py")):
        for kernel in sorted(cost.parent.glob("kernels/*.py")):
            twice = assigned(cost) & assigned(kernel)
            assert not twice, f"{kernel}: {twice}"
