"""Files of named tensors: weights, a trained thought, an optimiser's moments, a resume state."""

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from coconut.config.messages import first_line
from coconut.data.documents import describe_foreign
from coconut.files import remove

RESTORE = "`dvc repro` restores the checkpoint"
_SYSTEM_ERROR = re.compile(r"os error (\d+)")
_MAX_HEADER_BYTES = 16 << 20
"""A header of 100,000 tensors takes 10 MB; one far larger would take minutes to parse."""


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors, of which no two may share memory, so that every user of a shared cache can read them.

    Raises:
        OSError: naming the file.
    """
    # safetensors writes to a file with a random name first, which a kill leaves behind: here the next call finds it.
    partial = path.with_name(f"{path.name}.partial")
    try:
        remove(partial)
        partial.mkdir()
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, partial / path.name)
        (partial / path.name).chmod(0o644)  # safetensors writes 0600.
        (partial / path.name).replace(path)
        partial.rmdir()
    except SafetensorError as error:
        match = _SYSTEM_ERROR.search(str(error))
        number = int(match[1]) if match else errno.EIO
        raise OSError(number, os.strerror(number) if match else str(error), str(path)) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read what `save_tensors` wrote, where a checksum has shown that the file is whole."""
    return load_file(path)


def read_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """Read a file of tensors that may be damaged.

    Args:
        what: the file holds, for the message.

    Raises:
        ValueError: if the file is missing, damaged or of another kind.
    """
    try:
        check_header(path)
        return load_file(path)
    except Exception as error:
        found = first_line(error).removeprefix(f"{path}: ")
        raise ValueError(
            f"{path}: {what} cannot be read: {found}; wanted a whole safetensors file; {RESTORE}"
        ) from error


def check_header(path: Path) -> None:
    """Look at a safetensors file before its tensors are read: its first bytes, and its header.

    Raises:
        ValueError: if the file is missing, of another kind, cut short, or its header is too long to be one.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(1024)
    except OSError as error:
        found = error.strerror or str(error)
        raise ValueError(f"{path}: found no file to read ({found}), wanted safetensors weights; {RESTORE}") from None
    num_bytes = int.from_bytes(head[:8], "little")
    is_damaged = size < 8 or num_bytes > size - 8
    if is_damaged and (foreign := describe_foreign(head)):
        raise ValueError(f"{path}: {foreign}")
    if not is_damaged and num_bytes > _MAX_HEADER_BYTES:
        raise ValueError(
            f"{path}: found a header of {num_bytes} bytes, wanted at most {_MAX_HEADER_BYTES}, which is room for"
            " 100,000 tensors; split the weights into several files, or fetch them again"
        )
    try:
        with safe_open(path, framework="pt"):
            pass
    except Exception as error:
        raise ValueError(
            f"{path}: its safetensors file is damaged or cut short ({first_line(error)}), wanted a whole one;"
            f" fetch or write it again, or {RESTORE}"
        ) from error
