"""The rules between the keys of `params.yaml`; a value by itself is checked by its type in `coconut.config.schema`."""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

from coconut.config.extensions import find_presets
from coconut.config.field_map import Fields
from coconut.config.methods import build_method, find_method, find_methods
from coconut.config.presets import maps_of
from coconut.config.schema import BASE, DataConfig, Entry, EvaluateConfig, Params, Source
from coconut.config.strict import key_shown, kind_of, shown, suggest
from coconut.config.templates import check_path, parse_template
from coconut.config.thought import parse_thought

_ENTRY_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,99}")
_TAKEN = (BASE, "report", "logs", "code", "evaluations", "probes", "overnight")
"""Other folders below `outputs/`."""
_NO_TESTS = ("train", "valid", "samples")
"""Other names of files and metrics."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(?:/[A-Za-z0-9][\w.-]{0,95})?")


# --- the curriculum -------------------------------------------------------------------------


def check_entry_names(names: Collection[Any]) -> None:
    """Refuse names that DVC drops or that cannot be folders side by side."""
    for name in names:
        if not isinstance(name, str):
            raise ValueError(
                f"curriculum: key {name!r} is {kind_of(name)}, wanted text"
                f' (DVC silently drops such entries); quote it and start with a letter: "stage_{name}"'
            )
    _check_names(
        names, "curriculum", taken=_TAKEN, becomes="a folder below outputs/", kept_in="one folder below outputs/"
    )


def _check_names(names: Iterable[Any], path: str, *, taken: tuple[str, ...], becomes: str, kept_in: str) -> None:
    """Refuse names that are no files side by side on every disk."""
    seen: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str) or not _ENTRY_NAME.fullmatch(name) or name.lower() in taken:
            raise ValueError(
                f"{path}.{key_shown(name)}: not a usable name; wanted letters, digits, '_' and '-', starting with"
                f" a letter, and not {', '.join(taken[:-1])} or {taken[-1]}: it becomes {becomes}"
            )
        if name.lower() in seen:
            raise ValueError(
                f"{path}.{name}: differs from {seen[name.lower()]} only in upper and lower case, wanted another"
                f" name: some disks keep both in {kept_in}"
            )
        seen[name.lower()] = name


def check_curriculum(entries: Mapping[str, Entry]) -> None:
    """Check that the parents make a tree from `base`, and each entry's keys against each other."""
    for name, entry in entries.items():
        if entry.parent != BASE and entry.parent not in entries:
            raise ValueError(
                f"curriculum.{name}.parent: found {shown(entry.parent)}, wanted {BASE!r} or an entry:"
                f" {', '.join(entries)}{suggest(entry.parent, [BASE, *entries])}"
            )
    for name, entry in entries.items():
        _check_lineage(entries, name)
        _check_thought_and_method(entry)
        _check_stage(entry, None if entry.parent == BASE else entries[entry.parent])


def _check_lineage(entries: Mapping[str, Entry], name: str) -> None:
    lineage = [name]
    while (parent := entries[lineage[-1]].parent) != BASE:
        if parent in lineage:
            raise ValueError(
                f"curriculum.{name}.parent: a cycle, {' <- '.join([*lineage, parent])}; let one of them start from base"
            )
        lineage.append(parent)


def _check_thought_and_method(entry: Entry) -> None:
    try:
        parse_thought(entry.latent.thought)
        build_method(entry).check(entry)
    except ValueError as error:
        raise ValueError(f"curriculum.{entry.name}.{error}") from None


def _check_stage(entry: Entry, parent: Entry | None) -> None:
    path = f"curriculum.{entry.name}.latent_stage"
    if not build_method(entry).has_stages:
        if entry.latent_stage != 0:
            raise ValueError(f"{path}: found {entry.latent_stage}, wanted 0 with method {entry.method}")
    elif parent is not None and entry.latent_stage < parent.latent_stage:
        raise ValueError(
            f"{path}: found {entry.latent_stage}, wanted at least {parent.latent_stage},"
            f" the stage of its parent {parent.name!r}"
        )


def check_reference(params: Params) -> None:
    """Check that the entry that a page is to be about is one of the curriculum.

    Raises:
        ValueError: naming the entries.
    """
    reference = params.report.reference
    if reference is not None and reference not in params.curriculum:
        raise ValueError(
            f"report.reference: found {shown(reference)}, wanted auto or an entry of the curriculum:"
            f" {', '.join(params.curriculum)}{suggest(reference, list(params.curriculum))}"
        )


# --- the data -------------------------------------------------------------------------------


