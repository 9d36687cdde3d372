"""Where a run stands, what an epoch adds up, and the history of the epochs done."""

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from coconut.training.curve import Curve
from coconut.training.losses import Sums, add_sums, mean_loss, part_means
from coconut.training.objective import Cost


@dataclass(frozen=True)
class Score:
    """The result of a validation: mean loss in nats per token, share of right answers."""

    loss: float
    accuracy: float


@dataclass
class EpochSums:
    """The sums over an epoch's updates, in their order."""

    parts: Sums = field(default_factory=dict)
    num_columns: int = 0
    num_padding: int = 0
    num_latents: int = 0
    num_updates: int = 0
    grad_norm: float = 0.0
    seconds: float = 0.0

    def add(self, cost: Cost, *, grad_norm: float, seconds: float) -> None:
        add_sums(self.parts, cost.parts)
        self.num_columns += cost.num_columns
        self.num_padding += cost.num_padding
        self.num_latents += cost.num_latents
        self.num_updates += 1
        self.grad_norm += grad_norm
        self.seconds += seconds

    @property
    def loss(self) -> float:
        """The mean of what the updates minimised."""
        return mean_loss(self.parts)

    @property
    def named_parts(self) -> dict[str, float]:
        """The mean of each part of the loss, by its name; empty where it is one."""
        return part_means(self.parts) if len(self.parts) > 1 else {}

    @property
    def seconds_per_update(self) -> float:
        return self.seconds / max(1, self.num_updates)


@dataclass(frozen=True)
class HistoryRow:
    """One epoch of `history.csv`. Timings are the last columns: the others repeat byte for byte."""

    entry: str
    epoch: int
    update: int
    """Updates of this entry done so far."""
    train_loss: float
    grad_norm: float
    """Mean over the epoch's updates, before clipping."""
    lr: float
    """Of the epoch's last update."""
    valid_loss: float
    valid_accuracy: float
    first_update_loss: float | None
    """Of the parent's weights at this entry's stage, before the first update; first row only."""
    first_update_accuracy: float | None
    num_latents: float
    """Mean per example."""
    tokens: int
    """Columns that hold something, thoughts included."""
    padding_share: float
    tokens_per_s: float
    ms_per_update: float
    seconds: float
    """Since the entry began, over all resumed sessions, validation included."""
    cpu_seconds: float
    """CPU time of the main process over the same period, all its threads together."""
    load: float
    """The machine's load average per core at the end of the epoch; above 1, processes wait for a core."""


@dataclass
class Position:
    """The position of a run in its entry; JSON in the resume state."""

    epoch: int = 0
    update_in_epoch: int = 0
    update: int = 0
    sums: EpochSums = field(default_factory=EpochSums)
    curve: Curve = field(default_factory=Curve)
    history: list[dict[str, Any]] = field(default_factory=list)
    first: dict[str, float] | None = None
    best_accuracy: float = -1.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    num_oom_retries: int = 0
    micro_batch: int | None = None
    lr: float = 0.0

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Position":
        return cls(**{**record, "sums": EpochSums(**record["sums"]), "curve": Curve(**record["curve"])})

    def advance(self, cost: Cost, *, num_updates: int, lr: float, grad_norm: float, seconds: float) -> None:
        """Count one update of the entry's `num_updates`."""
        self.update += 1
        self.update_in_epoch += 1
        self.lr = lr
        self.curve.add(cost, update=self.update, num_updates=num_updates, lr=lr, grad_norm=grad_norm)
        self.sums.add(cost, grad_norm=grad_norm, seconds=seconds)

    def close_epoch(
        self, score: Score, *, entry_name: str, num_rows: int, seconds: float, cpu_seconds: float, load: float
    ) -> HistoryRow:
        """End the epoch: put its row into the history, and start the next one's sums.

        Args:
            num_rows: rows shown in this epoch.
            seconds: since the entry began; `cpu_seconds` likewise.
        """
        sums = self.sums
        first = (self.first if not self.history else None) or {}
        tokens = sums.num_columns - sums.num_padding
        row = HistoryRow(
            entry=entry_name,
            epoch=self.epoch + 1,
            update=self.update,
            train_loss=sums.loss,
            grad_norm=sums.grad_norm / max(1, sums.num_updates),
            lr=self.lr,
            valid_loss=score.loss,
            valid_accuracy=score.accuracy,
            first_update_loss=first.get("loss"),
            first_update_accuracy=first.get("accuracy"),
            num_latents=sums.num_latents / max(1, num_rows),
            tokens=tokens,
            padding_share=sums.num_padding / max(1, sums.num_columns),
            tokens_per_s=tokens / max(1e-9, sums.seconds),
            ms_per_update=1e3 * sums.seconds_per_update,
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            load=load,
        )
        self.history.append(
            dataclasses.asdict(row) | {f"train_{name}": mean for name, mean in sums.named_parts.items()}
        )
        self.epoch, self.update_in_epoch, self.sums = self.epoch + 1, 0, EpochSums()
        return row


def history_csv(history: Sequence[Mapping[str, Any]]) -> str:
    """The text of `history.csv`, one row per epoch; numbers with the digits that name them exactly."""
    text = io.StringIO()
    fields = [f.name for f in dataclasses.fields(HistoryRow)]
    # The parts of the loss follow it, before the columns of times.
    after = fields.index("train_loss") + 1
    fields[after:after] = [name for name in (history[0] if history else {}) if name not in fields]
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue()
