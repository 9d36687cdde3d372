"""Files: free space, atomic writes, digests, locks, and what an error of the system means to a user."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_CAN_PASS = (*_NO_ROOM, errno.EBUSY, errno.EAGAIN, errno.ENFILE, errno.ETXTBSY, errno.ESTALE, errno.ETIMEDOUT)
_CURES = {
    number: cure
    for numbers, cure in (
        (_NO_ROOM, "make room on its disk and run `dvc repro` again"),
        ((errno.EFBIG,), "the limit on the size of a file is too low: raise it (`ulimit -f unlimited`), or move to a"
         " file system that holds larger files, and run `dvc repro` again"),
        ((errno.EACCES, errno.EPERM), "fix the permissions and run `dvc repro` again"),
        ((errno.EROFS,), "its disk is mounted read-only: mount it writable, or work in a folder on another disk"),
        ((errno.EEXIST, errno.ENOTDIR, errno.EISDIR), "move away what stands there, or in place of a folder above it"),
        ((errno.ENOENT,), "`dvc repro` makes what the pipeline itself has to make"),
        ((errno.ENAMETOOLONG,), "take a shorter name"),
        ((errno.ELOOP,), "the link leads to itself: remove it"),
        ((errno.EMFILE, errno.ENFILE), "close other programs, or raise the limit on open files (`ulimit -n`)"),
        ((errno.ENOMEM, errno.EAGAIN), "the machine has too little memory or too many processes: end other programs"),
        ((errno.EIO, errno.ESTALE), "its disk reports an error: check the disk or the network mount"),
    )
    for number in numbers
}  # fmt: skip
"""What to do about an error of the system, by its number."""
_ORDINARY = (*_NO_ROOM, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
_OS_ERROR = re.compile(r"os error (\d+)")


# --- errors of the system ---


def explain(error: BaseException) -> str:
    """Say what an error means to a user; the system's own ones, which name a path at best, get a cure.

    >>> explain(FileExistsError(17, "File exists", "outputs/report"))
    'outputs/report: File exists; move away what stands there, or in place of a folder above it'
    >>> explain(ValueError("a sentence of ours"))
    'a sentence of ours'
    """
    # An error with a text of ours holds nothing but this text.
    if not isinstance(error, OSError) or error.strerror is None or error.errno is None:
        return str(error) or type(error).__name__
    place = "" if error.filename is None else f"{error.filename}: "
    cure = _CURES.get(error.errno)
    return f"{place}{error.strerror}" + (f"; {cure}" if cure else "")


def cure_of(error: BaseException | None, otherwise: str) -> str:
    """Say what to do about an error of the system, or about the one that caused it.

    Args:
        otherwise: of a full disk, of permissions, of what stands in the way, and of what is unknown.

    >>> cure_of(OSError(errno.EROFS, "Read-only file system"), "ask")
    'its disk is mounted read-only: mount it writable, or work in a folder on another disk'
    >>> cure_of(ValueError("os error 27"), "ask")[:51], cure_of(ValueError(), "ask")
    ('the limit on the size of a file is too low: raise i', 'ask')
    """
    while error is not None:
        named = _OS_ERROR.search(str(error))  # As the writers of weights say it.
        number = getattr(error, "errno", None) or (named and int(named[1]))
        if number in _CURES and number not in _ORDINARY:
            return _CURES[number]
        error = error.__cause__
    return otherwise


def can_pass(error: BaseException | None) -> bool:
    """Say whether time can cure an error, or the one that caused it: a full disk, a lock that somebody else holds.

    >>> can_pass(OSError(errno.ENOSPC, "No space left on device")), can_pass(OSError(errno.EFBIG, "File too large"))
    (True, False)
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _CAN_PASS:
            return True
        error = error.__cause__
    return False


