"""The contract's own rule: its tests import nothing of the package but its public names."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import coconut

FILES = sorted(Path(__file__).parent.glob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Names that a file imports, with the dots of their modules."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_contract_imports_nothing_but_public_names(path: Path) -> None:
    of_the_package = {name for name in imported(path) if name.split(".")[0] == "coconut"}
    assert of_the_package <= {"coconut", *(f"coconut.{name}" for name in coconut.__all__)}
    of_tests = {name.split(".")[0] for name in imported(path)} & {
        path.stem for path in FILES[0].parents[1].glob("*.py")
    }
    assert of_tests == set()


@pytest.mark.parametrize("name", ["Example", "Reasoner", "Solution", "Thinking", "Thought", "__version__"])
def test_a_public_name_stays(name: str) -> None:
    assert name in coconut.__all__
    assert getattr(coconut, name) is not None
