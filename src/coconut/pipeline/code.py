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
    `src/` or next to the script; the script may itself be a module of ours.
    """
    path, home = root / script, root / "src"
    modules = _modules_in(home)
    if path.is_relative_to(home):
        name = ".".join(path.relative_to(home).with_suffix("").parts)
    else:
        name, modules = path.stem, _modules_in(path.parent) | modules
    to_read, sources = {name: path}, {}
    while to_read:
        name, path = to_read.popitem()
        if path.is_file():
            relative = path.relative_to(root).as_posix()
            sources[relative] = path.read_bytes()
            modules.pop(name, None)  # It is read once.
            package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
            for level, module in _imports(sources[relative]):
                to_read |= {one: modules[one] for one in _packages_of(level, module, package) if one in modules}
    return sources


def _modules_in(home: Path) -> dict[str, Path]:
    """The file of each module below a folder that Python searches; a package's file is its `__init__.py`."""
    names = {path: path.relative_to(home).with_suffix("").parts for path in home.rglob("*.py")}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for path, parts in names.items()}


def _packages_of(level: int, module: str, package: list[str]) -> Iterator[str]:
    """The modules that importing `a.b.c` runs: `a`, `a.b` and `a.b.c`."""
    parts = [*(package[: len(package) - level + 1] if level else []), *filter(None, module.split("."))]
    return (".".join(parts[:length]) for length in range(1, len(parts) + 1))


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
    """Say whether a statement is a text that is not used, as all docstrings are, those of fields too."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


@cache
def _imports(source: bytes) -> frozenset[tuple[int, str]]:
    """The modules, or names in modules, that import statements name, with the number of dots before them."""
    tree = _parse(source)
    found: set[tuple[int, str]] = set()
    for node in [] if tree is None else _statements(tree.body):
        if isinstance(node, ast.Import):
            found |= {(0, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found |= {(node.level, module), *((node.level, f"{module}.{alias.name}") for alias in node.names)}
    return frozenset(found)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Every statement, however deep, without those below `if TYPE_CHECKING:`."""
    for node in body:
        yield node
        inner = [getattr(node, name, []) for name in ("body", "orelse", "finalbody")]
        if isinstance(node, ast.If) and "TYPE_CHECKING" in (
            getattr(node.test, "id", ""),
            getattr(node.test, "attr", ""),
        ):
            inner = [node.orelse]
        inner += [part.body for name in ("handlers", "cases") for part in getattr(node, name, [])]
        for statements in inner:
            yield from _statements(statements)
