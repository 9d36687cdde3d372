"""How many rows fit into memory, as processes found out that could not go on by themselves.

With shards, the others wait for what a process was to send when its memory ran out, so all of them must begin again.
What the next ones may read at once lies beside the resume state, in a file of each process that has learned it.

Importing this module is cheap (no torch).
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from coconut.config.schema import RuntimeConfig
from coconut.files import replace_file
from coconut.ranks import BatchTooLargeError

_PATTERN = "batch-*.json"


@dataclass(frozen=True)
class BatchLimits:
    """What fits. By default, nothing is known."""

    micro_batch: int | None = None
    """Rows of a training micro-batch."""
    eval_batch: int | None = None
    """Rows of a batch of a validation."""
    num_retries: int = 0
    """How often memory ran out until this was known."""

    @classmethod
    def read(cls, folder: Path) -> "BatchLimits":
        """Read what all processes have left in a folder; a damaged file counts as none."""
        limits = cls()
        for path in folder.glob(_PATTERN):
            limits = limits.and_(_read(path))
        return limits

    def and_(self, other: "BatchLimits") -> "BatchLimits":
        """Return what fits according to both."""
        return BatchLimits(
            _least(self.micro_batch, other.micro_batch),
            _least(self.eval_batch, other.eval_batch),
            self.num_retries + other.num_retries,
        )

    def limit(self, runtime: RuntimeConfig, train_batch: int) -> RuntimeConfig:
        """Return the settings by which no more is read at once than fits.

        Args:
            train_batch: the rows of an update, all of which `micro_batch: auto` would try.
        """
        asked = train_batch if runtime.micro_batch == "auto" else runtime.micro_batch
        micro_batch = runtime.micro_batch if self.micro_batch is None else min(asked, self.micro_batch)
        return replace(
            runtime, micro_batch=micro_batch, eval_batch=min(runtime.eval_batch, self.eval_batch or runtime.eval_batch)
        )


def note_batch_limits(folder: Path, rank: int, error: BatchTooLargeError) -> None:
    """Leave what a process has learned, on top of what it had learned before.

    Raises:
        OSError: the file cannot be written.
    """
    path = folder / _PATTERN.replace("*", str(rank))
    learned = BatchLimits(**{error.batch: error.fits}, num_retries=1)
    replace_file(path, json.dumps(asdict(_read(path).and_(learned))))


def is_limits_file(path: Path) -> bool:
    """Say whether a file of a resume folder is of this kind."""
    return path.match(_PATTERN) and path.is_file()


def _read(path: Path) -> BatchLimits:
    with suppress(OSError, ValueError):
        return _of_record(json.loads(path.read_text(encoding="utf-8")))
    return BatchLimits()


def _of_record(record: Mapping[str, Any]) -> BatchLimits:
    if not isinstance(record, dict) or record.keys() != asdict(BatchLimits()).keys():
        raise ValueError("not a record of what fits")
    if not all(value is None or (type(value) is int and value >= 0) for value in record.values()):
        raise ValueError("not numbers of rows")
    return BatchLimits(**record)


def _least(one: int | None, other: int | None) -> int | None:
    return min((value for value in (one, other) if value), default=None)
