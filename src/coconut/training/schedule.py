"""What an entry does at which update: how many there are, and what `icot` has removed by then."""

from dataclasses import dataclass

from coconut.config.schema import Entry
from coconut.data.curriculum import count_removed


@dataclass(frozen=True)
class Schedule:
    """The sizes of one entry's training."""

    entry: Entry
    num_rows: int
    """Of the training set."""
    removed_before: int = 0
    """Reasoning tokens that the parent had removed (`icot` only)."""

    @property
    def updates_per_epoch(self) -> int:
        return -(-self.num_rows // self.entry.train.batch_size)

    @property
    def num_updates(self) -> int:
        """Count the updates of the whole entry."""
        whole = self.updates_per_epoch * self.entry.epochs
        return min(whole, self.entry.max_updates or whole)

    @property
    def num_epochs(self) -> int:
        """Epochs begun; the last one may be cut short by `max_updates`."""
        return -(-self.num_updates // self.updates_per_epoch)

    def num_removed(self, update: int) -> int:
        """Reasoning tokens that `icot` removes in this update."""
        return count_removed(
            self.entry, update=update, updates_per_epoch=self.updates_per_epoch, start=self.removed_before
        )

    def num_removed_before(self, update: int) -> int:
        """Reasoning tokens that `icot` had removed in the update before this one: what the weights are trained for."""
        return self.num_removed(max(0, update - 1))
