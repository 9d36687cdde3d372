"""Multiplication of two n-digit numbers in the text form of iCoT, with the least significant digit first."""

import random
from dataclasses import dataclass
from typing import Annotated, Literal

from coconut.config.strict import Range
from coconut.data.examples import Example


@dataclass(frozen=True)
class Multiplication:
    """n-digit by n-digit multiplication, digits least significant first, partial products as steps."""

    task: Literal["multiplication"]
    num_digits: Annotated[int, Range(1, 1_000)]
    """The text grows with the square of it; far fewer than the bound fill any model's positions."""


def count(config: Multiplication) -> int:
    """Return the number of ordered pairs of n-digit numbers without leading zeros."""
    return int((9 * 10 ** (config.num_digits - 1)) ** 2)


def draw(config: Multiplication, rng: random.Random) -> Example:
    """Draw both factors uniformly from the n-digit numbers."""
    low, high = 10 ** (config.num_digits - 1), 10**config.num_digits
    return solve(rng.randrange(low, high), rng.randrange(low, high))


def solve(left: int, right: int) -> Example:
    """Write out schoolbook multiplication, with one step per digit of the right factor.

    A step is the shifted partial product. All steps but the first and the last add the sum so far.

    >>> solve(2365, 4347).steps
    ('5 5 5 6 1', '0 0 6 4 9 0 ( 5 5 1 1 1 1 )', '0 0 5 9 0 7 0 ( 5 5 6 0 2 8 0 )', '0 0 0 0 6 4 9 0')
    """
    num_digits = len(str(left))
    digits = [int(digit) for digit in reversed(str(right))]
    total = 0
    steps = []
    for shift, digit in enumerate(digits):
        width = num_digits + 1 + shift
        partial = left * digit * 10**shift
        total += partial
        step = _reversed_digits(partial, width)
        if 0 < shift < len(digits) - 1:
            step += f" ( {_reversed_digits(total, width)} )"
        steps.append(step)
    question = f"{_reversed_digits(left, num_digits)} * {_reversed_digits(right, len(digits))}"
    return Example(question, steps, _reversed_digits(total, num_digits + len(digits)))


def _reversed_digits(number: int, width: int) -> str:
    return " ".join(reversed(f"{number:0{width}d}"))
