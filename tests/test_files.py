"""Room, whole writes, digests, locks, and what an error of the system means."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from coconut.files import (
    amount,
    can_pass,
    check_free_space,
    digest_path,
    explain,
    is_locked,
    remove,
    replace_file,
    size_of,
    system_error,
    try_lock,
    writing,
)

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def ten_mb_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 10_000_000))


@pytest.mark.usefixtures("ten_mb_free")
def test_too_little_free_space_is_found_before_the_start(tmp_path: Path) -> None:
    not_yet_there = tmp_path / "outputs/cot"
    check_free_space({not_yet_there: 10_000_000})
    with pytest.raises(OSError, match=r"cot: 10 MB free on its disk, 11 MB wanted .*make room for 1 MB more") as raised:
        check_free_space({not_yet_there: 11_000_000})
    assert can_pass(raised.value)
    assert explain(raised.value) == str(raised.value)


@pytest.mark.usefixtures("ten_mb_free")
def test_needs_on_one_disk_add_up(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="b: 10 MB free on its disk, 12 MB wanted"):
        check_free_space({tmp_path / "a": 6_000_000, tmp_path / "b": 6_000_000})


def test_a_small_need_is_never_said_to_be_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 4_096))
    with pytest.raises(OSError, match=r"4\.1 kB free on its disk, 10\.2 kB wanted .*make room for 6\.1 kB more"):
        check_free_space({tmp_path: 10_240})


def test_amounts_keep_three_digits() -> None:
    assert [amount(size) for size in (0, 1, 1_000, 68_766_000_000)] == ["0 bytes", "1 bytes", "1 kB", "68.8 GB"]


# --- what an error means ---


@pytest.mark.parametrize(
    ("number", "cure", "passes"),
    [
        (errno.ENOSPC, "make room on its disk", True),
        (errno.EDQUOT, "make room on its disk", True),
        (errno.EFBIG, "ulimit -f", False),
        (errno.EROFS, "mounted read-only", False),
        (errno.EACCES, "fix the permissions", False),
        (errno.EISDIR, "move away what stands there", False),
        (errno.ELOOP, "the link leads to itself", False),
        (errno.EMFILE, "ulimit -n", False),
        (errno.ENOMEM, "too little memory", False),
        (errno.EAGAIN, "too many processes", True),
        (errno.EIO, "check the disk", False),
    ],
)
def test_an_error_of_the_system_has_its_place_and_its_cure_and_no_number(number: int, cure: str, passes: bool) -> None:
    error = OSError(number, os.strerror(number), "outputs/cot")
    assert explain(error).startswith(f"outputs/cot: {os.strerror(number)}; ")
    assert cure in explain(error)
    assert "Errno" not in explain(error)
    assert can_pass(error) == passes


def test_an_unknown_error_of_the_system_shows_no_number_either() -> None:
    assert explain(OSError(errno.ENOTTY, "Not a terminal", "x")) == "x: Not a terminal"
    assert explain(MemoryError()) == "MemoryError"


def test_what_caused_an_error_says_whether_it_can_pass() -> None:
    error = ValueError("outputs/cot: cannot be written")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert can_pass(error)
    assert not can_pass(ValueError("outputs/cot: cannot be written"))


def test_a_place_is_added_to_an_error_that_has_none_and_to_no_other(tmp_path: Path) -> None:
    def message_of(error: OSError) -> str:
        with pytest.raises(OSError, match=r".") as raised, writing(tmp_path):
            raise error
        return explain(raised.value)

    assert message_of(OSError(errno.ENOSPC, "No space left on device")).startswith(f"{tmp_path}: No space left")
    assert message_of(OSError(errno.ENOSPC, "No space left on device", "there")).startswith("there: No space left")
    assert message_of(system_error(errno.ENOSPC, "there: a text of ours")) == "there: a text of ours"


def test_a_limit_on_the_size_of_files_is_named_as_one(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from pathlib import Path; from coconut.files import explain, replace_file\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
        "try: replace_file(Path(sys.argv[1]), 'x' * 100)\n"
        "except OSError as error: print(explain(error))"
    )
    path = tmp_path / "file"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{path}: File too large; the limit on the size of a file is too low: raise it")
    assert list(tmp_path.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 10


# --- whole writes ---


def test_a_file_is_replaced_whole_and_what_a_link_shares_with_it_keeps_its_bytes(tmp_path: Path) -> None:
    cached, path, link = tmp_path / "cached", tmp_path / "file", tmp_path / "link"
    cached.write_text("old")
    path.hardlink_to(cached)
    link.symlink_to(cached)
    for one in (path, link):
        replace_file(one, "new")
        assert one.read_text() == "new"
        assert not one.is_symlink()
    assert cached.read_text() == "old"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["cached", "file", "link"]


def test_what_a_full_disk_took_of_a_file_is_removed_and_the_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    (tmp_path / "file.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: .*/file'"):
        replace_file(path, "new")
    assert path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_removing_follows_no_link_and_needs_nothing_to_be_there(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("x")
    (tmp_path / "link").symlink_to(kept)
    (tmp_path / "folder/below").mkdir(parents=True)
    for name in ("link", "folder", "nothing", "nothing/below"):
        remove(tmp_path / name)
    assert [one.name for one in tmp_path.iterdir()] == ["kept"]
    assert (kept / "file").exists()


def test_the_size_of_a_folder_counts_files_and_no_links(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below/a").write_bytes(b"0" * 10)
    (tmp_path / "b").write_bytes(b"0" * 5)
    (tmp_path / "dangling").symlink_to("x")
    assert size_of(tmp_path) == 15 + len("x")
    assert size_of(tmp_path / "b") == 5


def test_caches_of_python_are_no_part_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("")
    before = digest_path(tmp_path)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__/a.cpython-311.pyc").write_bytes(b"1")
    (tmp_path / "b.pyc").write_bytes(b"1")
    assert digest_path(tmp_path) == before
    (tmp_path / "a.txt").write_text("")
    assert digest_path(tmp_path) != before


# --- locks ---


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return tmp_path / "folder/lock"


def test_a_lock_is_held_by_one_and_seen_by_all(lock: Path) -> None:
    assert not is_locked(lock)
    held = try_lock(lock)
    assert held is not None
    assert is_locked(lock)
    assert try_lock(lock) is None
    held.close()
    assert not is_locked(lock)


@pytest.mark.parametrize("junk", ["folder", "link", "pipe"])
def test_what_is_no_file_is_replaced_by_a_lock(lock: Path, junk: str) -> None:
    lock.parent.mkdir()
    if junk == "folder":
        (lock / "below").mkdir(parents=True)
    elif junk == "link":
        lock.symlink_to("nowhere")
    else:
        os.mkfifo(lock)
    assert not is_locked(lock)
    held = try_lock(lock)
    assert held is not None
    assert is_locked(lock)
    held.close()
