"""The resume state: what a killed training stage continues from.

It lies in `$DVC_ROOT/.resume/<stage>-<fingerprint>/`, outside of what DVC deletes before it runs a
stage, and outside of the temporary work trees of `dvc exp run --temp` and the queue:

    lock                     held (flock) by the one trainer that uses this folder
    progress.json            where it is, for `coconut status`
    batch-1.json             what fits into memory, if a process found out that less does (see `batch_limits`)
    state-00000007/          the newest state; state-00000006/ is the last good one before it (see `states`),
                             and goes when the outputs are written

A state is written to a temporary folder, flushed to the disk and renamed, so that a kill at any
moment leaves the state before it. What else lies in the folder of a stage is nobody's, and is deleted
when a trainer opens it.
"""

import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from loguru import logger

from coconut.files import amount, cure_of, explain, flush, remove, replace_file, size_of, system_error, wait_for_lock
from coconut.pipeline.batch_limits import is_limits_file
from coconut.pipeline.pacing import Pacing
from coconut.pipeline.signals import GRACE_S
from coconut.pipeline.states import DamagedError, is_state_name, path_after, read_state, state_paths, write_state
from coconut.pipeline.states import State as State
from coconut.pipeline.states import TensorsFile as TensorsFile

_LOCK_WAIT_S = 30.0
"""A trainer that was told to stop may still be saving its state (`GRACE_S`)."""
_PROBE_BYTES = 32_000_000
"""Written to measure a disk: enough that the time to flush anything at all hardly counts."""
_PROGRESS = "progress.json"


