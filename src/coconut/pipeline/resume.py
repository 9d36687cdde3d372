"""The resume state: what a killed training stage continues from.

It lies in `$DVC_ROOT/.resume/<stage>-<fingerprint>/`, outside of what DVC deletes before it runs a
stage, and outside of the temporary work trees of `dvc exp run --temp` and the queue:

    lock                     held (flock) by the one trainer that uses this folder
    progress.json            where it is, for `make status`
    state-00000007/          the newest state; state-00000006/ beside it is the last good one before
        tensors.safetensors
        state.json           line 1: SHA-256 of line 2; line 2: the record, and SHA-256 of the tensors

A state is written to a temporary folder, flushed to the disk and renamed, so that a kill at any
moment leaves the state before it. Every byte is covered by a checksum: SHA-256 reads 1.9 GB/s
here, faster than disks write, so a cheaper one would gain nothing.

Importing this module is cheap, for `make status`: torch is imported where tensors are.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from loguru import logger

if TYPE_CHECKING:
    import torch

SAVING_SHARE = 0.02
"""The most of the training time that saving may take; see `ResumeStore.is_due`."""
LOCK_WAIT_S = 30.0
"""A trainer that was told to stop may still be saving its state (`guard.GRACE_S`)."""

_TENSORS, _RECORD = "tensors.safetensors", "state.json"


@dataclass(frozen=True)
class State:
    """Everything a stage needs to go on as if it had not been stopped."""

    update: int
    """Updates done; for messages and for `overnight`, which asks whether there was progress."""
    tensors: "dict[str, torch.Tensor]"
    """Weights, optimiser moments, generator states: all that is numbers. No two may share memory."""
    record: dict[str, Any]
    """Epoch, place in its order, history rows: all that is JSON."""


class _DamagedError(Exception):
    """A state whose bytes are not the ones that were written."""


class ResumeStore:
    """The states of one pipeline stage with one fingerprint, newest first. Open it with `open`."""

    def __init__(self, folder: Path, stage: str, fingerprint: str) -> None:
        self.folder = folder
        self.saving_seconds = 0.0
        """Spent in `save` so far."""
        self._stage = stage
        self._fingerprint = fingerprint
        self._good: Path | None = None
        self._is_loaded = False
        self._last_save_s = 0.0
        self._last_save_end = self._started = time.time()
        self._resumed_from: int | None = None

    @classmethod
    @contextlib.contextmanager
    def open(cls, stage: str, fingerprint: str, root: Path | None = None) -> "Iterator[ResumeStore]":
        """Lock the folder of this stage and fingerprint below `root`, and tidy what a kill left in it.

        Args:
            stage: the pipeline stage, `train@cot`.
            fingerprint: of all it depends on; see `coconut.pipeline.inputs`.
            root: where `.resume` is; by default `$DVC_ROOT`, or the working directory without DVC.

        Raises:
            OSError: another trainer uses the folder.
        """
        folder = resume_dir(root) / f"{stage}-{fingerprint[:16]}"
        with _locked(folder):
            for leftover in folder.glob("tmp-*"):
                shutil.rmtree(leftover)
            yield cls(folder, stage, fingerprint)

    def load(self) -> State | None:
        """Return the newest undamaged state; None when there is nothing to resume from."""
        self._is_loaded = True
        paths = _state_paths(self.folder)
        for path in paths:
            try:
                state = self._read(path)
            except _DamagedError as damage:
                logger.warning("{}: damaged resume state: {}; trying the one before it", path, damage)
                continue
            logger.info("{}: resumed at update {} from {}", self._stage, state.update, path)
            self._good = path
            self._resumed_from = state.update
            return state
        if paths:
            logger.warning("{}: no undamaged resume state is left: {} starts over", self.folder, self._stage)
        return None

    def is_due(self, every_s: float = 0.0) -> bool:
        """Whether it is time to save: `every_s` after the last save, and no sooner than saving is cheap.

        A save that took 2 s is followed by at least 98 s of training, so that saving stays below
        `SAVING_SHARE` of the time whatever the size of the model and the speed of the disk.
        """
        cheap_s = self._last_save_s * (1 - SAVING_SHARE) / SAVING_SHARE
        return time.time() - self._last_save_end >= max(every_s, cheap_s)

    def save(self, state: State) -> None:
        """Write `state` as the newest one, keep the good one before it, and delete older ones.

        Raises:
            OSError: the disk is full, or failing. The last good state is as it was.
        """
        from safetensors import SafetensorError

        assert self._is_loaded, "load() first: it finds out which state is good"
        start = time.time()
        temporary = self.folder / f"tmp-{os.getpid()}"
        path = _next_path(self.folder)
        try:
            self._write(temporary, state)
            temporary.rename(path)
            _flush(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(self._complaint(error)) from error
        for old in _state_paths(self.folder):
            if old not in (path, self._good):
                shutil.rmtree(old)
        self._good = path
        self._last_save_end = time.time()
        self._last_save_s = self._last_save_end - start
        self.saving_seconds += self._last_save_s

    def num_bytes(self) -> int:
        """What the states that lie here take on the disk."""
        return sum(file.stat().st_size for path in _state_paths(self.folder) for file in path.iterdir())

    def write_progress(self, update: int, *, num_updates: int, loss: float, eta_s: float | None) -> None:
        """Say where training is, for `make status` in another terminal. Losing it costs nothing."""
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
        temporary = self.folder / "progress.json.tmp"
        try:
            temporary.write_text(json.dumps(progress), encoding="utf-8")
            temporary.replace(self.folder / "progress.json")
        except OSError as error:
            logger.warning("{}: progress not written: {}", self.folder, error)

    def _write(self, folder: Path, state: State) -> None:
        from safetensors.torch import save_file

        folder.mkdir()
        tensors = {name: tensor.detach().contiguous() for name, tensor in state.tensors.items()}
        save_file(tensors, folder / _TENSORS)
        body = {
            "fingerprint": self._fingerprint,
            "update": state.update,
            "tensors_sha256": _sha256(folder / _TENSORS),
            "record": state.record,
        }
        line = json.dumps(body).encode()
        (folder / _RECORD).write_bytes(hashlib.sha256(line).hexdigest().encode() + b"\n" + line)
        for path in (folder / _TENSORS, folder / _RECORD, folder):
            _flush(path)

    def _read(self, path: Path) -> State:
        from safetensors.torch import load_file

        try:
            body = _read_record(path)
            if _sha256(path / _TENSORS) != body["tensors_sha256"]:
                raise _DamagedError(f"{_TENSORS} does not match its checksum")
        except PermissionError:
            raise  # Nothing is damaged: whoever is allowed to read it should run this.
        except OSError as error:
            raise _DamagedError(str(error)) from None
        if body["fingerprint"] != self._fingerprint:
            raise _DamagedError("it belongs to other inputs")
        return State(body["update"], load_file(path / _TENSORS), body["record"])

    def _complaint(self, error: Exception) -> str:
        intact = "no state was saved before" if self._good is None else f"the last good state, {self._good}, is intact"
        free = shutil.disk_usage(self.folder).free / 1e6
        return (
            f"{self.folder}: the resume state could not be saved ({error}; {free:.0f} MB free): {intact};"
            " make room and run `dvc repro` again, training continues from there"
        )


def resume_dir(root: Path | None = None) -> Path:
    """The folder that holds the states of all stages."""
    return (root or Path(os.environ.get("DVC_ROOT", "."))) / ".resume"


def last_update(folder: Path) -> int | None:
    """Update of the newest readable state in the folder of a stage; None without one."""
    for path in _state_paths(folder):
        with contextlib.suppress(OSError, _DamagedError):
            return int(_read_record(path)["update"])
    return None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    deadline = time.time() + LOCK_WAIT_S
    while (lock := try_lock(folder)) is None:
        if time.time() > deadline:
            raise OSError(
                f"{folder}: in use by another trainer for the last {LOCK_WAIT_S:.0f} s; two must never share"
                " a resume state: wait for it, or end it, and run `dvc repro` again"
            )
        time.sleep(0.1)
    with lock:
        yield


def try_lock(folder: Path) -> IO[bytes] | None:
    """Lock `folder` and return the open lock file, which holds the lock; None while somebody else has it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / "lock").open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Pruning may have deleted the folder between open and flock: then this lock is nobody's.
        if os.fstat(lock.fileno()).st_ino == (folder / "lock").stat().st_ino:
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    lock.close()
    return None


def _state_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("state-" + 8 * "[0-9]"), reverse=True)


def _next_path(folder: Path) -> Path:
    numbers = [int(path.name.removeprefix("state-")) for path in _state_paths(folder)]
    return folder / f"state-{max(numbers, default=0) + 1:08d}"


def _read_record(path: Path) -> dict[str, Any]:
    checksum, _, line = (path / _RECORD).read_bytes().partition(b"\n")
    if hashlib.sha256(line).hexdigest().encode() != checksum:
        raise _DamagedError(f"{_RECORD} does not match its checksum")
    body: dict[str, Any] = json.loads(line)
    return body


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Have the disk write what the system still holds of a file, or of a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
