"""Several answers to a question: how often one of k is right, and what most of them say."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from coconut.evaluation.answers import Comparison, same_answer
from coconut.evaluation.statistics import bootstrap_interval, wilson_interval


@dataclass(frozen=True)
class Samples:
    """The samples of one question; a line of a samples file."""

    index: int
    gold: str
    answers: list[str | None]
    """In the order of their numbers; None where a text holds none."""
    right: list[bool]

    def to_json(self) -> str:
        """Write the line."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False) + "\n"


def sizes(num_samples: int) -> list[int]:
    """Return the numbers of tries that are reported: powers of 2, and all samples.

    >>> sizes(12)
    [1, 2, 4, 8, 12]
    """
    powers = [1 << exponent for exponent in range(num_samples.bit_length()) if 1 << exponent < num_samples]
    return [*powers, num_samples]


def pass_at(num_tries: int, *, num_samples: int, num_right: int) -> float:
    """Estimate without bias how probably one of so many tries is right.

    >>> pass_at(2, num_samples=4, num_right=1)
    0.5

    Source: Chen et al. 2021 (arXiv:2107.03374), 1 - C(n - c, k) / C(n, k).
    """
    assert num_tries <= num_samples
    return 1 - math.comb(num_samples - num_right, num_tries) / math.comb(num_samples, num_tries)


def majority(answers: Sequence[str | None], comparison: Comparison = None) -> str | None:
    """Return the answer that most samples give, the first of those that are given equally often; None if none is given.

    Answers that say the same count together, whichever way round they are compared.

    >>> majority(["5", None, "7", "7.0", "5.00", None, None])
    '5'
    """
    groups: list[tuple[str, int]] = []
    for answer in answers:
        if answer is None:
            continue
        for place, (first, count) in enumerate(groups):
            if same_answer(answer, first, comparison) or same_answer(first, answer, comparison):
                groups[place] = first, count + 1
                break
        else:
            groups.append((answer, 1))
    return max(groups, key=lambda group: group[1])[0] if groups else None


def measure(samples: Sequence[Samples], num_samples: int, comparison: Comparison = None) -> dict[str, Any]:
    """Return `pass_at_k` for every size, and the accuracy of the majority, with 95 % intervals over questions."""
    found: dict[str, Any] = {"num_samples": num_samples}
    for size in sizes(num_samples):
        shares = [pass_at(size, num_samples=num_samples, num_right=sum(one.right)) for one in samples]
        low, high = bootstrap_interval(shares)
        found |= {
            f"pass_at_{size}": sum(shares) / max(1, len(shares)),
            f"pass_at_{size}_low": low,
            f"pass_at_{size}_high": high,
        }
    num_right = sum(same_answer(majority(one.answers, comparison), one.gold, comparison) for one in samples)
    low, high = wilson_interval(num_right, len(samples))
    return found | {"majority": num_right / max(1, len(samples)), "majority_low": low, "majority_high": high}