class ResumeStore:
    """The states of one pipeline stage with one fingerprint, newest first. Open it with `open`."""

    def __init__(
        self, stage: str, fingerprint: str, tensors_file: TensorsFile, *, root: Path | None, save_every_s: float
    ) -> None:
        self.folder = self.folder_of(stage, fingerprint, root)
        self._stage = stage
        self._fingerprint = fingerprint
        self._tensors_file = tensors_file
        self._pacing = Pacing(save_every_s)
        self._good: Path | None = None
        self._is_loaded = False
        self._started = time.time()
        self._resumed_from: int | None = None

    @staticmethod
    def folder_of(stage: str, fingerprint: str, root: Path | None = None) -> Path:
        """Return the folder of the states, which need not exist."""
        return resume_dir(root) / f"{stage}-{fingerprint[:16]}"

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        stage: str,
        fingerprint: str,
        tensors_file: TensorsFile,
        *,
        root: Path | None = None,
        save_every_s: float = 0.0,
        lock_wait_s: float = _LOCK_WAIT_S,
        is_writer: bool = True,
    ) -> "Iterator[ResumeStore]":
        """Lock the folder of this stage and fingerprint below `root`, and delete what does not belong there.

        Args:
            stage: the pipeline stage, `train@cot`.
            fingerprint: of all it depends on; see `coconut.pipeline.inputs`.
            tensors_file: writes and reads the tensors.
            root: where `.resume` is; by default `$DVC_ROOT`, or the working directory without DVC.
            save_every_s: seconds between two saves, if saving is cheap; see `is_due`.
            lock_wait_s: seconds to wait for another trainer that may be ending.
            is_writer: False for the processes that only read what the main process of their training has locked.

        Raises:
            OSError: another trainer uses the folder.
        """
        store = cls(stage, fingerprint, tensors_file, root=root, save_every_s=save_every_s)
        if not is_writer:
            yield store
            return
        with _locked(store.folder, lock_wait_s):
            _tidy(store.folder)
            yield store

    def load(self) -> State | None:
        """Return the newest undamaged state; None when there is nothing to resume from."""
        self._is_loaded = True
        paths = state_paths(self.folder)
        for path in paths:
            try:
                state = read_state(path, self._fingerprint, self._tensors_file)
            except DamagedError as damage:
                logger.warning("{}: damaged resume state: {}; trying the one before it", path, damage)
                continue
            resumed = logger.bind(event="resumed", update=state.update)
            resumed.info("{}: resumed at update {} from {}", self._stage, state.update, path)
            self._good = path
            self._resumed_from = state.update
            return state
        if paths:
            logger.warning("{}: no undamaged resume state is left: {} starts over", self.folder, self._stage)
        return None

    def warn_if_slow(self, num_bytes: int) -> None:
        """Warn at the start if a state of this size takes longer to save than a stop signal leaves time for.

        A small part of it is written to measure the disk.
        """
        if (seconds := self._measure_s(num_bytes)) > GRACE_S:
            logger.warning(
                "{}: a state of {} takes about {:.0f} s to save on this disk, but {} s after a stop signal the process"
                " ends: what was trained since the last regular save would be lost. Let `.resume` be a link to a"
                " folder on a faster disk, or save more often (`runtime.save_every_s`)",
                *(self.folder, amount(num_bytes), seconds, GRACE_S),
            )

    def is_due(self) -> bool:
        """Say whether it is time to save: `save_every_s` after the last save, and later where saving is slow."""
        return self._pacing.is_due()

    def save(self, state: State) -> None:
        """Write `state` as the newest one, keep the good one before it, and delete older ones.

        Raises:
            OSError: the disk is full, or failing. The last good state is as it was.
        """
        assert self._is_loaded, "load() first: it finds out which state is good"
        start = time.monotonic()
        temporary = self.folder / f"tmp-{os.getpid()}"
        try:
            path = path_after(self.folder, self._good)
            remove(temporary)
            write_state(temporary, state, self._fingerprint, self._tensors_file)
            remove(path)
            temporary.rename(path)
            flush(self.folder)
        except OSError as error:
            with contextlib.suppress(OSError):
                remove(temporary)
            raise self._complaint(error) from error
        self._remove_all_but(path, self._good)
        self._good = path
        seconds = time.monotonic() - start
        if self._pacing.note_save(seconds):
            logger.info(
                "{}: saving the state took {:.1f} s, so that it is saved every {:.0f} s and not every {:g} s"
                " (runtime.save_every_s)",
                *(self._stage, seconds, self._pacing.pause_s, self._pacing.save_every_s),
            )

    def keep_newest_alone(self) -> None:
        """Delete the states before the newest one, once the stage has written its outputs.

        The newest is what a stage that DVC runs once more finishes from, without an update: after a change of
        `min_accuracy`, say. `coconut prune` deletes it too.
        """
        self._remove_all_but(self._good)

    def num_bytes(self) -> int:
        """Return what the states that lie here take on the disk."""
        return sum(size_of(path) for path in state_paths(self.folder))

    def write_progress(self, update: int, *, num_updates: int, loss: float, eta_s: float | None) -> None:
        """Say where training is, for `coconut status` in another terminal. Losing it costs nothing."""
        progress = {
            "stage": self._stage,
            "update": update,
            "num_updates": num_updates,
            "loss": loss,
            "eta_s": eta_s,
            "resumed_from": self._resumed_from,
            "started": self._started,
            "time": time.time(),
            "pid": os.getpid(),
        }
        try:
            replace_file(self.folder / _PROGRESS, json.dumps(progress))
        except OSError as error:
            logger.warning("{}; `coconut status` does not know the progress", explain(error))

    def _measure_s(self, num_bytes: int) -> float:
        """Seconds that it takes to write so many bytes here and have them on the disk."""
        probe = self.folder / f"tmp-{os.getpid()}"
        size = min(num_bytes, _PROBE_BYTES)
        start = time.monotonic()
        try:
            probe.write_bytes(os.urandom(size))  # Zeros some file systems would not write.
            flush(probe)
            return (time.monotonic() - start) * num_bytes / max(1, size)
        except OSError:
            return 0.0  # What cannot be written is found, and said, by others.
        finally:
            with contextlib.suppress(OSError):
                remove(probe)

    def _remove_all_but(self, *kept: Path | None) -> None:
        for old in state_paths(self.folder):
            if old not in kept:
                try:
                    remove(old)
                except OSError as error:
                    logger.warning("{}: an old state could not be deleted: {}", old, explain(error))

    def _complaint(self, error: OSError) -> OSError:
        intact = "no state was saved before" if self._good is None else f"the last good state, {self._good}, is intact"
        free = amount(shutil.disk_usage(self.folder).free)
        what = f"the resume state could not be saved ({error.strerror or error}; {free} free): {intact}"
        cure = cure_of(error, "")
        what = f"{what}, and training continues from there" + (f"; {cure}" if cure else "")
        return OSError(error.errno or errno.EIO, what, str(self.folder))


def resume_dir(root: Path | None = None) -> Path:
    """The folder that holds the states of all stages."""
    return (root or Path(os.environ.get("DVC_ROOT", "."))) / ".resume"


@contextlib.contextmanager
def _locked(folder: Path, timeout_s: float) -> Iterator[None]:
    if not folder.is_dir():
        remove(folder)  # A file, or a link that leads nowhere.
    lock = wait_for_lock(folder / "lock", timeout_s)
    if lock is None:
        raise system_error(
            errno.EBUSY,
            f"{folder}: in use by another trainer for the last {timeout_s:.0f} s; two must never share"
            " a resume state: wait for it, or end it, and run `dvc repro` again",
        )
    with lock:
        yield


def _tidy(folder: Path) -> None:
    """Delete what a kill left half written, and whatever else is no part of the store."""
    for path in folder.iterdir():
        is_state = is_state_name(path.name) and path.is_dir()
        is_file = path.name in ("lock", _PROGRESS) and path.is_file()
        if not (is_state or is_file or is_limits_file(path)):
            try:
                remove(path)
            except OSError as error:
                logger.warning("{}: does not belong there, but could not be deleted: {}", path, explain(error))
