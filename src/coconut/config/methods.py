"""Finds training methods by their names, which are those of the modules in `coconut/methods`."""

import dataclasses
import importlib
import pkgutil
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coconut.config.messages import first_line, shown, suggest
from coconut.config.strict import parse

if TYPE_CHECKING:
    from coconut.config.schema import Entry
    from coconut.methods import Method

PACKAGE = "coconut.methods"


class MethodError(ValueError):
    """A method's own code has failed; the message names its file and line."""


def _folders() -> list[str]:
    """Return the folders of the methods; there is one, unless a program has put more into the package's path."""
    spec = find_spec(PACKAGE)
    assert spec is not None, "it is a package of ours"
    return list(spec.submodule_search_locations or ())


def _file_of(name: str) -> Path:
    paths = [Path(folder) / f"{name}.py" for folder in _folders()]
    return next((path for path in paths if path.is_file()), paths[0])


def method_names() -> list[str]:
    """Return the names of all methods, in alphabetical order.

    >>> "coconut" in method_names()
    True
    """
    return sorted(module.name for module in pkgutil.iter_modules(_folders()) if module.name[0] != "_")


@cache
def find_method(name: str) -> "type[Method]":
    """Return the class of a method.

    Raises:
        ValueError: There is no such method, or its module holds no class of the kind.
        MethodError: Its module fails when it is imported.
    """
    names = method_names()
    if name not in names:
        raise ValueError(
            f"method: found {shown(name)}, wanted one of {', '.join(names)}, or a file of this name in"
            f" {_shown(Path(_folders()[0]))} (docs/methods.md){suggest(name, names)}"
        )
    with blaming_method(name, "be imported"):
        module = importlib.import_module(f"{PACKAGE}.{name}")
    base = importlib.import_module(PACKAGE).Method
    own = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, base) and value.__module__ == module.__name__
    ]
    if len(own) != 1:
        raise ValueError(
            f"{_shown(_file_of(name))}: found {len(own)} classes derived from {PACKAGE}.Method, wanted one"
        )
    found: type[Method] = own[0]
    return found


def build_method(entry: "Entry") -> "Method":
    """Return the method of an entry with the entry's values."""
    return find_method(entry.method)(entry.latent_stage, entry.latent, entry.keys)


def asking_keys(kind: "type[Method]", found: Mapping[str, Any]) -> Any:
    """Return the keys of a method for asking questions; None where it has keys that only its training needs.

    Raises:
        ValueError: A value is of the wrong type.
    """
    needed = {field.name for field in dataclasses.fields(kind.Keys) if field.default is dataclasses.MISSING}
    return parse(found, kind.Keys, "") if needed <= found.keys() else None


def find_methods() -> "dict[str, type[Method]]":
    """Return all methods that can be imported, by name; one that fails concerns only those who name it."""
    found = {}
    for name in method_names():
        try:
            found[name] = find_method(name)
        except ValueError:
            continue
    return found


@contextmanager
def blaming_method(name: str, task: str) -> Iterator[None]:
    """Turn an exception that arises in a method's own file into a message with the file and the line.

    Errors of memory and of other processes pass, as the caller knows what to do then.

    Raises:
        MethodError: What the method was to do has failed in its file.
    """
    try:
        yield
    except MethodError:
        raise
    except Exception as error:
        line = _line_in(_file_of(name), error)
        if line is None or "out of memory" in str(error).lower():
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise MethodError(
            f"{_shown(_file_of(name))}:{line}: method {name} cannot {task}: {kind}"
            f"{first_line(error)}; correct the file, and run `dvc repro` again"
        ) from error


def _line_in(path: Path, error: BaseException) -> int | None:
    """Return the innermost line of a file on the way to an error; also of one that Python cannot read."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return lines[-1] if lines else None


def _shown(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
