"""The named parts of a loss, summed over an update or over many."""

from collections.abc import Mapping

Sums = dict[str, tuple[float, int, float]]
"""By the part's name: a sum, the number by which it is divided for its mean, and the weight of the mean in the loss."""


def add_sums(sums: Sums, more: Mapping[str, tuple[float, int, float]]) -> None:
    """Add the sums of another update."""
    for name, (total, count, weight) in more.items():
        before = sums.get(name, (0.0, 0, weight))
        sums[name] = before[0] + total, before[1] + count, weight


def part_means(sums: Mapping[str, tuple[float, int, float]]) -> dict[str, float]:
    """Return the mean of each part.

    >>> part_means({"nll": (6.0, 3, 1.0), "distill": (5.0, 10, 20.0)})
    {'nll': 2.0, 'distill': 0.5}
    """
    return {name: total / max(1, count) for name, (total, count, _) in sums.items()}


def mean_loss(sums: Mapping[str, tuple[float, int, float]]) -> float:
    """Return the loss: the weighted sum of the means of its parts.

    >>> mean_loss({"nll": (6.0, 3, 1.0), "distill": (5.0, 10, 20.0)})
    12.0
    """
    return sum(weight * mean for (_, _, weight), mean in zip(sums.values(), part_means(sums).values(), strict=True))
