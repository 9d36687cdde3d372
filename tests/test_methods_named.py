"""Callbacks of `coconut/methods`, no line of the package names a training method."""

import ast
from collections.abc import Iterator
from pathlib import Path

from coconut.config.methods import method_names

SOURCES = Path(__file__).parents[1] / "src/coconut"
OTHER_MEANINGS = {
    ("cli.py", "coconut"): "the command's own name",
    ("pipeline/night.py", "coconut"): "the package, run as `python -m coconut`",
    ("pipeline/branches.py", "coconut"): "the package, run as `python -m coconut`",
    ("pipeline/launch.py", "coconut"): "the package, run as `python -m coconut`",
    ("data/layouts.py", "pause"): "a kind of slot",
    ("data/formats.py", "cot"): "a field of published files",
    ("data/presets/published.py", "cot"): "a field of published files",
    ("evaluation/entry.py", "pause"): "a kind of slot",
}


def texts_of(path: Path) -> Iterator[str]:
    """Yield the texts of a module that are values; docstrings and other statements of a text alone are none."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    alone = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in alone:
            yield node.value


def test_no_module_names_a_method() -> None:
    names = set(method_names())
    assert {"coconut", "codi", "icot"} <= names
    found = set()
    for path in SOURCES.rglob("*.py"):
        place = path.relative_to(SOURCES)
        if place.parts[0] != "methods":
            found |= {(place.as_posix(), text) for text in texts_of(path) if text in names}
    assert found - OTHER_MEANINGS.keys() == set()


def test_no_module_imports_a_method() -> None:
    for path in SOURCES.rglob("*.py"):
        if path.relative_to(SOURCES).parts[0] != "methods":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                assert not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("coconut.methods.")), (
                    path
                )
