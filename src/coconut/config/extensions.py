"""Finds what is added as a file: tasks in `coconut/data/generators`, presets in `coconut/data/presets`, and others.

They are loaded by name, as training methods are, so that no module imports them: a new file is in the digests of those
stages alone that use such files (`coconut.pipeline.stage_code`), and nothing is trained again because of it.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any

from coconut.config.field_map import Fields
from coconut.config.messages import first_line, suggest
from coconut.config.strict import parse, parse_tagged

TASKS = "coconut.data.generators"
PRESETS = "coconut.data.presets"
FORMATS = ("generated", "gsm8k", "gsm8k_aug", "prosqa", "prontoqa", "multiplication", "canonical", "fields")
"""Formats that are no presets."""


@cache
def load_modules(package: str) -> tuple[list[ModuleType], str]:
    """Import the modules of a package whose names do not begin with `_`, in alphabetical order.

    Returns:
        (modules, failed): failed is empty, or says which ones cannot be imported; they concern only those who name
        what is in them.
    """
    modules, failed = [], ""
    for found in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if found.name[0] == "_":
            continue
        try:
            modules.append(importlib.import_module(f"{package}.{found.name}"))
        except (ImportError, SyntaxError, NameError, AttributeError, LookupError, TypeError, ValueError) as error:
            failed += f"; {package}.{found.name} cannot be imported ({type(error).__name__}: {first_line(error)})"
    return modules, failed


def find_tasks() -> list[Any]:
    """Return the dataclasses of all tasks: those in their modules whose first field is `task`."""
    return [
        kind
        for module in load_modules(TASKS)[0]
        for kind in vars(module).values()
        if isinstance(kind, type) and kind.__module__ == module.__name__ and dataclasses.is_dataclass(kind)
        if dataclasses.fields(kind) and dataclasses.fields(kind)[0].name == "task"
    ]


def read_task(value: Any, path: str) -> Any:
    """Return the settings of a task as its dataclass.

    Raises:
        ValueError: naming the key, what was found and what was wanted.
    """
    kinds = tuple(find_tasks())
    if isinstance(value, kinds):
        return value
    try:
        return parse_tagged(value, kinds, path)
    except ValueError as error:
        raise ValueError(f"{error}{load_modules(TASKS)[1]}") from None


def find_presets() -> Mapping[str, tuple[Fields, ...]]:
    """Return the maps of all presets by name: the tables `PRESETS` of their modules."""
    return {name: maps for module in load_modules(PRESETS)[0] for name, maps in getattr(module, "PRESETS", {}).items()}


def read_format(value: Any, path: str) -> str:
    """Return the name of a format, or raise a ValueError that lists them."""
    names = (*FORMATS, *sorted(find_presets()))
    name: str = parse(value, str, path)
    if name not in names:
        failed = load_modules(PRESETS)[1]
        raise ValueError(f"{path}: found {name!r:.80}, wanted one of {', '.join(names)}{suggest(name, names)}{failed}")
    return name
