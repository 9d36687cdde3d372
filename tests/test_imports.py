"""Imports point one way: no package imports from one above it, and no two modules import each other in a circle."""

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "src/coconut"
LAYERS = (
    ("layout",),
    ("config",),
    ("files",),
    ("ranks", "shards"),
    ("logs", "devices"),
    ("pipeline", "tracking"),
    ("data",),
    ("model",),
    ("methods",),
    ("checkpoints",),
    ("evaluation",),
    ("training", "probing"),
    ("report",),
    ("arguments", "solutions", "publish", "planning", "recipes"),
    ("reasoner",),
    ("terminal", "lm_eval"),
    ("cli", ""),
    ("__main__",),
)
"""From the bottom up. A module may import from its own layer's package and from layers below it."""
KNOWS_NOTHING_OF = {
    "model": {"files", "logs", "devices", "pipeline", "data", "layout"},
    "data": {"pipeline"},
    "pipeline": {"data"},
}
"""Beyond the layers: tensors know no files, data sets no processes, processes no data sets."""
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
MODULES = sorted(SOURCES.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCES).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(module: str) -> str:
    return module.partition(".")[0]


@cache
def imports_of(path: Path) -> frozenset[str]:
    """Our modules that a file imports anywhere in it, without those needed for annotations only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in guarded and (node.module or "").startswith("coconut."):
            module = (node.module or "").removeprefix("coconut.")
            submodules = {f"{module}.{alias.name}" for alias in node.names}
            found |= (submodules & {name_of(other) for other in MODULES}) or {module}
    return frozenset(found)


def test_no_import_points_up() -> None:
    for importing, imported in ((name_of(path), imported) for path in MODULES for imported in imports_of(path)):
        package, below = package_of(importing), package_of(imported)
        assert below == package or RANK[below] < RANK[package], f"{importing} imports {imported}, which is above it"
        assert below not in KNOWS_NOTHING_OF.get(package, ()), (
            f"{package} must not know {below}, but {importing} imports {imported}"
        )


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {name_of(path): imports_of(path) for path in MODULES}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")
