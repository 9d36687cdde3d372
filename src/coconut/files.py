"""Files: room on the disk, whole writes, digests, and what an error of the system means."""

import errno
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

_CURES = {
    number: cure
    for numbers, cure in (
        ((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room on its disk and run `dvc repro` again"),
        ((errno.EACCES, errno.EPERM, errno.EROFS), "mend the permissions and run `dvc repro` again"),
        (
            (errno.EEXIST, errno.ENOTDIR, errno.EISDIR),
            "move away what stands there, or in place of a folder above it",
        ),
        ((errno.ENOENT,), "`dvc repro` makes what the pipeline itself has to make"),
        ((errno.ENAMETOOLONG,), "take a shorter name"),
    )
    for number in numbers
}
"""What to do about an error of the system, by its number."""


def explain(error: Exception) -> str:
    """Say what an error means to a user; the system's own ones, which name a path at best, get a cure.

    >>> explain(FileExistsError(17, "File exists", "outputs/report"))
    'outputs/report: File exists; move away what stands there, or in place of a folder above it'
    >>> explain(ValueError("a sentence of ours"))
    'a sentence of ours'
    """
    if not isinstance(error, OSError) or error.errno not in _CURES:
        return str(error)
    place = "" if error.filename is None else f"{error.filename}: "
    return f"{place}{error.strerror}; {_CURES[error.errno]}"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name `path` in an error of the system that names none, as that of a disk which fills up while it is written.

    Raises:
        OSError: what was raised within, with its place.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


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
            raise OSError(
                f"{path}: {free / 1e6:.0f} MB free on its disk, {wanted[device] / 1e6:.0f} MB wanted for what"
                " the stage writes; make room (`coconut prune` deletes old states) and start again"
            )


def digest_path(path: Path) -> str:
    """SHA-256 of a file's bytes, or of a folder's relative paths and bytes without Python's caches."""
    if not path.is_dir():
        return digest_file(path)
    return sha256_of_text(json.dumps([[name, digest_file(path / name)] for name in _files(path)]))


def _files(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and "__pycache__" not in relative.parts and path.suffix != ".pyc":
            yield relative.as_posix()


def digest_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: a dependency in dvc.yaml, but no such file; run `dvc repro`") from None


def sha256_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
