"""The rules between the keys of a map of fields, and between a map and the curriculum."""

from collections.abc import Iterable

from coconut.config.field_map import Fields
from coconut.config.messages import kind_of, shown
from coconut.config.methods import find_method, find_methods
from coconut.config.presets import PRESETS, maps_of
from coconut.config.schema import DataConfig, Entry, Source
from coconut.config.templates import check_path, parse_template


def check_fields(source: Source, path: str) -> None:
    """Check the map of a source, or of each form of its preset.

    Raises:
        ValueError: naming the key, what was found and what was wanted.
    """
    for key in ("records", "columns"):
        if getattr(source, key) is not None and (source.file is None or not maps_of(source)):
            raise ValueError(f"{path}.{key}: only beside file, and a format that names fields; take it out")
    if source.format != "fields" and source.format not in PRESETS:
        if source.fields is not None:
            raise ValueError(
                f"{path}.fields: found beside format {source.format}, which knows its fields; take it out, or write"
                " format: fields"
            )
        return
    for fields in maps_of(source):
        _check_map(fields, f"{path}.fields")


def check_train_steps(data: DataConfig, entries: Iterable[Entry]) -> None:
    """Refuse a train split that has no steps by its map, where an entry's method trains on steps.

    Raises:
        ValueError: naming the split and the entry.
    """
    maps = maps_of(data.train)
    if not maps or any(fields.steps is not None for fields in maps):
        return
    for entry in entries:
        if find_method(entry.method).shows_steps:
            others = [name for name, method in find_methods().items() if not method.shows_steps]
            raise ValueError(
                f"data.train.fields.steps: none with format {data.train.format}, but curriculum.{entry.name} trains by"
                f" method {entry.method}, which needs the steps of an example; name their field, or use the set as"
                f" valid or test only, or methods {' and '.join(others)} only"
            )


def _check_map(fields: Fields, path: str) -> None:
    for key in ("question", "answer"):
        if getattr(fields, key) is None:
            raise ValueError(f"{path}.{key}: missing; name the field that holds it, or a template of several")
    for name in fields.where or {}:
        if not isinstance(name, str):
            raise ValueError(f"{path}.where: key {name!r} is {kind_of(name)}, wanted the name of a field; quote it")
    templates = [(key, getattr(fields, key)) for key in ("question", "answer", "steps")]
    paths = [("choices", fields.choices), ("group", fields.group), *(("where", name) for name in fields.where or {})]
    for check, values in ((parse_template, templates), (check_path, paths)):
        for key, value in values:
            try:
                if value is not None:
                    check(value)
            except ValueError as error:
                raise ValueError(f"{path}.{key}: {error}") from None
    _check_steps(fields, path)
    _check_answer(fields, path)


def _check_steps(fields: Fields, path: str) -> None:
    if fields.steps is None and fields.split_steps is not None:
        raise ValueError(
            f"{path}.split_steps: found {fields.split_steps}, but steps is none; name the field of the steps"
        )
    if (fields.split_steps == "separator") != (fields.separator is not None):
        raise ValueError(f"{path}.separator: wanted beside split_steps: separator, and only there")
    for key in ("separator", "answer_after", "answer_before"):
        if getattr(fields, key) == "":
            raise ValueError(f"{path}.{key}: found an empty text, wanted at least one character")
    if fields.steps is not None and fields.split_steps in (None, "list") and "{" in fields.steps:
        raise ValueError(
            f"{path}.steps: found the template {shown(fields.steps)}, which gives one text, wanted the name of a field"
            " that holds a list, or split_steps: sentences, chain, notes or separator"
        )


def _check_answer(fields: Fields, path: str) -> None:
    if fields.choices is None:
        for key in ("answer_names", "answer_as"):
            if getattr(fields, key) is not None:
                raise ValueError(f"{path}.{key}: only beside choices; name the field of the choices, or take it out")
    elif fields.booleans is not None:
        raise ValueError(f"{path}.booleans: not beside choices, which an answer names by letter, text or index")
    if fields.answer_names == "one_hot" and "{" in str(fields.answer):
        raise ValueError(
            f"{path}.answer: found the template {shown(fields.answer)}, which gives one text, wanted the name of a"
            " field that holds a list, as answer_names: one_hot says"
        )
