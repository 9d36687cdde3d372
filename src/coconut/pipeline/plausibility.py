"""Warnings, before anything is trained, of values that are allowed but leave a run without a useful result."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from coconut.config.methods import build_method
from coconut.config.positions import num_layers
from coconut.config.rules import find_here
from coconut.config.schema import BASE, DataConfig, Entry, Params
from coconut.config.thought import check_layers

MOST_LR = {False: 0.05, True: 5e-4}
"""Rates of AdamW above which a training is likely to diverge, of a model with random weights and a pretrained one."""
MIN_SCORED = 100
"""Examples below which an accuracy says little: its 95 % interval spans 20 points."""

NumRows = Mapping[str, int | None]
"""Rows of every split of `DataConfig.splits`; None where they are not known."""


def most_rows(data: DataConfig) -> NumRows:
    """Return the largest number of rows that each split can have, by the parameters alone.

    >>> from coconut.config.params import load_params
    >>> most_rows(load_params().data)
    {'train': 40000, 'valid': 1000, 'test': 2000}
    """
    limits = [limit for limit in (data.train.rows, data.max_train) if limit is not None]
    return {split: source.rows for split, source in data.splits.items()} | {"train": min(limits, default=None)}


def find_warnings(params: Params, num_rows: NumRows) -> list[str]:
    """Return a warning for each value that is too small, or too large, for these numbers of rows."""
    warnings = [*_warnings_about_model(params.model), *warnings_about_splits(params, num_rows)]
    if not params.curriculum:
        warnings.append("curriculum: no entry, so that nothing is trained, and only the model itself is scored")
    for name in params.curriculum:
        warnings += warnings_about_entry(params.curriculum, name, num_rows["train"])
    return warnings + warnings_about_rates(params)


def warnings_about_rates(params: Params) -> list[str]:
    """Return a warning for entries whose learning rate is far above what models of the kind are trained with."""
    folder = find_here(params.model)
    is_pretrained = folder is None or any(folder.glob("*.safetensors"))
    most = MOST_LR[is_pretrained]
    names = [f"{name} ({entry.lr:g})" for name, entry in params.curriculum.items() if entry.lr > most]
    if not names:
        return []
    kind = "a pretrained model" if is_pretrained else "a model"
    return [
        f"curriculum: lr of {', '.join(names)} is high for {kind}, which may forget or diverge;"
        f" {'1e-5 to 3e-4 are' if is_pretrained else '1e-4 to 5e-3 are'} usual"
    ]


def check_model_config(params: Params) -> None:
    """Hold every entry against the config.json of a model that lies here: what a hub's holds is known to `base`.

    Raises:
        ValueError: an entry names a layer that the model lacks.
    """
    folder = find_here(params.model)
    if folder is None or not (folder / "config.json").is_file():
        return
    try:
        layers = num_layers(json.loads((folder / "config.json").read_bytes()))
    except (OSError, ValueError, AttributeError):
        return  # `base` names a file that cannot be read.
    if layers is None:
        return
    for name, entry in params.curriculum.items():
        try:
            check_layers(entry.latent.thought, layers)
            build_method(entry).check_model(layers)
        except ValueError as error:
            raise ValueError(f"curriculum.{name}.{error}") from None


def _warnings_about_model(model: str) -> list[str]:
    folder = find_here(model)
    if folder is None or folder.absolute().is_relative_to(Path("models").absolute()):
        return []
    return [
        f"model: DVC watches only models/ for changes, not {model}; move the folder there, or run `dvc repro -f base`"
        " after each change of its files"
    ]


def warnings_about_splits(params: Params, num_rows: NumRows) -> list[str]:
    """Return a warning for each split that is scored on too few examples."""
    warnings = []
    for split in params.data.test_names:
        num_test, path = _least(num_rows.get(split), params.evaluate.max_examples), params.data.path_of(split)
        if num_test is not None and num_test < MIN_SCORED:
            warnings.append(
                f"{path}: accuracies will be of {num_test} examples at most, and uncertain by"
                f" {98 / math.sqrt(num_test):.0f} points either way; take at least {MIN_SCORED}"
                f" ({path}.rows, evaluate.max_examples)"
            )
    for name, entry in params.curriculum.items():
        num_valid = _least(num_rows["valid"], entry.train.validate_examples)
        used = "select: best" if entry.train.select == "best" else "min_accuracy" if entry.min_accuracy else None
        if used and num_valid is not None and num_valid < MIN_SCORED:
            warnings.append(
                f"curriculum.{name}: {used} goes by {num_valid} validation examples at most, mostly by chance;"
                f" take at least {MIN_SCORED} (data.valid.rows, train.validate_examples)"
            )
    return warnings


def warnings_about_entry(entries: Mapping[str, Entry], name: str, num_train: int | None) -> list[str]:
    """Return a warning if an entry has too few updates for its batches or for its warm-up."""
    if num_train is None:
        return []
    entry, path = entries[name], f"curriculum.{name}"
    per_epoch, num_updates = _count_updates(entry, num_train)
    warnings = []
    if per_epoch == 1:
        warnings.append(
            f"{path}: batch_size {entry.train.batch_size} takes all {num_train} training examples at once, so that an"
            " epoch is one update; lower train.batch_size"
        )
    num_inherited = _count_inherited(entries, entry, num_train)
    if entry.train.warmup_updates >= num_updates + num_inherited:
        inherited = f", after {num_inherited} of the parents whose optimizer it takes over" if num_inherited else ""
        warnings.append(
            f"{path}: ends within the warm-up, and never trains at its lr: warmup_updates is"
            f" {entry.train.warmup_updates}, but it has {num_updates} updates ({entry.epochs} epochs of {per_epoch})"
            f"{inherited}; lower train.warmup_updates or train.batch_size, or train for more epochs"
        )
    return warnings


def _count_updates(entry: Entry, num_train: int) -> tuple[int, int]:
    """Return the updates of one epoch, and of all."""
    per_epoch = -(-num_train // entry.train.batch_size)
    whole = per_epoch * entry.epochs
    return per_epoch, min(whole, entry.max_updates or whole)


def _count_inherited(entries: Mapping[str, Entry], entry: Entry, num_train: int) -> int:
    """Count the updates that the optimizer had done in the entries it is taken over from."""
    num_updates = 0
    while entry.parent != BASE and not entry.train.reset_optimizer:
        entry = entries[entry.parent]
        num_updates += _count_updates(entry, num_train)[1]
    return num_updates


def _least(*numbers: int | None) -> int | None:
    return min((number for number in numbers if number is not None), default=None)
