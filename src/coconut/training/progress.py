"""How a run shows where it is: a bar on a terminal, a log line elsewhere, `make status` and a tracker."""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

from loguru import logger
from tqdm import tqdm

from coconut.logs import shows_progress
from coconut.training.callbacks import Callbacks
from coconut.training.position import HistoryRow, Position


class Progress:
    """Shows one entry's updates; use it as a context, which closes the bar."""

    def __init__(self, entry_name: str, callbacks: Callbacks, *, every_s: float, start: int, total: int) -> None:
        self._entry_name, self._callbacks = entry_name, callbacks
        self._every_s, self._last = every_s, time.monotonic()
        self._total = total
        self._bar = tqdm(
            desc=entry_name,
            total=total,
            initial=start,
            unit="update",
            disable=not shows_progress(),
            dynamic_ncols=True,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, position: Position) -> None:
        """Count one update, and report it if the last report is old enough."""
        self._bar.update()
        if time.monotonic() - self._last >= self._every_s:
            self._report(position)
            self._last = time.monotonic()

    def _report(self, position: Position) -> None:
        rate = self._bar.format_dict["rate"] or 1 / max(1e-9, position.sums.seconds_per_update)
        loss, eta_s = position.sums.loss, (self._total - position.update) / rate
        parts = position.sums.named_parts
        self._bar.set_postfix(
            {"loss": f"{loss:.4f}"} | {name: f"{mean:.4f}" for name, mean in parts.items()}, refresh=False
        )
        progress = {"update": position.update, "num_updates": self._total, "loss": loss, "eta_s": eta_s}
        self._callbacks.report(progress)
        running = {"running_loss": loss, "lr": position.lr} | {f"running_{name}": mean for name, mean in parts.items()}
        self._callbacks.track(running, position.update)
        if self._bar.disable:
            logger.info(
                "{}: update {update}/{num_updates} loss {loss:.4f}{parts} lr {lr:.2e} {ms:.0f} ms/update, {left} left",
                self._entry_name,
                parts="".join(f" {name} {mean:.4f}" for name, mean in parts.items()),
                **progress,
                lr=position.lr,
                ms=1e3 * position.sums.seconds_per_update,
                left=tqdm.format_interval(eta_s),
            )


def log_first_score(entry_name: str, first: Mapping[str, float]) -> None:
    logger.info("{}: before the first update: {}", entry_name, _figures(first))


def log_epoch(row: HistoryRow) -> None:
    logger.info("{}: epoch {}: {}", row.entry, row.epoch, _figures(dataclasses.asdict(row)))


def _figures(fields: Mapping[str, Any]) -> str:
    shown = ("train_loss", "loss", "valid_loss", "accuracy", "valid_accuracy", "ms_per_update", "seconds")
    return " ".join(f"{key} {fields[key]:.4g}" for key in shown if key in fields)
