"""`dvc.lock`, DVC's record of finished stages: read, copied while it is whole, and replaced when a kill has torn it.

DVC writes it in place. With a torn one it refuses to work or, where what is left happens to be YAML, runs finished
stages again. So a copy is kept of the last whole one; what it lacks DVC takes from its run cache, in seconds.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coconut.config.strict import find_merge, parse_yaml
from coconut.files import digest_file, explain, files_below, replace_file
from coconut.pipeline.processes import find_dvc

_WHOLE_COPY = Path(".dvc/tmp/dvc.lock.whole")
_TORN_COPY = Path(".dvc/tmp/dvc.lock.torn")
_MOST_HASHED_BYTES = 50_000_000
_MD5 = re.compile(r"[0-9a-f]{32}(\.dir)?")


@dataclass(frozen=True)
class Record:
    """The part of `dvc.lock` about one stage."""

    cmd: str
    params: dict[str, Any] = field(default_factory=dict)
    """Values by dotted key."""
    deps: dict[str, str | None] = field(default_factory=dict)
    """MD5 by path."""
    outs: dict[str, str | None] = field(default_factory=dict)
    """MD5 by path."""
    sizes: dict[str, int | None] = field(default_factory=dict)
    """Bytes of outputs by path."""


def read_records(root: Path) -> dict[str, Record | None]:
    """Every stage that `dvc.lock` names, None where its record is damaged; no stages when the file is torn."""
    try:
        return parse_records((root / "dvc.lock").read_bytes())
    except OSError:
        return {}


def parse_records(content: bytes) -> dict[str, Record | None]:
    """`read_records` of a file's content."""
    try:
        tree = parse_yaml(content, "dvc.lock")
    except ValueError:
        return {}
    stages = tree.get("stages") if isinstance(tree, dict) else None
    return {name: _parse(body) for name, body in stages.items()} if isinstance(stages, dict) else {}


def _parse(body: Any) -> Record | None:
    try:
        deps, outs = ({file["path"]: file.get("md5") for file in body.get(key, [])} for key in ("deps", "outs"))
        sizes = {file["path"]: file.get("size") for file in body.get("outs", [])}
        if not all(size is None or isinstance(size, int) for size in sizes.values()):
            return None
        return Record(str(body["cmd"]), dict(body.get("params", {}).get("params.yaml", {})), deps, outs, sizes)
    except (TypeError, KeyError, ValueError, AttributeError):
        return None


def is_whole(content: bytes) -> bool:
    """Say whether a `dvc.lock` is as DVC writes it, down to its last byte.

    One with the marks of a merge counts as whole: what it should hold only its owner can say.
    """
    if b"<<<<<<<" in content or _find_merge(content) is not None:
        return True
    try:
        stages = parse_yaml(content, "dvc.lock")["stages"].values()
        files = [file for stage in stages for key in ("deps", "outs") for file in stage.get(key, [])]
        is_complete = all(stage["cmd"] for stage in stages) and all(_MD5.fullmatch(file["md5"]) for file in files)
    except (ValueError, TypeError, KeyError, AttributeError):
        return False
    return is_complete and content.endswith(b"\n")


def _find_merge(content: bytes) -> str | None:
    return find_merge(content.decode(errors="replace"))


def describe_damage(content: bytes) -> str:
    """Say why a `dvc.lock` is not as DVC writes it, and what to do; nothing where it is.

    Without one whole, what it lacks is not known: its stages may have run all the same.
    """
    if merge := _find_merge(content):
        return f"dvc.lock: {merge} (`git checkout --ours dvc.lock`, or --theirs), then run `dvc repro`"
    if not is_whole(content):
        return (
            "dvc.lock: not whole, as after a kill: `coconut repair` or `coconut repro` brings the last whole one back"
        )
    return ""


def damage_of(root: Path) -> str:
    """`describe_damage` of a work tree; nothing where it has no `dvc.lock`."""
    try:
        return describe_damage((root / "dvc.lock").read_bytes())
    except OSError:
        return ""


def refuse_merge(root: Path) -> None:
    """Refuse a `dvc.lock` of which nobody but its owner can say what it should hold.

    Raises:
        ValueError: it holds the marks of a merge.
    """
    path = root / "dvc.lock"
    if path.is_file() and _find_merge(content := path.read_bytes()):
        raise ValueError(describe_damage(content))


def keep_copy_or_say(root: Path, say: Callable[[str], object]) -> None:
    """`keep_copy`, but a failure is only said: the copy saves time after a kill, and the stages are worth more."""
    try:
        keep_copy(root)
    except OSError as error:
        say(f"{explain(error)}: no copy of dvc.lock was kept, the one before it stays")


def keep_copy(root: Path) -> None:
    """Keep a copy of `dvc.lock`, unless it is torn or being written.

    Raises:
        OSError: the disk is full, say. The copy before it is as it was.
    """
    path = root / "dvc.lock"
    content = path.read_bytes() if path.exists() else b""
    if is_whole(content):
        replace_file(root / _WHOLE_COPY, content)


def repair_record(root: Path) -> list[str]:
    """Replace a torn `dvc.lock` by the last whole one; say in a sentence what was done."""
    path, aside, copy = root / "dvc.lock", root / _TORN_COPY, root / _WHOLE_COPY
    if not path.exists() or is_whole(path.read_bytes()):
        return []
    if (living := find_dvc(root)) is not None:
        return [f"{path}: not whole, but dvc runs here (pid {living}) and may be writing it; left as it is"]
    path.replace(aside)
    back = "there is no copy of a whole one"
    # A copy that went to the disk as the power failed can be torn, too.
    if copy.exists() and is_whole(copy.read_bytes()):
        copy.replace(path)
        back = "the last whole one is back"
    return [f"{path}: torn by a kill; moved to {aside}, {back}, the rest is in DVC's run cache"]


def is_as_recorded(path: Path, record: Record, out: str) -> bool:
    """Say whether what lies at `path` is the output that the stage's run left.

    Of a large one the size alone is compared, so that `coconut status` answers at once.
    """
    recorded, size = record.outs.get(out), record.sizes.get(out)
    if recorded is None or size is None or size <= _MOST_HASHED_BYTES:
        return recorded == md5_as_dvc(path)
    files = [path / name for name in files_below(path)] if path.is_dir() else [path]
    return size == sum(file.stat().st_size for file in files)


def describe_difference(path: Path, root: Path) -> str:
    """Say that an output is not the one which `dvc.lock` names; nothing where it is, or `dvc.lock` does not name it."""
    out = Path(os.path.relpath(path, root)).as_posix()
    recorded = next((one.outs[out] for one in read_records(root).values() if one is not None and out in one.outs), None)
    if recorded is None or recorded == md5_as_dvc(path):
        return ""
    return f"{path}: not what dvc.lock names: it is of another run, or damaged; `dvc repro` makes it anew"


def md5_as_dvc(path: Path) -> str | None:
    """MD5 of a file, or of a folder's list of files, as in `dvc.lock`; None when there is nothing we may read."""
    if path.is_dir():
        entries = [{"md5": md5_as_dvc(path / name), "relpath": name} for name in files_below(path)]
        return md5_of(json.dumps(entries, sort_keys=True).encode()) + ".dir"
    try:
        return digest_file(path, "md5")
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None


def md5_of(content: bytes) -> str:
    """MD5 of bytes, as in `dvc.lock`."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
