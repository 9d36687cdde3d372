"""Which rows form an update, and at which stage each is shown: the same for every worker, order and resume.

Every draw comes from a generator keyed by (seed, entry, epoch, example), never from a global one.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from coconut.config.schema import Entry
from coconut.data.curriculum import draw_plan
from coconut.data.mapped import EncodedSet
from coconut.data.views import MarkerIds, View, build_view
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


def training_views(
    dataset: EncodedSet,
    rows: Sequence[int],
    *,
    entry: Entry,
    seed: int,
    epoch: int,
    markers: MarkerIds,
    num_removed_tokens: int = 0,
) -> list[View]:
    """The views of these rows of the encoded set in one epoch, in the order of `rows`.

    Args:
        num_removed_tokens: of `icot`, at this update; see `coconut.data.curriculum.count_removed`.
    """
    fields = dataset[list(rows)]
    views = []
    for row, question_ids, steps_ids, answer_ids in zip(
        rows, fields["question_ids"], fields["steps_ids"], fields["answer_ids"], strict=True
    ):
        generator = random.Random(f"view/{seed}/{entry.name}/{epoch}/{row}")
        plan = draw_plan(entry, len(steps_ids), generator, num_removed_tokens=num_removed_tokens)
        views.append(build_view(question_ids, steps_ids, answer_ids, plan=plan, markers=markers))
    return views


class ViewMaker:
    """Makes the views of a training's updates, and keeps those of the last one that was asked for."""

    def __init__(self, dataset: EncodedSet, entry: Entry, seed: int, markers: MarkerIds, schedule: Schedule) -> None:
        self.dataset, self.entry, self.seed, self.markers, self.schedule = dataset, entry, seed, markers, schedule
        self._made: tuple[tuple[int, ...], list[View]] = (), []

    def of(self, rows: Sequence[int], epoch: int, update: int) -> list[View]:
        """Return the views of these rows in an update of an epoch; the same list where they were asked for last."""
        key = (epoch, update, *rows)
        if key != self._made[0]:
            views = training_views(
                self.dataset,
                rows,
                entry=self.entry,
                seed=self.seed,
                epoch=epoch,
                markers=self.markers,
                num_removed_tokens=self.schedule.num_removed(update),
            )
            self._made = key, views
        return self._made[1]


def longest_reasoning(dataset: EncodedSet, rows: Sequence[int]) -> int:
    """Tokens of the longest chain of steps among these rows, nothing removed."""
    return max((sum(map(len, steps_ids)) for steps_ids in dataset[list(rows)]["steps_ids"]), default=0)


def removes_more(schedule: Schedule, update: int, dataset: EncodedSet, rows: Sequence[int]) -> bool:
    """Say whether an update of `icot` is the first that removes more of what its rows still showed.

    The optimiser then starts with fresh moments. The learning rate does not warm up again: at a few tokens per epoch
    it would never be warm.

    Source: Deng et al. 2024 (arXiv:2405.14838), section 3.
    """
    before = schedule.num_removed_before(update)
    return schedule.num_removed(update) > before and longest_reasoning(dataset, rows) > before