def system_error(number: int, message: str) -> OSError:
    """Make an `OSError` that has a text of ours and still the number that tells `can_pass` what it is."""
    error = OSError(message)
    error.errno = number
    return error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Add `path` to an error of the system that names no file, such as that of a disk which fills up.

    Raises:
        OSError: what was raised within, with its place.
    """
    try:
        yield
    except OSError as error:
        # An error with a text of ours names its place there.
        if error.errno is None or error.strerror is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


# --- room ---


def check_free_space(needs: Mapping[Path, int]) -> None:
    """Check before a stage begins its work that what it is going to write will fit.

    Args:
        needs: bytes to be written below each path; needs on one file system add up. A path may not exist yet.

    Raises:
        OSError: naming the path, what is free and what is wanted.
    """
    wanted: dict[int, int] = {}
    for path, num_bytes in needs.items():
        folder = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
        device = folder.stat().st_dev
        wanted[device] = wanted.get(device, 0) + num_bytes
        free = shutil.disk_usage(folder).free
        if free < wanted[device]:
            raise system_error(
                errno.ENOSPC,
                f"{path}: {amount(free)} free on its disk, {amount(wanted[device])} wanted for what the stage writes;"
                f" make room for {amount(wanted[device] - free)} more (`coconut prune` deletes old states) and start"
                " again",
            )


def amount(num_bytes: float) -> str:
    """Write a number of bytes with a unit that leaves three digits.

    >>> [amount(n) for n in (0, 999, 4096, 10_000_000, 11_234_000_000)]
    ['0 bytes', '999 bytes', '4.1 kB', '10 MB', '11.2 GB']
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f}".removesuffix(".0") + f" {unit}"
    return f"{num_bytes:.0f} bytes"


# --- writing and removing ---


def replace_file(path: Path, content: bytes | str) -> None:
    """Write a file, all of it or nothing: to a file next to it, which is then renamed.

    What DVC's cache shares with `path` through a link keeps its bytes.

    Raises:
        OSError: naming `path`, which is as it was.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with writing(path):
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            temporary.replace(path)
    except OSError:
        # What a full disk took of it would only take up room there.
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def remove(path: Path) -> None:
    """Delete whatever stands at `path`: a file, a link (not what it leads to), a folder, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have the disk write what the system still holds of a file, or of a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; what a link leads to does not count."""
    paths = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
    return sum(one.lstat().st_size for one in paths if not one.is_dir())


# --- digests ---


def digest_path(path: Path) -> str:
    """SHA-256 of a file's bytes, or of a folder's relative paths and bytes without Python's caches."""
    if not path.is_dir():
        return digest_file(path)
    return sha256_of([[name, digest_file(path / name)] for name in files_below(path)])


def files_below(folder: Path) -> list[str]:
    """Relative paths of all files in a folder, sorted, without Python's caches."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix != ".pyc" and path.is_file())
    return sorted(path.as_posix() for path in paths if "__pycache__" not in path.parts)


def digest_file(path: Path, algorithm: str = "sha256") -> str:
    """Hexadecimal digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def sha256_of(value: object) -> str:
    """SHA-256 of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


# --- locks ---


def try_lock(path: Path) -> IO[bytes] | None:
    """Lock a file, which is created, and return it open: it holds the lock. None while somebody else has it.

    A folder, a pipe or a link that leads nowhere is no lock file, and is replaced by one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        remove(path)
    lock = path.open("ab+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The file may have been deleted between open and flock: then this lock is nobody's.
        if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    lock.close()
    return None


def wait_for_lock(path: Path, timeout_s: float) -> IO[bytes] | None:
    """`try_lock` until it succeeds; None after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while (lock := try_lock(path)) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return lock


def is_locked(path: Path) -> bool:
    """Say whether somebody holds the lock; not, as far as we know, where we may not even read it.

    A shared lock, for a moment: it needs no right to write, unlike `try_lock`, and only an exclusive one refuses it.
    """
    if not path.is_file():
        return False
    try:
        with path.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