def check_data(data: DataConfig) -> None:
    """Check that each split has one place to come from, and one that DVC watches for changes."""
    if not data.raw_dir.strip():
        raise ValueError("data.raw_dir: found an empty text, wanted a folder, such as data/raw")
    _check_names(
        data.tests, "data.tests", taken=_NO_TESTS, becomes="the name of a file and of a metric", kept_in="one file"
    )
    if not data.tests:
        raise ValueError("data.tests: found no set, wanted at least one; the first one is shown first")
    for split, source in data.splits.items():
        path = data.path_of(split)
        check_fields(source, path)
        if source.format == "generated":
            _check_generated(source, path, data)
            continue
        if source.generator is not None:
            raise ValueError(f"{path}.generator: found beside format {source.format}, which reads rows; take it out")
        if (source.file is None) == (source.hub is None):
            raise ValueError(f"{path}: wanted exactly one of file (below data.raw_dir) and hub, found both or none")
        if source.file is not None:
            _check_file(source.file, f"{path}.file", data.raw_dir)
        if source.hub is not None:
            _check_hub(source.hub, f"{path}.hub")
            if source.hub_split is None:
                raise ValueError(f"{path}.hub_split: missing; name the split of {source.hub} to read, such as train")


def check_samples(evaluate: EvaluateConfig) -> None:
    """Check the keys of sampling against each other.

    Raises:
        ValueError: naming the key.
    """
    if not evaluate.samples:
        return
    if evaluate.thought_noise == "dropout" and not evaluate.noise_scale < 1:
        raise ValueError(
            f"evaluate.noise_scale: found {evaluate.noise_scale:g}, wanted less than 1 with thought_noise dropout, of"
            " which it is the probability"
        )
    if evaluate.temperature == 0 and (evaluate.thought_noise == "none" or evaluate.noise_scale == 0):
        raise ValueError(
            "evaluate.temperature: found 0 without noise on thoughts, so that all samples would be the same; raise it,"
            " or set thought_noise and noise_scale"
        )


def check_set_names(evaluate: EvaluateConfig, tests: Iterable[str]) -> None:
    """Check that what is said of a test set is said of one that there is.

    Raises:
        ValueError: naming the key and the sets.
    """
    for key, values in (("expected", evaluate.expected), ("answer_rules", evaluate.answer_rules)):
        for name in values or {}:
            if name not in tests:
                raise ValueError(
                    f"evaluate.{key}.{key_shown(name)}: no such test set, wanted one of data.tests:"
                    f" {', '.join(tests)}{suggest(name, list(tests))}"
                )


def _check_generated(source: Source, path: str, data: DataConfig) -> None:
    if data.generator is None and source.generator is None:
        raise ValueError(f"{path}.format: found 'generated', but data.generator is none; give it a task")
    if source.rows is None:
        raise ValueError(f"{path}.rows: found all, wanted the number of examples to generate")
    if source.file is not None or source.hub is not None:
        raise ValueError(f"{path}: found a file or hub beside format 'generated', which reads none; take it out")


def _check_file(file: str, path: str, raw_dir: str) -> None:
    pure = PurePath(file)
    for folder in (PurePath(raw_dir), Path(raw_dir).absolute()):
        if folder.parts and pure.is_relative_to(folder) and not find_here(f"{raw_dir}/{file}"):
            raise ValueError(
                f"{path}: found {shown(file)}, which begins with data.raw_dir, below which it is looked up;"
                f" did you mean {key_shown(pure.relative_to(folder))}?"
            )
    if pure.is_absolute() or ".." in pure.parts:
        raise ValueError(
            f"{path}: found {shown(file)}, wanted a path below data.raw_dir, which DVC watches for changes;"
            " move the file there, or set data.raw_dir to its folder"
        )


def _check_hub(hub: str, path: str) -> None:
    if find_here(hub):
        raise ValueError(
            f"{path}: found {shown(hub)}, which is a file or folder here, wanted the id of a data set on the hub:"
            " DVC watches only data.raw_dir for changes; put the data there and name the file with file:"
        )
    if not _HUB_ID.fullmatch(hub):
        raise ValueError(
            f"{path}: found {shown(hub)}, wanted the id of a data set on the hub, such as openai/gsm8k;"
            " data of your own belongs below data.raw_dir, named with file:"
        )


def find_here(name: str) -> Path | None:
    """Return the file or folder of this machine that a name leads to, if there is one."""
    try:
        path = Path(name).expanduser()
        return path if name and path.exists() else None
    except (OSError, RuntimeError, ValueError):  # Too long, or of no user's home, or not a path at all.
        return None


# --- the maps of fields ---------------------------------------------------------------------


def check_fields(source: Source, path: str) -> None:
    """Check the map of a source, or of each form of its preset.

    Raises:
        ValueError: naming the key, what was found and what was wanted.
    """
    for key in ("records", "columns"):
        if getattr(source, key) is not None and (source.file is None or not maps_of(source)):
            raise ValueError(f"{path}.{key}: only beside file, and a format that names fields; take it out")
    if source.format != "fields" and source.format not in find_presets():
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
