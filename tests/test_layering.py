"""Imports run one way, and what must work without a GPU imports neither torch nor CuPy."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "flashgen"

# A package may import those on lower levels; on its own level, only itself. The package's root stands apart:
# it re-exports lazily, and everyone may read the version from it.
LEVELS = (
    {"errors", "_version"},
    {"spec", "arch"},
    {"plan"},
    {"codegen"},
    {"build"},
    {"runtime"},
    {"explore", "integrations"},
    {"cli"},
)
LEVEL = {name: depth for depth, names in enumerate(LEVELS) for name in names}
NO_DEVICE = ("errors", "spec", "arch", "plan", "codegen")
DEVICE_LIBRARIES = {"torch", "cupy", "cupyx", "triton", "cuda"}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if not path.is_relative_to(PACKAGE / "_templates"))


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imported(path: Path, source: str) -> Iterator[tuple[str, int, bool]]:
    """(dotted name, line, whether it runs) of each import; those under TYPE_CHECKING do not run."""
    tree = ast.parse(source)
    unrun = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    package = ("flashgen", *path.relative_to(PACKAGE).with_suffix("").parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, id(node) not in unrun
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            names = [module] if module != "flashgen" else [f"flashgen.{alias.name}" for alias in node.names]
            for name in names:
                yield name, node.lineno, id(node) not in unrun


def backward(path: Path, source: str) -> list[str]:
    """Imports of `source` that go up, or sideways within a level, or name an unknown part."""
    part = part_of(path)
    if part.startswith("__"):  # the root re-exports lazily; __main__ is the command
        return []
    found = []
    for name, line, _ in imported(path, source):
        parts = name.split(".")
        if parts[0] != "flashgen" or len(parts) == 1:
            continue
        other = parts[1]
        if other.startswith("__"):
            continue
        if other != part and LEVEL.get(other, len(LEVELS)) >= LEVEL[part]:
            found.append(f"{path.relative_to(ROOT)}:{line}: {part} imports {other}")
    return found


def device_imports(path: Path, source: str) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for name, line, _ in imported(path, source)
        if part_of(path) in NO_DEVICE and name.split(".")[0] in DEVICE_LIBRARIES
    ]


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """A cycle of module imports, or nothing."""
    done: set[str] = set()

    def visit(node: str, trail: list[str]) -> list[str]:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in done:
            return []
        for target in sorted(graph.get(node, ())):
            if found := visit(target, [*trail, node]):
                return found
        done.add(node)
        return []

    for start in sorted(graph):
        if found := visit(start, []):
            return found
    return []


def module_graph() -> dict[str, set[str]]:
    """Top-level imports between modules: those that run when a module is loaded."""
    names = {".".join(("flashgen", *p.relative_to(PACKAGE).with_suffix("").parts)): p for p in modules()}
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        tree = ast.parse(path.read_text())
        body = [node for node in tree.body if isinstance(node, ast.ImportFrom | ast.Import)]
        edges = set()
        for node in body:
            targets = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            )
            for target in targets:
                edges |= {target, f"{target}.__init__"} & names.keys() - {name}
        # importing a submodule from inside its own package does not wait for the package's __init__
        graph[name] = {e for e in edges if e != f"{name.rpartition('.')[0]}.__init__"}
    return graph


def test_every_part_has_a_level() -> None:
    parts = {part_of(path) for path in modules()}
    assert parts - {"__init__", "__main__"} <= LEVEL.keys()


def test_no_backward_arrow() -> None:
    assert [line for path in modules() for line in backward(path, path.read_text())] == []


def test_no_device_library_below_build() -> None:
    assert [line for path in modules() for line in device_imports(path, path.read_text())] == []


def test_no_cycle_between_modules() -> None:
    assert cycle(module_graph()) == []


@pytest.mark.parametrize(
    "source, breaks",
    [
        ("from flashgen.runtime import load", True),
        ("from flashgen import runtime", True),
        ("def f():\n    from flashgen.build import build", True),
        ("from ..codegen import render", True),
        ("from flashgen.spec import AttentionSpec", False),
        ("from flashgen.plan.model import KernelPlan", False),
        ("from flashgen import __version__", False),
    ],
)
def test_the_walker_sees_backward_arrows(source: str, breaks: bool) -> None:
    assert bool(backward(PACKAGE / "plan" / "solver.py", source)) is breaks


def test_the_walker_sees_device_libraries_and_cycles() -> None:
    assert device_imports(PACKAGE / "arch" / "model.py", "import torch.nn")
    assert not device_imports(PACKAGE / "runtime" / "launch.py", "import torch")
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_importing_the_solver_loads_no_device_library() -> None:
    script = (
        "import sys, flashgen, flashgen.plan, flashgen.codegen; "
        f"print(sorted({DEVICE_LIBRARIES!r} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"
