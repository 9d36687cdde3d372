"""Synthetic tasks as endless, seeded streams of distinct examples."""

import importlib
import random
from collections.abc import Callable, Collection, Iterator
from itertools import islice

from coconut.config.schema import Generator
from coconut.data.examples import Example, fold

MAX_REPEATS = 2_000
"""Number of consecutive draws that may repeat earlier ones before a task of unknown size counts as used up."""

_Draw = Callable[[random.Random], Example]


def generate(
    config: Generator, num_examples: int, *, seed: int | str, start: int = 0, taken: Collection[str] = frozenset()
) -> list[Example]:
    """Draw examples whose questions all differ.

    The first n of a longer list are the list of n: asking for more examples never changes earlier ones.

    Args:
        seed: Identifies the stream.
        start: Number of examples that are skipped at the beginning of the stream.
        taken: Questions (with white space folded) that are left out of the rest of the stream.

    Raises:
        ValueError: Fewer than `num_examples` distinct questions exist.
    """
    check_size(config, start + num_examples)
    num_distinct, draw = _task(config)
    stream = islice(_distinct(draw, random.Random(seed), num_distinct), start, None)
    examples = list(islice((example for example in stream if fold(example.question) not in taken), num_examples))
    if len(examples) < num_examples:
        how = "in the task" if num_distinct else f"before {MAX_REPEATS} draws in a row repeated one"
        beyond = f" beyond the first {start} and the {len(taken)} of other splits" if start or taken else ""
        raise ValueError(
            f"data.generator: {num_examples} distinct questions asked for, but only {len(examples)} turned up"
            f" {how}{beyond} ({config}); ask for fewer rows, or enlarge the task"
        )
    return examples


def check_size(config: Generator, num_examples: int) -> None:
    """Check that a task has enough distinct questions for all splits together, if their number is known.

    Raises:
        ValueError: It has not.
    """
    num_distinct, _ = _task(config)
    if num_distinct is not None and num_examples > num_distinct:
        raise ValueError(
            f"data.generator: {num_examples} distinct questions asked for all splits together, but {config} has only"
            f" {num_distinct}; ask for fewer rows, or enlarge the task"
        )


def _distinct(draw: _Draw, rng: random.Random, num_distinct: int | None) -> Iterator[Example]:
    seen: set[str] = set()
    num_repeats = 0
    while len(seen) != num_distinct and (num_distinct is not None or num_repeats < MAX_REPEATS):
        example = draw(rng)
        if example.question in seen:
            num_repeats += 1
            continue
        num_repeats = 0
        seen.add(example.question)
        yield example


def _task(config: Generator) -> tuple[int | None, _Draw]:
    task = importlib.import_module(type(config).__module__)
    return task.count(config), lambda rng: task.draw(config, rng)
