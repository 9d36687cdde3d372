"""Files of named tensors: weights, a trained thought, an optimizer's state, a resume state."""

import errno
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from coconut.config.messages import first_line
from coconut.data.documents import describe_foreign
from coconut.files import remove
from coconut.shards import is_shard, whole

RESTORE = "`dvc repro` restores the checkpoint"
_SYSTEM_ERROR = re.compile(r"os error (\d+)")
_DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
}
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
        if any(is_shard(tensor) for tensor in tensors.values()):
            _write_gathered(tensors, partial / path.name)
        else:
            save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, partial / path.name)
        (partial / path.name).chmod(0o644)  # safetensors writes 0600.
        (partial / path.name).replace(path)
        partial.rmdir()
    except SafetensorError as error:
        match = _SYSTEM_ERROR.search(str(error))
        number = int(match[1]) if match else errno.EIO
        raise OSError(number, os.strerror(number) if match else str(error), str(path)) from error


def _write_gathered(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors of which each process holds a part, one after the other, so that only one is ever whole.

    The other processes take part by `shards.give_shards`. Names are written in order, as it goes through them.
    """
    header: dict[str, Any] = {}
    end = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # Tensors begin at a multiple of 8 bytes.
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(tensors):
            gathered = whole(tensors[name].detach()).cpu().contiguous()
            file.write(gathered.reshape(-1).view(torch.uint8).numpy().tobytes())


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


def read_dtypes(path: Path) -> dict[str, str]:
    """Return the type of each tensor of a safetensors file that `check_header` has passed, as its header names it."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


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
