"""Intervals and tests against published values, a slower oracle, and properties."""

import math
from fractions import Fraction
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coconut.evaluation.statistics import (
    mcnemar,
    mean_interval,
    paired_seeds_interval,
    seeds_interval,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("num_right", "num_examples", "low", "high"),
    [
        # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (10, 10, 0.7225, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_the_wilson_interval_has_its_published_values(num_right, num_examples, low, high):
    assert wilson_interval(num_right, num_examples) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_wilson_interval_holds_the_accuracy_stays_a_share_and_mirrors(counts):
    num_right, num_examples = counts
    low, high = wilson_interval(num_right, num_examples)
    assert 0 <= low <= num_right / num_examples <= high <= 1
    assert wilson_interval(num_examples - num_right, num_examples) == pytest.approx((1 - high, 1 - low), abs=1e-12)


@given(st.integers(1, 500), st.integers(2, 9))
def test_the_wilson_interval_narrows_with_more_examples(num_examples, factor):
    few = wilson_interval(num_examples // 2, num_examples)
    many = wilson_interval(num_examples // 2 * factor, num_examples * factor)
    assert many[1] - many[0] < few[1] - few[0]


@pytest.mark.parametrize(("num_right", "num_examples"), [(3, 2), (-1, 2), (0, -1)])
def test_impossible_counts_are_a_defect_of_the_caller(num_right, num_examples):
    with pytest.raises(AssertionError):
        wilson_interval(num_right, num_examples)


def rows(both: int, only_a: int, only_b: int, neither: int) -> tuple[list[bool], list[bool]]:
    pairs = [(True, True)] * both + [(True, False)] * only_a + [(False, True)] * only_b + [(False, False)] * neither
    return [a for a, _ in pairs], [b for _, b in pairs]


@pytest.mark.parametrize(
    ("counts", "p"),
    [
        ((0, 0, 0, 0), 1.0),
        ((90, 0, 0, 10), 1.0),
        ((0, 1, 0, 0), 1.0),
        ((0, 5, 5, 0), 1.0),
        ((7, 6, 0, 3), 2 / 2**6),
        ((0, 10, 1, 0), 24 / 2**11),
        # Sums of binomial coefficients; the chi-squared form gives 0.66 and 3.8e-06 for these two.
        ((59, 9, 12, 20), 0.663624),
        ((101, 121, 59, 33), 4.434e-06),
        # Normal approximation with continuity correction: z = 39 / sqrt(1960), p = 0.3784.
        ((0, 1000, 960, 0), 0.3785),
    ],
)
def test_mcnemar_has_its_known_values(counts, p):
    assert mcnemar(*rows(*counts)) == pytest.approx(p, rel=5e-4)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40))
def test_mcnemar_is_a_probability_and_does_not_care_which_model_comes_first(pairs):
    a, b = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    assert 0 < mcnemar(a, b) <= 1
    assert mcnemar(a, b) == mcnemar(b, a)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 3), (2, 3), (1, 7), (4, 4), (5, 0), (2, 9)])
def test_mcnemar_equals_counting_every_fall_of_the_coins(only_a, only_b):
    num_coins = only_a + only_b
    extremes = sum(
        abs(2 * sum(coins) - num_coins) >= abs(only_a - only_b) for coins in product((0, 1), repeat=num_coins)
    )
    assert mcnemar(*rows(1, only_a, only_b, 1)) == float(Fraction(extremes, 2**num_coins))


def test_mcnemar_survives_ten_thousand_examples_that_all_differ():
    assert mcnemar([True] * 10_000, [False] * 10_000) == 0.0
    assert mcnemar([True] * 500, [False] * 500) == 2.0**-499


def test_rows_that_are_not_paired_are_a_defect_of_the_caller():
    with pytest.raises(AssertionError):
        mcnemar([True], [True, False])


