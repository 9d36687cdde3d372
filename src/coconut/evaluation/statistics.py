"""Intervals and tests for accuracies: what a difference is worth.

Two kinds of chance are at work. Which examples the test set holds: `wilson_interval` and
`mcnemar` speak of that. Which seed the training had: `mean_interval` over seeds speaks of that.
"""

import math
from collections.abc import Sequence

_Z = 1.959963984540054
"""The normal distribution's 97.5 % point, for 95 % intervals with both sides cut."""

# Student's t, 97.5 % points, for 1 to 30 degrees of freedom.
_T = (
    *(12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139),
    *(2.200985, 2.178813, 2.160369, 2.144787, 2.131450, 2.119905, 2.109816, 2.100922, 2.093024, 2.085963),
    *(2.079614, 2.073873, 2.068658, 2.063899, 2.059539, 2.055529, 2.051831, 2.048407, 2.045230, 2.042272),
)


def wilson_interval(num_right: int, num_examples: int) -> tuple[float, float]:
    """Bound an accuracy with 95 % confidence; without examples it may be anything.

    Unlike mean +- 1.96 standard errors it keeps inside [0, 1] and has a width at 0 and 1.

    >>> [round(bound, 4) for bound in wilson_interval(81, 100)]
    [0.7222, 0.8749]

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    assert 0 <= num_right <= num_examples
    if num_examples == 0:
        return 0.0, 1.0
    share = num_right / num_examples
    weight = _Z**2 / num_examples
    centre = (share + weight / 2) / (1 + weight)
    half = _Z * math.sqrt(share * (1 - share) / num_examples + weight / (4 * num_examples)) / (1 + weight)
    # Both ends are exact there; rounding would leave 1e-17.
    low = 0.0 if num_right == 0 else centre - half
    high = 1.0 if num_right == num_examples else centre + half
    return low, high


def mcnemar(right_a: Sequence[bool], right_b: Sequence[bool]) -> float:
    """Probability of so unequal a pair of models on these examples, were they equally good.

    Two-sided and exact: only the examples that one of the two got right count, and each of those
    is a fair coin. The same index is the same example in both.

    >>> mcnemar([True] * 10 + [False], [False] * 10 + [True])
    0.01171875

    Source: McNemar 1947; the binomial form of the test.
    """
    assert len(right_a) == len(right_b)
    only_a = sum(a and not b for a, b in zip(right_a, right_b, strict=True))
    only_b = sum(b and not a for a, b in zip(right_a, right_b, strict=True))
    num_coins, fewer = only_a + only_b, min(only_a, only_b)
    # Whole numbers throughout: sums of floats would lose the small tail that matters.
    ways, tail = 1, 0
    for count in range(fewer + 1):
        tail += ways
        ways = ways * (num_coins - count) // (count + 1)
    return min(1.0, 2 * tail / (1 << num_coins))


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean over seeds, and its 95 % interval by Student's t: (mean, low, high).

    A single value says nothing about the spread: its interval is infinite.

    >>> [round(number, 3) for number in mean_interval([0.97, 0.98, 1.0])]
    [0.983, 0.945, 1.021]
    """
    assert values
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, -math.inf, math.inf
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = _t_quantile(len(values) - 1) * math.sqrt(variance / len(values))
    return mean, mean - half, mean + half


def _t_quantile(freedom: int) -> float:
    """97.5 % point of Student's t.

    Beyond the table by the expansion in 1 / freedom (Abramowitz and Stegun 26.7.5), which is right
    to 2e-6 there.
    """
    if freedom <= len(_T):
        return _T[freedom - 1]
    first = (_Z**3 + _Z) / 4
    second = (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / 96
    third = (3 * _Z**7 + 19 * _Z**5 + 17 * _Z**3 - 15 * _Z) / 384
    return _Z + first / freedom + second / freedom**2 + third / freedom**3
