"""What an entry does at which update: how many there are, and the state of its method by then."""

from dataclasses import dataclass, field

from coconut.config.methods import blaming_method, build_method
from coconut.config.schema import Entry
from coconut.methods import State


@dataclass(frozen=True)
class Schedule:
    """The sizes of one entry's training."""

    entry: Entry
    num_rows: int
    """Of the training set."""
    parent_state: State = field(default_factory=dict)
    """In which the parent's training had left its method."""

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

    def state_at(self, update: int) -> State:
        """Return the state of the entry's method after so many updates."""
        with blaming_method(self.entry.method, "say its state"):
            return build_method(self.entry).state_at(update, self.updates_per_epoch, self.parent_state)
