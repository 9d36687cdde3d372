"""Which rows form an update, and at which stage each is shown: the same for every worker, order and resume.

Every draw comes from a generator keyed by (seed, entry, epoch, example), never from a global one.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from coconut.config.methods import blaming_method, build_method
from coconut.config.schema import Entry
from coconut.data.encoded import EncodedSet
from coconut.data.encoding import EncodedExample
from coconut.data.views import View, ViewWriter
from coconut.methods import Row, State
from coconut.training.schedule import Schedule

Order = np.ndarray[Any, np.dtype[np.int64]]
"""Rows of the encoded set, 8 bytes each."""


def epoch_order(num_examples: int, *, seed: int, entry_name: str, epoch: int) -> Order:
    """The permutation of an epoch, a function of its arguments alone."""
    key = random.Random(f"order/{seed}/{entry_name}/{epoch}").getrandbits(64)
    return np.random.Generator(np.random.Philox(key)).permutation(num_examples)


def split_updates(order: Order | Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Cut an epoch into updates; the last one may be smaller."""
    for start in range(0, len(order), batch_size):
        yield [int(row) for row in order[start : start + batch_size]]


class TrainingRow(NamedTuple):
    """A training example as an update shows it."""

    example: EncodedExample
    views: Mapping[str, View]
    """By the method's readings."""
    seed: int
    """Of what the method draws while the row is read."""


def training_rows(
    dataset: EncodedSet,
    rows: Sequence[int],
    *,
    entry: Entry,
    seed: int,
    epoch: int,
    writer: ViewWriter,
    state: State | None = None,
) -> list[TrainingRow]:
    """Return these rows of the encoded set as an epoch shows them, in the order of `rows`.

    Args:
        state: of the entry's method before the update.

    Raises:
        MethodError: the method has failed in its own file.
    """
    method, made = build_method(entry), []
    for row, example in zip(rows, dataset.rows(rows), strict=True):
        draw = random.Random(f"view/{seed}/{entry.name}/{epoch}/{row}")
        with blaming_method(entry.method, "lay out a row"):
            views = method.views(Row(example, draw, method.state_at(0, 1, {}) if state is None else state, writer))
        made.append(TrainingRow(example, views, draw.getrandbits(63)))
    return made


class RowMaker:
    """Makes the rows of a training's updates, and keeps those of the last one that was asked for."""

    def __init__(self, dataset: EncodedSet, entry: Entry, seed: int, writer: ViewWriter, schedule: Schedule) -> None:
        self.dataset, self.entry, self.seed, self.writer, self.schedule = dataset, entry, seed, writer, schedule
        self._made: tuple[tuple[int, ...], list[TrainingRow]] = (), []

    def of(self, rows: Sequence[int], epoch: int, update: int) -> list[TrainingRow]:
        """Return these rows in an update of an epoch; the same list where they were asked for last."""
        key = (epoch, update, *rows)
        if key != self._made[0]:
            made = training_rows(
                self.dataset,
                rows,
                entry=self.entry,
                seed=self.seed,
                epoch=epoch,
                writer=self.writer,
                state=self.schedule.state_at(update),
            )
            self._made = key, made
        return self._made[1]
