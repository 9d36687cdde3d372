"""Strict parsing: YAML, and values by the type of their field."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from coconut.config.schema import ChainedArithmetic, Entry, Generator, Graph, Multiplication
from coconut.config.yaml_reader import parse_yaml as parse_yaml
from coconut.config.yaml_reader import read_yaml as read_yaml

_TASKS: dict[str, type] = {
    "chained_arithmetic": ChainedArithmetic,
    "graph_sentences": Graph,
    "graph_symbols": Graph,
    "multiplication": Multiplication,
}


MISSING_KEY = "{}: missing; add the key, recipes/ shows every one of them"


class _Missing:
    def __repr__(self) -> str:
        return "nothing"


MISSING: Any = _Missing()


def kind_of(value: Any) -> str:
    return {
        dict: "a mapping",
        list: "a list",
        str: "text",
        bool: "true/false",
        int: "a number",
        float: "a number",
        type(None): "null",
        _Missing: "nothing",
    }.get(type(value), type(value).__name__)


def expect_mapping(value: Any, path: str) -> None:
    if value is MISSING:
        raise ValueError(MISSING_KEY.format(path))
    if not isinstance(value, Mapping):
        raise ValueError(f"{path}: found {kind_of(value)}, wanted a mapping of keys to values")


def parse(value: Any, kind: Any, path: str) -> Any:
    """Check `value` against the annotation `kind` and return it in that type."""
    origin = typing.get_origin(kind)
    if value is MISSING:
        raise ValueError(MISSING_KEY.format(path))
    if kind is Generator:
        return _parse_generator(value, path)
    if origin in (typing.Union, types.UnionType):
        return _parse_union(value, kind, path)
    if origin is Annotated:
        base, bounds = typing.get_args(kind)
        number = parse(value, base, path)
        if not bounds.low <= number <= bounds.high:
            raise ValueError(f"{path}: found {number!r}, wanted {bounds}")
        return number
    if origin is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise ValueError(f"{path}: found {value!r}, wanted one of {', '.join(map(str, choices))}")
        return value
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, typing.cast(type, kind)) else _parse_dataclass(value, kind, path)
    if origin is Mapping or origin is typing.get_origin(Mapping[str, Entry]):
        return value
    return _parse_scalar(value, kind, path)


def _parse_dataclass(value: Any, kind: Any, path: str) -> Any:
    expect_mapping(value, path or "the file")
    hints = typing.get_type_hints(kind, include_extras=True)
    prefix = f"{path}." if path else ""
    for key in value:
        if key not in hints:
            raise ValueError(f"{prefix}{key}: unknown key; known here: {', '.join(hints)}")
    arguments = {}
    for field in dataclasses.fields(kind):
        if field.name not in value and field.default is not dataclasses.MISSING:
            continue
        arguments[field.name] = parse(value.get(field.name, MISSING), hints[field.name], prefix + field.name)
    return kind(**arguments)


def _parse_generator(value: Any, path: str) -> Any:
    expect_mapping(value, path)
    task = value.get("task")
    if not isinstance(task, str) or task not in _TASKS:
        raise ValueError(f"{path}.task: found {task!r}, wanted one of {', '.join(_TASKS)}")
    return _parse_dataclass(value, _TASKS[task], path)


def _parse_union(value: Any, kind: Any, path: str) -> Any:
    members = typing.get_args(kind)
    if value is None and type(None) in members:
        return None
    alternatives = [member for member in members if member is not type(None)]
    if set(alternatives) == set(typing.get_args(Generator)):
        return _parse_generator(value, path)
    errors = []
    for member in alternatives:
        try:
            return parse(value, member, path)
        except ValueError as error:
            errors.append(str(error))
    raise ValueError(errors[0] if len(errors) == 1 else "; or ".join(errors))


def _parse_scalar(value: Any, kind: type, path: str) -> Any:
    if kind is float and type(value) in (int, float, str):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    # type(), not isinstance(): True is an int to Python, not to a reader.
    elif type(value) is kind:
        return value
    names = {float: "a finite number", int: "a whole number", str: "text", bool: "true or false"}
    raise ValueError(f"{path}: found {value!r} ({kind_of(value)}), wanted {names[kind]}")
