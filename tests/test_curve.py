"""The curve of single updates: thinned means, exact after a resume, with a file of bounded size."""

import csv
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coconut.training.curve import MOST_POINTS, Curve, updates_csv
from coconut.training.objective import Cost


def cost(nll: float, num_tokens: int) -> Cost:
    return Cost({"nll": (nll, num_tokens, 1.0)}, num_columns=0, num_padding=0, num_latents=0)


@given(
    st.lists(st.tuples(st.floats(0, 50), st.integers(1, 9), st.floats(0, 9)), min_size=1, max_size=60),
    st.integers(1, 7),
    st.integers(0, 60),
)
def test_points_are_the_means_of_their_updates_and_a_resume_changes_nothing(updates, every, stopped_after):
    curve = Curve(every=every)
    for number, (nll, num_tokens, norm) in enumerate(updates, 1):
        curve.add(cost(nll, num_tokens), update=number, num_updates=len(updates), lr=number / 10, grad_norm=norm)
        if number == stopped_after:
            curve = Curve(**asdict(curve))
    expected = []
    for start in range(0, len(updates), every):
        group = updates[start : start + every]
        end = start + len(group)
        loss = sum(nll for nll, _, _ in group) / sum(num for _, num, _ in group)
        expected.append([end, loss, end / 10, sum(norm for *_, norm in group) / len(group)])
    assert [len(point) for point in curve.points] == [4] * len(expected)
    for point, wanted in zip(curve.points, expected, strict=True):
        assert point == pytest.approx(wanted)


@pytest.mark.parametrize("num_updates", [1, MOST_POINTS - 1, MOST_POINTS, MOST_POINTS + 1, 10 * MOST_POINTS + 3])
def test_a_long_training_has_no_more_points_than_are_asked_for(num_updates):
    curve = Curve.over(num_updates)
    for number in range(1, num_updates + 1):
        curve.add(cost(1.0, 1), update=number, num_updates=num_updates, lr=0.1, grad_norm=1.0)
    assert MOST_POINTS / 2 <= len(curve.points) <= MOST_POINTS or len(curve.points) == num_updates
    assert curve.points[-1][0] == num_updates
    rows = list(csv.DictReader(updates_csv(curve.points).splitlines()))
    assert rows[-1] == {"update": str(num_updates), "loss": "1.0", "lr": "0.1", "grad_norm": "1.0"}
