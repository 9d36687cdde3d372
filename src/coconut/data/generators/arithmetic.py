"""Chained modular arithmetic."""

import random
from dataclasses import dataclass
from typing import Annotated, Literal

from coconut.config.strict import Range
from coconut.data.examples import Example


@dataclass(frozen=True)
class ChainedArithmetic:
    """Left-to-right arithmetic modulo a prime: `10 - 10 - 5 ?`, steps `0`, `6`, answer `6`."""

    task: Literal["chained_arithmetic"]
    num_operations: Annotated[int, Range(1, 10_000)]
    """Each operation is one step of a few tokens; far fewer than the bound fill any model's positions."""
    modulus: Annotated[int, Range(3, 10**12)]
    """A prime, so that every operation is a bijection and the answers are uniform."""


def count(config: ChainedArithmetic) -> int:
    """Return the number of distinct questions, p (3p - 4)^K.

    >>> count(ChainedArithmetic("chained_arithmetic", num_operations=2, modulus=11))
    9251
    """
    _check_prime(config.modulus)
    return int(config.modulus * _num_operations(config.modulus) ** config.num_operations)


def draw(config: ChainedArithmetic, rng: random.Random) -> Example:
    """Draw a start value and operations, uniformly over all questions."""
    start = rng.randrange(config.modulus)
    numbers = [rng.randrange(_num_operations(config.modulus)) for _ in range(config.num_operations)]
    return solve(start, [_operation(number, config.modulus) for number in numbers], config.modulus)


def solve(start: int, operations: list[tuple[str, int]], modulus: int) -> Example:
    """Write the question. Each step is the running value after one operation.

    >>> solve(10, [("-", 10), ("-", 5), ("+", 8), ("-", 5)], 11)
    Example(question='10 - 10 - 5 + 8 - 5 ?', steps=('0', '6', '3', '9'), answer='9', group='')
    """
    value = start
    values = []
    for symbol, operand in operations:
        value = {"+": value + operand, "-": value - operand, "*": value * operand}[symbol] % modulus
        values.append(str(value))
    words = [str(start), *(f"{symbol} {operand}" for symbol, operand in operations), "?"]
    return Example(" ".join(words), values, values[-1])


def _num_operations(modulus: int) -> int:
    return 3 * modulus - 4


def _operation(number: int, modulus: int) -> tuple[str, int]:
    """Return operation `number`, counted from 0 over + 1, + 2, ..., - 1, - 2, ..., * 2, * 3, ...

    It is computed, because the list of all operations would not fit into memory for a large modulus.

    >>> [_operation(number, 3) for number in range(_num_operations(3))]
    [('+', 1), ('+', 2), ('-', 1), ('-', 2), ('*', 2)]
    """
    # "+ 0", "- 0", "* 0" and "* 1" are left out: each operation is a bijection, and none is the identity.
    kind, place = divmod(number, modulus - 1)
    return "+-*"[kind], place + (2 if kind == 2 else 1)


def _check_prime(modulus: int) -> None:
    factor = next((n for n in range(2, int(modulus**0.5) + 1) if modulus % n == 0), None)
    if factor is not None:
        raise ValueError(
            f"data.generator.modulus: found {modulus} = {factor} * {modulus // factor}, wanted a prime,"
            " because other moduli make some answers more likely than others; take 11, for instance"
        )
