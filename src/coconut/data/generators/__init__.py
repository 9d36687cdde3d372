"""Synthetic tasks as endless, seeded streams of distinct examples.

A task is a module with two functions: `count(config)`, how many distinct questions exist (None
when nobody knows), and `draw(config, rng)`, one example at random. A question determines its
steps and answer, so two examples are the same if and only if their questions are.
"""

import random
from collections.abc import Callable, Iterator
from itertools import islice

from coconut.config.schema import ChainedArithmetic, Generator, Multiplication
from coconut.data.examples import Example
from coconut.data.generators import arithmetic, graphs, multiplication

MAX_REPEATS = 2_000
"""Draws in a row that may repeat before a task of unknown size counts as used up."""

_Draw = Callable[[random.Random], Example]


def generate(config: Generator, num_examples: int, *, seed: int) -> list[Example]:
    """Draw examples whose questions all differ.

    The first n of a longer list are the list of n: more examples never change earlier ones.

    Raises:
        ValueError: if fewer than `num_examples` distinct questions exist.
    """
    num_distinct, draw = _task(config)
    if num_distinct is not None and num_examples > num_distinct:
        raise ValueError(
            f"data.generator: {num_examples} distinct questions asked for all splits together, but {config} has only"
            f" {num_distinct}; ask for fewer rows, or enlarge the task"
        )
    stream = _distinct(draw, random.Random(seed), num_distinct is None)
    examples = list(islice(stream, num_examples))
    if len(examples) < num_examples:
        raise ValueError(
            f"data.generator: {num_examples} distinct questions asked for all splits together, but only"
            f" {len(examples)} turned up before {MAX_REPEATS} draws in a row repeated one ({config});"
            " ask for fewer rows, or enlarge the task"
        )
    return examples


def _distinct(draw: _Draw, rng: random.Random, may_end: bool) -> Iterator[Example]:
    seen: set[str] = set()
    num_repeats = 0
    while not (may_end and num_repeats >= MAX_REPEATS):
        example = draw(rng)
        if example.question in seen:
            num_repeats += 1
            continue
        num_repeats = 0
        seen.add(example.question)
        yield example


def _task(config: Generator) -> tuple[int | None, _Draw]:
    if isinstance(config, ChainedArithmetic):
        return arithmetic.count(config), lambda rng: arithmetic.draw(config, rng)
    if isinstance(config, Multiplication):
        return multiplication.count(config), lambda rng: multiplication.draw(config, rng)
    return graphs.count(config), lambda rng: graphs.draw(config, rng)