@pytest.mark.parametrize(
    ("values", "mean", "low", "high"),
    [
        ([0.0, 1.0], 0.5, -5.853102, 6.853102),  # t = 12.7062, standard error 0.5
        ([0.97, 0.98, 1.0], 0.983333, 0.945388, 1.021278),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 3.0, 1.036757, 4.963243),  # R: t.test(1:5)
        ([float(value) for value in range(1, 101)], 50.5, 44.743491, 56.256509),  # R: t.test(1:100)
        ([2.0, 2.0, 2.0], 2.0, 2.0, 2.0),
    ],
)
def test_the_interval_over_seeds_has_its_known_values(values, mean, low, high):
    assert mean_interval(values) == pytest.approx((mean, low, high), abs=2e-5)


def test_one_seed_says_nothing_about_the_spread():
    assert mean_interval([0.98]) == (0.98, -math.inf, math.inf)


def test_no_seed_is_a_defect_of_the_caller():
    with pytest.raises(AssertionError):
        mean_interval([])


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=60), st.floats(-10, 10), st.floats(0.1, 10))
def test_the_interval_over_seeds_holds_the_mean_and_moves_with_the_values(values, shift, scale):
    mean, low, high = mean_interval(values)
    assert low <= mean <= high
    moved = mean_interval([shift + scale * value for value in values])
    assert moved == pytest.approx((shift + scale * mean, shift + scale * low, shift + scale * high), abs=1e-6)


def test_more_seeds_give_a_narrower_interval_across_the_end_of_the_table():
    widths = [high - low for _, low, high in (mean_interval([0.0, 1.0] * half) for half in range(1, 40))]
    assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize("accuracy", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_seeds", [2, 5])
def test_seeds_that_agree_are_still_as_uncertain_as_their_test_examples(accuracy: float, num_seeds: int) -> None:
    found = seeds_interval([accuracy] * num_seeds, 200)
    assert found == pytest.approx((accuracy, *wilson_interval(round(200 * accuracy), 200)))
    assert found[2] - found[1] > 0.01


@given(st.lists(st.integers(0, 50), min_size=2, max_size=8), st.integers(50, 5000))
def test_the_interval_over_seeds_and_examples_holds_that_of_either_alone(counts: list[int], num_examples: int) -> None:
    accuracies = [count / 50 for count in counts]
    mean, low, high = seeds_interval(accuracies, num_examples)
    _, seeds_low, seeds_high = mean_interval(accuracies)
    assert 0 <= low <= mean <= high <= 1
    assert low <= max(0.0, seeds_low) + 1e-12
    assert high >= min(1.0, seeds_high) - 1e-12


def test_one_seed_leaves_everything_open() -> None:
    assert seeds_interval([0.98], 1000) == (0.98, 0.0, 1.0)
    assert paired_seeds_interval([0.1], [0.2], 1000) == (pytest.approx(0.1), -1.0, 1.0)


def test_with_many_seeds_the_examples_chance_remains_and_with_many_examples_the_seeds() -> None:
    seeds = [0.5, 0.6] * 500
    few_examples, many_examples = (seeds_interval(seeds, num_examples) for num_examples in (100, 10**9))
    assert few_examples[2] - few_examples[1] == pytest.approx(0.192, abs=0.003)
    assert many_examples[1:] == pytest.approx(mean_interval(seeds)[1:], abs=1e-4)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=2, max_size=6), st.integers(100, 2000))
def test_the_paired_interval_mirrors_and_never_degenerates(counts: list[tuple[int, int]], num_examples: int) -> None:
    first, second = [a / 100 for a, _ in counts], [b / 100 for _, b in counts]
    mean, low, high = paired_seeds_interval(first, second, num_examples)
    assert -1 <= low < high <= 1
    assert low <= mean + 1e-12
    assert mean - 1e-12 <= high
    assert paired_seeds_interval(second, first, num_examples) == pytest.approx((-mean, -high, -low), abs=1e-12)
