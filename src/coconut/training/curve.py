"""Loss, learning rate and gradient norm update by update, thinned so that a long training stays a small file."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

from coconut.training.objective import Cost

MOST_POINTS = 400
COLUMNS = ("update", "loss", "lr", "grad_norm")


@dataclass
class Curve:
    """The points of a training curve, at most `MOST_POINTS`; JSON in the resume state.

    A point stands for `every` updates: the mean loss of their supervised tokens in nats, the rate of the last, and the
    mean gradient norm before clipping.
    """

    every: int = 1
    points: list[list[float]] = field(default_factory=list)
    """Update, loss, rate, norm."""
    nll: float = 0.0
    num_tokens: int = 0
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
        self.nll += cost.nll
        self.num_tokens += cost.num_tokens
        self.grad_norm += grad_norm
        self.num_updates += 1
        if self.num_updates == self.every or update == num_updates:
            loss = self.nll / max(1, self.num_tokens)
            self.points.append([update, loss, lr, self.grad_norm / self.num_updates])
            self.nll, self.num_tokens, self.grad_norm, self.num_updates = 0.0, 0, 0.0, 0


def updates_csv(points: Sequence[Sequence[float]]) -> str:
    """Write the text of `updates.csv`; numbers with the digits that name them exactly."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(points)
    return text.getvalue()
