"""Loss, learning rate and gradient norm update by update, thinned so that a long training stays a small file."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

from coconut.layout import UPDATE_COLUMNS
from coconut.training.losses import Sums, add_sums, mean_loss, part_means
from coconut.training.objective import Cost

MOST_POINTS = 400


@dataclass
class Curve:
    """The points of a training curve, at most `MOST_POINTS`; JSON in the resume state.

    A point stands for `every` updates: their mean loss (in nats a token, where it has no other part), the rate of the
    last, and the mean gradient norm before clipping.
    """

    every: int = 1
    points: list[list[float]] = field(default_factory=list)
    """Update, loss, rate, norm, and the mean of each part of the loss where it has several."""
    names: list[str] = field(default_factory=list)
    """Of these parts."""
    sums: Sums = field(default_factory=dict)
    grad_norm: float = 0.0
    num_updates: int = 0

    @classmethod
    def over(cls, num_updates: int) -> "Curve":
        """Return an empty curve of a training with so many updates.

        >>> Curve.over(1000).every
        3
        """
        return cls(every=max(1, -(-num_updates // MOST_POINTS)))

    def add(self, cost: Cost, *, update: int, num_updates: int, lr: float, grad_norm: float) -> None:
        """Take in one update, the `update`-th of `num_updates`."""
        add_sums(self.sums, cost.parts)
        self.grad_norm += grad_norm
        self.num_updates += 1
        if self.num_updates == self.every or update == num_updates:
            means = part_means(self.sums)
            self.names = list(means) if len(means) > 1 else []
            parts = [means[name] for name in self.names]
            self.points.append([update, mean_loss(self.sums), lr, self.grad_norm / self.num_updates, *parts])
            self.sums, self.grad_norm, self.num_updates = {}, 0.0, 0


def updates_csv(points: Sequence[Sequence[float]], names: Sequence[str] = ()) -> str:
    """Write the text of `updates.csv`; numbers with the digits that name them exactly.

    Args:
        names: of the parts of the loss that the points hold beside the loss itself.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*UPDATE_COLUMNS, *names])
    writer.writerows(points)
    return text.getvalue()
