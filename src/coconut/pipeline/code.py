"""Python code as a dependency: the modules that a script loads, and digests that ignore comments and layout."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from coconut.files import sha256_of


@cache
def digest_code(source: bytes) -> str:
    r"""SHA-256 of what a module does: of its syntax tree without comments, docstrings and layout.

    >>> digest_code(b"x = 1  # one") == digest_code(b"'''Doc.'''\nx=1") != digest_code(b"x = 2")
    True
    """
    tree = _parse(source)
    return sha256_of(source.hex() if tree is None else _normalize(tree))


def import_closure(script: str, root: Path) -> dict[str, bytes]:
    """The sources of a script and of all our modules that it may load, by path relative to `root`.

    Imports inside of functions count; those for annotations only (`if TYPE_CHECKING:`) do not. Ours is what lies in
    `src/` or next to the script.
    """
    sources: dict[str, bytes] = {}
    to_read = [root / script]
    homes = (root / "src", (root / script).parent)
    while to_read:
        path = to_read.pop()
        name = path.relative_to(root).as_posix()
        if name not in sources and path.is_file():
            sources[name] = path.read_bytes()
            package = next((path.parent.relative_to(home) for home in homes if path.is_relative_to(home)), Path())
            names = {_absolute(level, module, package.parts) for level, module in _imports(sources[name])}
            to_read += [module for one in names for home in homes for module in _files_of(one, home)]
    return sources


def _parse(source: bytes) -> ast.Module | None:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None  # It is no Python, or nested deeper than the parser follows.


def _normalize(node: Any) -> Any:
    """A tree as nested lists. What is empty is left out: each version of Python adds fields that mostly are."""
    if isinstance(node, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(node) if value is not None and value != [])
        return [type(node).__name__, *([name, _normalize(value)] for name, value in fields)]
    if isinstance(node, list):
        return [_normalize(item) for item in node if not _is_docstring(item)]
    return repr(node)


def _is_docstring(node: Any) -> bool:
    """Whether a statement is a text that is not used, as all docstrings are, those of fields too."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


@cache
def _imports(source: bytes) -> frozenset[tuple[int, str]]:
    """The modules, or names in modules, that import statements name, with the number of dots before them."""
    tree = _parse(source)
    found: set[tuple[int, str]] = set()
    for node in [] if tree is None else _walk(tree):
        if isinstance(node, ast.Import):
            found |= {(0, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found |= {
                (node.level, module),
                *((node.level, f"{module}.{alias.name}".strip(".")) for alias in node.names),
            }
    return frozenset(found)


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """Every node, without the body of `if TYPE_CHECKING:`. Expressions hold no import and are left out."""
    yield node
    children: list[ast.AST] = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.If) and "TYPE_CHECKING" in (getattr(node.test, "id", ""), getattr(node.test, "attr", "")):
        children = list(node.orelse)
    for child in children:
        if not isinstance(child, ast.expr):
            yield from _walk(child)


def _absolute(level: int, module: str, package: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(module.split(".")) if module else ()
    return (*package[: len(package) - level + 1], *names) if level else names


def _files_of(names: tuple[str, ...], home: Path) -> Iterator[Path]:
    """The files that importing `a.b.c` may run: those of `a`, `a.b` and `a.b.c`."""
    for length in range(1, len(names) + 1):
        path = home.joinpath(*names[:length])
        yield from (path.with_suffix(".py"), path / "__init__.py")
