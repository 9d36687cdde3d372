"""`params.yaml`, read and checked: the rules between keys."""

import dataclasses
import re
import typing
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from coconut.config.schema import BASE, LATENT_METHODS, Entry, Generator, LatentConfig, Params, Source, TrainConfig
from coconut.config.strict import MISSING, expect_mapping, kind_of, parse, read_yaml
from coconut.config.thought import parse_thought

# --- parsing --------------------------------------------------------------------------------

_ENTRY_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,99}")
_ENTRY_OPTIONS = {"min_accuracy", "max_updates", "icot_tokens_per_epoch", "icot_smoothing", "icot_remove_all_at"}
_ENTRY_REQUIRED = ("parent", "method", "latent_stage", "epochs", "lr")


def load_params(path: Path | str = "params.yaml") -> Params:
    """Read and check the whole file.

    Raises:
        ValueError: naming the file, the key, what was found and what was wanted.
    """
    tree = read_yaml(Path(path))
    try:
        return parse_params(tree)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_params(tree: Any) -> Params:
    """Turn the parsed YAML of a params file into `Params`; see `load_params`."""
    expect_mapping(tree, "the file")
    latent = parse(tree.get("latent", MISSING), LatentConfig, "latent")
    train = parse(tree.get("train", MISSING), TrainConfig, "train")
    curriculum = _parse_curriculum(tree.get("curriculum", MISSING), latent, train)
    plain = {**tree, "latent": latent, "train": train, "curriculum": curriculum}
    params: Params = parse(plain, Params, "")
    if not params.data.raw_dir.strip():
        raise ValueError("data.raw_dir: found an empty text, wanted a folder, such as data/raw")
    sources = (params.data.train, params.data.valid, params.data.test)
    for split, source in zip(("train", "valid", "test"), sources, strict=True):
        _check_source(source, f"data.{split}", params.data.generator)
    return params


def _parse_curriculum(tree: Any, latent: LatentConfig, train: TrainConfig) -> dict[str, Entry]:
    expect_mapping(tree, "curriculum")
    if not tree:
        raise ValueError("curriculum: found no entry, wanted at least one")
    entries = {}
    for name, fields in tree.items():
        if not isinstance(name, str):
            raise ValueError(
                f"curriculum: key {name!r} is {kind_of(name)}, wanted text"
                f' (DVC silently drops such entries); quote it and start with a letter: "stage_{name}"'
            )
        if not _ENTRY_NAME.fullmatch(name) or name in (BASE, "report", "logs", "evaluations", "overnight"):
            raise ValueError(
                f"curriculum.{name}: not a usable name; wanted letters, digits, '_' and '-', starting with"
                " a letter, and not base, report, logs, evaluations or overnight: it becomes a folder below outputs/"
            )
        entries[name] = _parse_entry(fields, name, latent, train)
    _check_tree(entries)
    return entries


def _parse_entry(fields: Any, name: str, latent: LatentConfig, train: TrainConfig) -> Entry:
    path = f"curriculum.{name}"
    expect_mapping(fields, path)
    latent_keys = {field.name for field in dataclasses.fields(LatentConfig)}
    train_keys = {field.name for field in dataclasses.fields(TrainConfig)}
    known = [*_ENTRY_REQUIRED, *sorted(_ENTRY_OPTIONS), *sorted(latent_keys), *sorted(train_keys)]
    for key in fields:
        if key not in known:
            raise ValueError(f"{path}.{key}: unknown key; known here: {', '.join(known)}")
    own = {key: fields.get(key) for key in _ENTRY_OPTIONS}
    own |= {key: fields.get(key, MISSING) for key in _ENTRY_REQUIRED}
    overrides = {
        section: dataclasses.asdict(section) | {key: fields[key] for key in keys & fields.keys()}
        for section, keys in ((latent, latent_keys), (train, train_keys))
    }
    return typing.cast(
        Entry,
        parse(
            own
            | {
                "name": name,
                "latent": parse(overrides[latent], LatentConfig, path),
                "train": parse(overrides[train], TrainConfig, path),
            },
            Entry,
            path,
        ),
    )


def _check_tree(entries: Mapping[str, Entry]) -> None:
    for name, entry in entries.items():
        if entry.parent != BASE and entry.parent not in entries:
            raise ValueError(
                f"curriculum.{name}.parent: found {entry.parent!r}, wanted {BASE!r} or an entry: {', '.join(entries)}"
            )
    for name, entry in entries.items():
        _check_lineage(entries, name)
        _check_stage(entry, None if entry.parent == BASE else entries[entry.parent])


def _check_lineage(entries: Mapping[str, Entry], name: str) -> None:
    lineage = [name]
    while (parent := entries[lineage[-1]].parent) != BASE:
        if parent in lineage:
            raise ValueError(
                f"curriculum.{name}.parent: a cycle, {' <- '.join([*lineage, parent])}; let one of them start from base"
            )
        lineage.append(parent)


def _check_stage(entry: Entry, parent: Entry | None) -> None:
    path = f"curriculum.{entry.name}"
    try:
        parse_thought(entry.latent.thought)
    except ValueError as error:
        raise ValueError(f"{path}.{error}") from None
    if entry.method == "icot" and (entry.icot_tokens_per_epoch is None or entry.icot_smoothing is None):
        raise ValueError(f"{path}: method icot needs icot_tokens_per_epoch and icot_smoothing; add both")
    icot_keys = ("icot_tokens_per_epoch", "icot_smoothing", "icot_remove_all_at")
    if entry.method != "icot" and any(given := [key for key in icot_keys if getattr(entry, key) is not None]):
        raise ValueError(f"{path}.{given[0]}: only for method icot, found method {entry.method}; take it out")
    if entry.method == "icot" and entry.train.select != "last":
        raise ValueError(
            f"{path}.select: found {entry.train.select!r}, wanted 'last' with method icot,"
            " whose early epochs are scored with more of the reasoning left"
        )
    if entry.method not in LATENT_METHODS:
        if entry.latent_stage != 0:
            raise ValueError(f"{path}.latent_stage: found {entry.latent_stage}, wanted 0 with method {entry.method}")
        return
    if parent is not None and entry.latent_stage < parent.latent_stage:
        raise ValueError(
            f"{path}.latent_stage: found {entry.latent_stage}, wanted at least {parent.latent_stage},"
            f" the stage of its parent {parent.name!r}"
        )


def _check_source(source: Source, path: str, generator: Generator | None) -> None:
    if source.format != "generated":
        if (source.file is None) == (source.hub is None):
            raise ValueError(f"{path}: wanted exactly one of file (below data.raw_dir) and hub, found both or none")
        if source.file is not None and not _stays_below(source.file):
            raise ValueError(
                f"{path}.file: found {source.file!r}, wanted a path below data.raw_dir, which DVC watches for changes;"
                " move the file there, or set data.raw_dir to its folder"
            )
        if source.hub is not None and source.hub_split is None:
            raise ValueError(f"{path}.hub_split: missing; name the split of {source.hub} to read, such as train")
        return
    if generator is None:
        raise ValueError(f"{path}.format: found 'generated', but data.generator is null; give it a task")
    if source.rows is None:
        raise ValueError(f"{path}.rows: found null, wanted the number of examples to generate")
    if source.file is not None or source.hub is not None:
        raise ValueError(f"{path}: found a file or hub beside format 'generated', which reads none; take it out")


def _stays_below(file: str) -> bool:
    path = PurePath(file)
    return not path.is_absolute() and ".." not in path.parts
