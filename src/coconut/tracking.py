"""Logs a training to the tracker that `runtime.tracker` names, through accelerate's tracker classes.

Everything that is logged is also in `history.csv`. A tracker cannot change a result, and a tracker that fails
never stops a run. Everything stays on this machine unless the environment says otherwise:

* wandb writes below `outputs/logs/wandb/`; `wandb sync` uploads it later. `WANDB_API_KEY` or `WANDB_MODE`, where set,
  decide instead.
* tensorboard writes below `outputs/logs/tensorboard/`.
* trackio keeps its data in the folder `TRACKIO_DIR`; `trackio show` serves it.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loguru import logger

PROJECT = "continuous-thought"
_PLAIN = (str, int, float)
"""What every tracker stores of a configuration; other values, such as null, are stored as text."""

Track = Callable[[Mapping[str, Any], int], None]
"""Takes numbers by name, and the update that they belong to."""


@contextmanager
def tracking(tracker: str, *, run: str, config: Mapping[str, Any], folder: Path) -> Iterator[Track]:
    """Open a run in the tracker, close it at the end, and yield a function that logs values.

    Args:
        run: its name, the entry's.
        config: nested values to show with the run.
        folder: where trackers that write files may do so.
    """
    if tracker == "none":
        yield lambda _values, _update: None
        return
    session = _Session(tracker)
    session.attempt(lambda: session.open(run, config, folder))
    try:
        yield lambda values, update: session.attempt(lambda: session.log(values, update))
    finally:
        session.attempt(session.close)


class _Session:
    def __init__(self, name: str) -> None:
        self.name = name
        self.tracker: Any = None
        self.failed = False

    def attempt(self, action: Callable[[], None]) -> None:
        """Run `action`, unless the tracker has failed before; a first failure is one warning."""
        if self.failed:
            return
        try:
            action()
        except Exception as error:  # noqa: BLE001 - each tracker has errors of its own, and none may stop a run
            self.failed = True
            missing = isinstance(error, ImportError)
            cure = f"Run `pip install -e '.[{self.name}]'` in the repository, or " if missing else ""
            logger.warning(
                "runtime.tracker: {} failed ({}: {}); training goes on without it. {}set runtime.tracker: none",
                *(self.name, type(error).__name__, error, cure),
            )

    def open(self, run: str, config: Mapping[str, Any], folder: Path) -> None:
        # Imported here, because accelerate imports torch, which the report does without.
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        folder.mkdir(parents=True, exist_ok=True)
        tracker_class = LOGGER_TYPE_TO_CLASS[self.name]
        if tracker_class.requires_logging_directory:
            tracker = tracker_class(run, logging_dir=str(folder / self.name))
        else:
            own = {"dir": str(folder), "mode": _wandb_mode()} if self.name == "wandb" else {}
            tracker = tracker_class(PROJECT, name=run, **own)
        tracker.start()
        self.tracker = tracker
        flat = flatten(config)
        tracker.store_init_configuration(
            {key: value if isinstance(value, _PLAIN) else str(value) for key, value in flat.items()}
        )

    def log(self, values: Mapping[str, Any], update: int) -> None:
        numbers = {key: value for key, value in values.items() if isinstance(value, (int, float))}
        self.tracker.log(numbers, step=update)

    def close(self) -> None:
        if self.tracker is not None:
            self.tracker.finish()


def _wandb_mode() -> str:
    # Without a key, wandb in online mode would wait for somebody to type one.
    return os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested mappings into one, keys joined by dots.

    >>> flatten({"train": {"rows": 5, "dropped": {"empty": 1}}, "seed": 0})
    {'train.rows': 5, 'train.dropped.empty': 1, 'seed': 0}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
