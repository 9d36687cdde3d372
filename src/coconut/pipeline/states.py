"""The files of a resume state: how a state is written and read, and which of those in a folder are states.

    state-00000007/
        tensors.safetensors
        state.json           line 1: SHA-256 of line 2; line 2: the record, and SHA-256 of the tensors

Every byte is covered by a checksum: SHA-256 reads 1.9 GB/s here, faster than disks write, so a cheaper one would gain
nothing. Tensors are written and read by two functions that the training side gives.
"""

import contextlib
import errno
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coconut.files import digest_file, flush

_TENSORS, _RECORD = "tensors.safetensors", "state.json"
_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO)
"""Errors that will come again. After others, as of a network disk that is away, starting over would lose the states."""
_NAME = re.compile(r"state-(\d{8})")

Tensors = Mapping[str, Any]


@dataclass(frozen=True)
class State:
    """Everything a stage needs to go on as if it had not been stopped."""

    update: int
    """Updates done; for messages and for `overnight`, which asks whether there was progress."""
    tensors: Tensors
    """Weights, optimizer state, generator states: all that is numbers. No two may share memory."""
    record: dict[str, Any]
    """Epoch, place in its order, history rows: all that is JSON."""


@dataclass(frozen=True)
class TensorsFile:
    """The two functions with which the training side writes and reads the tensors of a state."""

    write: Callable[[Tensors, Path], None]
    """Raises OSError."""
    read: Callable[[Path], Tensors]


class DamagedError(Exception):
    """A state whose bytes are not the ones that were written."""


def write_state(folder: Path, state: State, fingerprint: str, tensors_file: TensorsFile) -> None:
    """Write a state into a new folder, and have it on the disk.

    Raises:
        OSError: the disk is full, or failing.
    """
    folder.mkdir()
    tensors_file.write(state.tensors, folder / _TENSORS)
    body = {
        "fingerprint": fingerprint,
        "update": state.update,
        "tensors_sha256": digest_file(folder / _TENSORS),
        "record": state.record,
    }
    line = json.dumps(body).encode()
    (folder / _RECORD).write_bytes(hashlib.sha256(line).hexdigest().encode() + b"\n" + line)
    for path in (folder / _TENSORS, folder / _RECORD, folder):
        flush(path)


def read_state(path: Path, fingerprint: str, tensors_file: TensorsFile) -> State:
    """Read what `write_state` wrote.

    Raises:
        DamagedError: it is not what was written, or of another fingerprint.
        OSError: nothing may be damaged, but it cannot be read now, or not by this user.
    """
    try:
        body = _read_record(path)
        if digest_file(path / _TENSORS) != body["tensors_sha256"]:
            raise DamagedError(f"{_TENSORS} does not match its checksum")
    except OSError as error:
        if error.errno not in _DAMAGE:
            raise
        raise DamagedError(str(error)) from None
    if body["fingerprint"] != fingerprint:
        raise DamagedError("it belongs to other inputs")
    return State(body["update"], tensors_file.read(path / _TENSORS), body["record"])


def is_state_name(name: str) -> bool:
    """Say whether a folder of this name may hold a state."""
    return _NAME.fullmatch(name) is not None


def state_paths(folder: Path) -> list[Path]:
    """The folders of states, newest first."""
    return sorted((path for path in folder.glob("state-*") if is_state_name(path.name)), reverse=True)


def path_after(folder: Path, good: Path | None) -> Path:
    """Return where the next state goes: one after the good one. What lies there is a damaged state."""
    match = None if good is None else _NAME.fullmatch(good.name)
    return folder / f"state-{int(match[1]) + 1 if match else 1:08d}"


def last_update(folder: Path) -> int | None:
    """Update of the newest readable state in the folder of a stage; None without one."""
    for path in state_paths(folder):
        with contextlib.suppress(OSError, DamagedError):
            return int(_read_record(path)["update"])
    return None


def _read_record(path: Path) -> dict[str, Any]:
    if not ((path / _RECORD).is_file() and (path / _TENSORS).is_file()):
        raise DamagedError(f"it lacks {_RECORD} or {_TENSORS}")
    checksum, _, line = (path / _RECORD).read_bytes().partition(b"\n")
    if hashlib.sha256(line).hexdigest().encode() != checksum:
        raise DamagedError(f"{_RECORD} does not match its checksum")
    body: dict[str, Any] = json.loads(line)
    return body
