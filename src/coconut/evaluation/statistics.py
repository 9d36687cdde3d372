"""Intervals and tests for accuracies: what a difference is worth.

Two kinds of chance are at work: which examples the test set holds (`wilson_interval`, `mcnemar`), and which
seed the training had (`mean_interval`). `seeds_interval` and `paired_seeds_interval` count both: two seeds that
both got 0 of 100 examples right agree perfectly, and still say little about the next 100 examples.
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
    return _wilson(num_right / max(1, num_examples), num_examples)


def _wilson(share: float, num_examples: int) -> tuple[float, float]:
    if num_examples == 0:
        return 0.0, 1.0
    weight = _Z**2 / num_examples
    centre = (share + weight / 2) / (1 + weight)
    half = _Z * math.sqrt(share * (1 - share) / num_examples + weight / (4 * num_examples)) / (1 + weight)
    # Both ends are exact there; rounding would leave 1e-17.
    low = 0.0 if share == 0 else centre - half
    high = 1.0 if share == 1 else centre + half
    return low, high


def bootstrap_interval(values: Sequence[float], *, num_draws: int = 1000) -> tuple[float, float]:
    """Bound a mean over questions with 95 % confidence, by drawing the questions again; always the same draws.

    Without values it may be anything. Where all values are 0, or all are 1, the draws say nothing: then it is Wilson's
    interval.

    Source: Efron 1979, percentile bootstrap.
    """
    import numpy as np  # Here, because the stages that need no statistics need no numpy either.

    if len(set(values)) < 2 and set(values) <= {0.0, 1.0}:
        return wilson_interval(round(sum(values)), len(values))
    draws = np.random.default_rng(0).multinomial(len(values), np.full(len(values), 1 / len(values)), size=num_draws)
    low, high = np.quantile(draws @ np.asarray(values) / len(values), [0.025, 0.975])
    return float(low), float(high)


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


def seeds_interval(accuracies: Sequence[float], num_examples: int) -> tuple[float, float, float]:
    """Mean accuracy over seeds, and its 95 % interval over seeds and test examples: (mean, low, high).

    The distances from the mean to the ends of the two intervals, Student's t over the seeds and Wilson's over the
    examples at the mean accuracy, are added as squares, since the two chances are independent. All seeds share the
    test set, so that more seeds narrow the first part only. The spread between seeds on one test set holds some of
    the examples' chance already; the interval is therefore rather too wide than too narrow. A single seed says
    nothing about the spread over seeds: its interval is [0, 1].

    >>> [round(number, 3) for number in seeds_interval([0.0, 0.0], 100)]
    [0.0, 0.0, 0.037]
    >>> [round(number, 3) for number in seeds_interval([0.97, 0.98, 1.0], 1000)]
    [0.983, 0.944, 1.0]

    Source: Zou and Donner 2008, "Construction of confidence limits about effect measures" (square-and-add).
    """
    mean, low, high = mean_interval(accuracies)
    wilson_low, wilson_high = _wilson(min(1.0, mean), num_examples)
    below, above = math.hypot(mean - low, mean - wilson_low), math.hypot(high - mean, wilson_high - mean)
    return mean, max(0.0, mean - below), min(1.0, mean + above)


def paired_seeds_interval(
    only_first: Sequence[float], only_second: Sequence[float], num_examples: int
) -> tuple[float, float, float]:
    """Mean difference of two models' accuracies over seeds, and its 95 % interval over seeds and test examples.

    Args:
        only_first: for each seed, the share of the test examples that only the first model got right.
        only_second: the share that only the second model got right, in the same order of seeds.

    Returns:
        (mean, low, high) of second minus first. Squares are added as in `seeds_interval`: Student's t over the
        seeds' differences, and Wilson's intervals of the two shares. A single seed's interval is [-1, 1].

    >>> [round(number, 3) for number in paired_seeds_interval([0.0, 0.0], [0.0, 0.0], 100)]
    [0.0, -0.037, 0.037]
    """
    assert len(only_first) == len(only_second)
    mean, low, high = mean_interval([b - a for a, b in zip(only_first, only_second, strict=True)])
    first, second = (min(1.0, math.fsum(shares) / len(shares)) for shares in (only_first, only_second))
    (first_low, first_high), (second_low, second_high) = (_wilson(share, num_examples) for share in (first, second))
    below = math.hypot(mean - low, second - second_low, first_high - first)
    above = math.hypot(high - mean, second_high - second, first - first_low)
    return mean, max(-1.0, mean - below), min(1.0, mean + above)


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


def format_ratio(value: float) -> str:
    """Write a share from 0 to 1 with three decimals, and with more where these would read as none or as all.

    >>> [format_ratio(value) for value in (0.98149, 0.9995, 0.99996, 0.0004, 1.0, 0.0, 1 - 1e-9)]
    ['0.981', '0.9995', '0.99996', '0.0004', '1.000', '0.000', '>0.999999']
    """
    for digits in range(3, 7):
        text = f"{value:.{digits}f}"
        if value in (0.0, 1.0) or float(text) not in (0.0, 1.0):
            return text
    return ">0.999999" if value > 0.5 else "<0.000001"
