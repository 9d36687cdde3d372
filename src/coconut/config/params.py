"""`params.yaml`, read and checked."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coconut.config.methods import find_method, find_methods
from coconut.config.rules import (
    check_curriculum,
    check_data,
    check_entry_names,
    check_reference,
    check_samples,
    check_set_names,
    check_train_steps,
)
from coconut.config.schema import Entry, LatentConfig, Params, TrainConfig
from coconut.config.strict import MISSING, check_keys, expect_mapping, key_shown, missing_keys, parse, read_yaml

_REQUIRED = ("parent", "method", "latent_stage", "epochs", "lr")
_OPTIONAL = ("min_accuracy", "max_updates")
_LATENT = tuple(field.name for field in dataclasses.fields(LatentConfig))
_TRAIN = tuple(field.name for field in dataclasses.fields(TrainConfig))
REMOVED = {"runtime.fork_server": "every stage imports torch and transformers for itself now"}
"""Keys that a section had once, and what became of them."""


def load_params(path: Path | str = "params.yaml") -> Params:
    """Read and check the whole file.

    Raises:
        ValueError: naming the file, the key, what was found and what was wanted.
    """
    tree = read_yaml(Path(path))
    try:
        if isinstance(tree, Mapping):
            _refuse_older(tree)
        return parse_params(tree)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_params(tree: Any) -> Params:
    """Turn the parsed YAML of a params file into `Params`; see `load_params`."""
    expect_mapping(tree, "the file")
    tree = {section: _without_removed(section, keys) for section, keys in tree.items()}
    data = _with_named_tests(tree.get("data", MISSING))
    _refuse_missing(tree if data is MISSING else {**tree, "data": data})
    latent = parse(tree.get("latent", MISSING), LatentConfig, "latent")
    train = parse(tree.get("train", MISSING), TrainConfig, "train")
    curriculum = _parse_curriculum(tree.get("curriculum", MISSING), latent, train)
    params: Params = parse(
        {**tree, "data": data, "latent": latent, "train": train, "curriculum": curriculum}, Params, ""
    )
    check_curriculum(params.curriculum)
    check_data(params.data)
    check_samples(params.evaluate)
    check_set_names(params.evaluate, params.data.tests)
    check_train_steps(params.data, params.curriculum.values())
    check_reference(params)
    return params


def _refuse_missing(tree: Mapping[str, Any]) -> None:
    """Name all missing keys at once; one alone is found, and named, where it is parsed."""
    missing = list(missing_keys(tree, Params, ""))
    entries = tree.get("curriculum")
    entries = entries if isinstance(entries, Mapping) else {}
    check_entry_names(entries)
    for name, fields in entries.items():
        if isinstance(fields, Mapping):
            missing += [f"curriculum.{key_shown(name)}.{key}" for key in _REQUIRED if key not in fields]
    if len(missing) > 1:
        raise ValueError(f"{', '.join(missing)}: missing; add the keys, recipes/default.yaml shows every one of them")


def _refuse_older(tree: Mapping[str, Any]) -> None:
    """Refuse, in the work tree, what experiments of before may hold, which can still be compared."""
    if "report" not in tree:  # DVC needs it.
        raise ValueError("report: missing; add the section, with the line `reference: auto` in it")
    for key, fate in REMOVED.items():
        section, _, name = key.partition(".")
        if isinstance(tree.get(section), Mapping) and name in tree[section]:
            raise ValueError(f"{key}: removed, {fate}; take it out")


def _without_removed(section: str, keys: Any) -> Any:
    if not isinstance(keys, Mapping):
        return keys
    return {key: value for key, value in keys.items() if f"{section}.{key}" not in REMOVED}


def find_former(path: Path | str = "params.yaml") -> list[str]:
    """Say how keys are written now that a file holds in an older form, which still loads."""
    data = read_yaml(Path(path)).get("data")
    if not isinstance(data, Mapping) or "test" not in data:
        return []
    return [
        "data.test: one test set, as files were written before there were several; write `tests: {test: ...}` in its"
        " place, with the same values"
    ]


def _with_named_tests(data: Any) -> Any:
    """Take the one test set of an older file for the only set, by the name `test`."""
    if not isinstance(data, Mapping) or "test" not in data:
        return data
    if "tests" in data:
        raise ValueError("data.test: found beside data.tests, which holds all test sets; move it there, or take it out")
    return {key: value for key, value in data.items() if key != "test"} | {"tests": {"test": data["test"]}}


def _parse_curriculum(tree: Any, latent: LatentConfig, train: TrainConfig) -> dict[str, Entry]:
    expect_mapping(tree, "curriculum")
    check_entry_names(tree)
    return {name: _parse_entry(fields, name, latent, train) for name, fields in tree.items()}


def _parse_entry(fields: Any, name: str, latent: LatentConfig, train: TrainConfig) -> Entry:
    """Read an entry, which may hold any key of `latent` and `train` in place of the section's value."""
    path = f"curriculum.{name}"
    expect_mapping(fields, path)
    own = _method_keys(fields, path)
    known = [*_REQUIRED, *_OPTIONAL, *own, *sorted(_LATENT), *sorted(_TRAIN)]
    for key in [key for key in fields if key not in known]:
        _refuse_key_of_another(key, fields["method"], path)
    check_keys(fields, known, path)
    own_latent = dataclasses.asdict(latent) | {key: fields[key] for key in _LATENT if key in fields}
    own_train = dataclasses.asdict(train) | {key: fields[key] for key in _TRAIN if key in fields}
    tree = {
        "name": name,
        **{key: fields.get(key, MISSING) for key in _REQUIRED},
        **{key: fields.get(key) for key in _OPTIONAL},
        "latent": parse(own_latent, LatentConfig, path),
        "train": parse(own_train, TrainConfig, path),
        "keys": parse({key: fields[key] for key in own if key in fields}, find_method(fields["method"]).Keys, path),
    }
    entry: Entry = parse(tree, Entry, path)
    return entry


def _method_keys(fields: Mapping[str, Any], path: str) -> list[str]:
    """Return the names of the keys that an entry's method has of its own."""
    method = parse(fields.get("method", MISSING), str, f"{path}.method")
    try:
        return [field.name for field in dataclasses.fields(find_method(method).Keys)]
    except ValueError as error:
        raise type(error)(f"{path}.{error}") from None


def _refuse_key_of_another(key: Any, method: str, path: str) -> None:
    owners = [
        name for name, kind in find_methods().items() if key in (field.name for field in dataclasses.fields(kind.Keys))
    ]
    if owners:
        raise ValueError(f"{path}.{key}: only for method {' or '.join(owners)}, found method {method}; take it out")
