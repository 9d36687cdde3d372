"""Strict parsing of plain values (from YAML) by type: what is missing, unknown or of another type is an error.

The type is an annotation: a frozen dataclass (a mapping with exactly its fields), `Literal`, `X | None`, `Mapping`,
`tuple[X, ...]` (a list), `Annotated` with a `Range`, a `Word` or a `ReadBy`, or one of `int`, `float`, `bool`, `str`.
Of a union of dataclasses, the first field says which one a mapping is.
"""

import collections.abc
import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from coconut.config.messages import key_shown as key_shown
from coconut.config.messages import kind_of as kind_of
from coconut.config.messages import shown as shown
from coconut.config.messages import suggest as suggest
from coconut.config.yaml_reader import find_merge as find_merge
from coconut.config.yaml_reader import parse_yaml as parse_yaml
from coconut.config.yaml_reader import read_yaml as read_yaml

MAX_COUNT = 10**9
"""Upper bound of numbers that count something, far above any that can be used."""


@dataclass(frozen=True)
class Range:
    """Bounds of a number, both included."""

    low: float
    high: float = math.inf

    def describe(self, number: float) -> str:
        """Say what was wanted in place of a number that is out of bounds."""
        if self.high not in (math.inf, MAX_COUNT):
            return f"between {self.low:g} and {self.high:g}"
        return f"at least {self.low:g}" if number < self.low else f"at most {self.high:g}"


@dataclass(frozen=True)
class Word:
    """The word that stands for None in a file: DVC leaves `null` blank when it writes the file again."""

    text: str


@dataclass(frozen=True)
class ReadBy:
    """A function of a value and its path that checks the value, of a type that only a running program knows."""

    read: Callable[[Any, str], Any]


class _Missing:
    pass


MISSING: Any = _Missing()
"""In place of the value of a key that is not there."""


def _expect_value(value: Any, path: str) -> None:
    if value is MISSING:
        raise ValueError(f"{path}: missing; add the key, recipes/default.yaml shows every one of them")


def missing_keys(tree: Any, kind: Any, path: str) -> Iterator[str]:
    """Yield the required keys that a mapping, and the dataclasses below it, lack."""
    if not (dataclasses.is_dataclass(kind) and isinstance(tree, Mapping)):
        return
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        place = f"{path}.{field.name}" if path else field.name
        if field.name in tree:
            yield from missing_keys(tree[field.name], hints[field.name], place)
        elif field.default is field.default_factory is dataclasses.MISSING:
            yield place


def expect_mapping(value: Any, path: str) -> None:
    _expect_value(value, path)
    if not isinstance(value, Mapping):
        raise ValueError(f"{path}: found {kind_of(value)}, wanted a mapping of keys to values")


def check_keys(value: Mapping[Any, Any], known: collections.abc.Collection[str], path: str) -> None:
    """Raise a ValueError that names the first key which is not known."""
    for key in value:
        if key not in known:
            place = f"{path}.{key_shown(key)}" if path else key_shown(key)
            raise ValueError(f"{place}: unknown key; known here: {', '.join(known)}{suggest(key, known)}")


def parse(value: Any, kind: Any, path: str) -> Any:
    """Check `value` against the annotation `kind` and return it in that type.

    Raises:
        ValueError: naming the key, what was found and what was wanted.
    """
    _expect_value(value, path)
    if kind is Any:
        return value
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _parse_union(value, kind, path)
    if origin is Annotated:
        return _parse_annotated(value, kind, path)
    if origin is Literal:
        return _parse_choice(value, typing.get_args(kind), path)
    if origin is collections.abc.Mapping:
        expect_mapping(value, path)
        return {key: parse(item, typing.get_args(kind)[1], f"{path}.{key}") for key, item in value.items()}
    if origin is tuple:
        return _parse_list(value, typing.get_args(kind)[0], path)
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, typing.cast(type, kind)) else _parse_dataclass(value, kind, path)
    return _parse_scalar(value, kind, path)


def _parse_annotated(value: Any, kind: Any, path: str) -> Any:
    base, rule = typing.get_args(kind)
    if isinstance(rule, ReadBy):
        return rule.read(value, path)
    if isinstance(rule, Range):
        number = parse(value, base, path)
        if not rule.low <= number <= rule.high:
            raise ValueError(f"{path}: found {shown(number)}, wanted {rule.describe(number)}")
        return number
    assert isinstance(rule, Word)
    if value == rule.text:
        return None
    try:
        return parse(value, base, path)
    except ValueError as error:
        # Of a mapping the error names a key in it, in whose place the word is not wanted.
        raise error if isinstance(value, Mapping) else ValueError(f"{error}, or {rule.text}") from None


def _parse_choice(value: Any, choices: tuple[Any, ...], path: str) -> Any:
    if value not in choices:
        raise ValueError(f"{path}: found {shown(value)}, wanted one of {', '.join(choices)}{suggest(value, choices)}")
    return value


def _parse_list(value: Any, kind: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple) or not value:
        found = "an empty list" if isinstance(value, list | tuple) else kind_of(value)
        raise ValueError(f"{path}: found {found}, wanted a list of values")
    return tuple(parse(item, kind, f"{path}[{i}]") for i, item in enumerate(value))


def _parse_dataclass(value: Any, kind: Any, path: str) -> Any:
    expect_mapping(value, path or "the file")
    hints = typing.get_type_hints(kind, include_extras=True)
    check_keys(value, hints, path)
    prefix = f"{path}." if path else ""
    return kind(
        **{
            field.name: parse(value.get(field.name, MISSING), hints[field.name], prefix + field.name)
            for field in dataclasses.fields(kind)
            if field.name in value or (field.default is field.default_factory is dataclasses.MISSING)
        }
    )


def _parse_union(value: Any, kind: Any, path: str) -> Any:
    members = typing.get_args(kind)
    if value is None and type(None) in members:
        return None
    members = tuple(member for member in members if member is not type(None))
    if len(members) > 1 and all(map(dataclasses.is_dataclass, members)):
        return parse_tagged(value, members, path)
    # A list or a mapping fits one member at most, whose error says more than those of the others.
    members = tuple(member for member in members if _may_hold(member, value)) or members
    errors = []
    for member in members:
        try:
            return parse(value, member, path)
        except ValueError as error:
            errors.append(str(error))
    raise ValueError("; or ".join(errors))


def _may_hold(kind: Any, value: Any) -> bool:
    is_list = typing.get_origin(kind) is tuple
    is_mapping = dataclasses.is_dataclass(kind) or typing.get_origin(kind) is collections.abc.Mapping
    return is_list == isinstance(value, list | tuple) and is_mapping == isinstance(value, Mapping)


def parse_tagged(value: Any, members: tuple[Any, ...], path: str) -> Any:
    """Return a mapping as that one of the dataclasses which its first field names; see `parse`."""
    expect_mapping(value, path)
    tag = dataclasses.fields(members[0])[0].name
    by_choice = {choice: member for member in members for choice in typing.get_args(typing.get_type_hints(member)[tag])}
    choice = parse(value.get(tag, MISSING), Literal[tuple(by_choice)], f"{path}.{tag}")
    return _parse_dataclass(value, by_choice[choice], path)


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
    raise ValueError(f"{path}: found {shown(value)} ({kind_of(value)}), wanted {names[kind]}{_cure(value, kind)}")


def _cure(value: Any, kind: type) -> str:
    if kind is str and value is not None:
        return "; quote it if it is text"
    if kind is int and type(value) is float and value.is_integer() and abs(value) <= MAX_COUNT:
        return f"; write it without a point or exponent: {value:.0f}"
    return ""
