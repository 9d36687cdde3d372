import contextlib
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loguru import logger

from coconut.checkpoints.tensors import load_tensors, save_tensors
from coconut.files import can_pass, explain, remove
from coconut.pipeline.resume import ResumeStore, State, TensorsFile, resume_dir
from coconut.pipeline.states import Tensors, last_update

FINGERPRINT = "0123456789abcdef" * 4
TENSORS_FILE = TensorsFile(save_tensors, load_tensors)
FOLDER = ".resume/train@cot-0123456789abcdef"


def make_state(update: int) -> State:
    tensors = {"w": torch.full((2, 3), float(update)), "rng": torch.arange(5, dtype=torch.uint8)}
    return State(update, tensors, {"epoch": 1, "history": [{"loss": 0.1 * update}]})


def save(root: Path, *updates: int) -> None:
    with ResumeStore.open("train@cot", FINGERPRINT, TENSORS_FILE, root=root) as store:
        store.load()
        for update in updates:
            store.save(make_state(update))


def load(root: Path, fingerprint: str = FINGERPRINT) -> State | None:
    with ResumeStore.open("train@cot", fingerprint, TENSORS_FILE, root=root) as store:
        return store.load()


def assert_same(state: State | None, update: int) -> None:
    expected = make_state(update)
    assert state is not None
    assert state.update == update
    assert state.record == expected.record
    assert state.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert state.tensors[name].dtype == tensor.dtype
        assert torch.equal(state.tensors[name], tensor)


def files(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logger.add(lambda line: lines.append(str(line)), level="WARNING", format="{message}")
    yield lines
    logger.remove(handler)


@pytest.fixture
def infos() -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logger.add(lambda line: lines.append(str(line)), level="INFO", format="{message}")
    yield lines
    logger.remove(handler)


def test_what_was_saved_is_loaded(tmp_path):
    assert load(tmp_path) is None
    save(tmp_path, 7)
    assert_same(load(tmp_path), 7)


def test_every_dtype_and_odd_shape_survives_bit_for_bit(tmp_path):
    tensors = {
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        "bf16": torch.randn(3).bfloat16(),
        "long": torch.tensor(2**62),
        "empty": torch.empty(0, 4),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "bool": torch.tensor([True, False]),
    }
    record = {"loss": [0.1, 1e-300, 12345678901234567890], "text": 'ä\n"\u2028', "none": None}
    with ResumeStore.open("train@cot", FINGERPRINT, TENSORS_FILE, root=tmp_path) as store:
        store.load()
        store.save(State(3, tensors, record))
    state = load(tmp_path)
    assert state is not None
    assert state.record == record
    for name, tensor in tensors.items():
        same = state.tensors[name].contiguous().view(-1).view(torch.uint8)
        assert torch.equal(same, tensor.contiguous().view(-1).view(torch.uint8)), name


def test_the_newest_state_and_the_one_before_it_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3, 4)
    assert files(tmp_path / FOLDER) == [
        "lock",
        "state-00000003/state.json",
        "state-00000003/tensors.safetensors",
        "state-00000004/state.json",
        "state-00000004/tensors.safetensors",
    ]


def test_when_the_outputs_are_written_the_newest_state_alone_is_kept(tmp_path):
    save(tmp_path, 1, 2)
    with ResumeStore.open("train@cot", FINGERPRINT, TENSORS_FILE, root=tmp_path) as store:
        store.load()
        store.keep_newest_alone()
    assert [path.name for path in (tmp_path / FOLDER).glob("state-*")] == ["state-00000002"]
    assert_same(load(tmp_path), 2)


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_a_damaged_newest_state_falls_back_to_the_one_before(tmp_path, warnings, name):
    save(tmp_path, 1, 2)
    (tmp_path / FOLDER / "state-00000002" / name).write_bytes(b"")
    assert_same(load(tmp_path), 1)
    assert "state-00000002: damaged resume state" in warnings[0]


def test_after_a_fallback_the_good_state_outlives_the_damaged_one(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / FOLDER / "state-00000002/state.json").write_bytes(b"")
    save(tmp_path, 5)
    assert sorted(path.name for path in (tmp_path / FOLDER).glob("state-*")) == ["state-00000001", "state-00000002"]
    assert_same(load(tmp_path), 5)
    (tmp_path / FOLDER / "state-00000002/state.json").write_bytes(b"")
    assert_same(load(tmp_path), 1)


def test_when_both_states_are_damaged_training_starts_over_and_can_save_again(tmp_path, warnings):
    save(tmp_path, 1, 2)
    for path in (tmp_path / FOLDER).glob("state-*/state.json"):
        path.unlink()
    assert load(tmp_path) is None
    assert "no undamaged resume state is left: train@cot starts over" in warnings[-1]
    save(tmp_path, 3)
    assert_same(load(tmp_path), 3)


@pytest.fixture(scope="module")
def two_states(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("two_states")
    save(root, 1, 2)
    return root


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damaged_byte_or_truncation_gives_a_wrong_state(two_states, data):
    """Damage to the newest state: the one before. Damage to both: nothing. Never anything else."""
    is_damaged = {}
    originals = {}
    try:
        for number in (2, 1):
            is_damaged[number] = number == 2 or data.draw(st.booleans())
            if is_damaged[number]:
                name = data.draw(st.sampled_from(["tensors.safetensors", "state.json"]))
                path = two_states / FOLDER / f"state-0000000{number}" / name
                originals[path] = path.read_bytes()
                path.write_bytes(draw_damage(data, originals[path]))
        state = load(two_states)
        if is_damaged[1]:
            assert state is None
        else:
            assert_same(state, 1)
    finally:
        for path, content in originals.items():
            path.write_bytes(content)


def draw_damage(data, content: bytes) -> bytes:
    place = data.draw(st.integers(0, len(content) - 1))
    match data.draw(st.sampled_from(["flip", "truncate", "insert", "append"])):
        case "flip":
            flipped = content[place] ^ data.draw(st.integers(1, 255))
            return content[:place] + bytes([flipped]) + content[place + 1 :]
        case "truncate":
            return content[:place]
        case "insert":
            return content[:place] + bytes([data.draw(st.integers(0, 255))]) + content[place:]
        case _:
            return content + data.draw(st.binary(min_size=1, max_size=8))


def test_every_single_byte_of_a_small_state_is_covered(tmp_path):
    save(tmp_path, 1)
    for path in sorted((tmp_path / FOLDER / "state-00000001").iterdir()):
        content = path.read_bytes()
        for place in range(len(content)):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            assert load(tmp_path) is None, (path.name, place)
        path.write_bytes(content)
    assert_same(load(tmp_path), 1)


def test_a_state_of_other_inputs_is_neither_used_nor_touched(tmp_path):
    other = "f" * 64
    save(tmp_path, 1)
    before = files(tmp_path / FOLDER)
    assert load(tmp_path, other) is None
    with ResumeStore.open("train@cot", other, TENSORS_FILE, root=tmp_path) as store:
        store.load()
        store.save(make_state(9))
    assert files(tmp_path / FOLDER) == before
    assert_same(load(tmp_path), 1)


def test_a_state_moved_into_the_folder_of_other_inputs_is_refused(tmp_path, warnings):
    save(tmp_path, 1)
    (tmp_path / FOLDER).rename(tmp_path / ".resume/train@cot-ffffffffffffffff")
    assert load(tmp_path, "f" * 64) is None
    assert "it belongs to other inputs" in warnings[0]


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EMFILE, errno.EACCES, errno.ENOMEM])
def test_states_that_cannot_be_read_now_are_not_taken_for_damaged(tmp_path, monkeypatch, number):
    save(tmp_path, 1, 2)

    def fail(path: Path) -> bytes:
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        with pytest.raises(OSError, match=re.escape(os.strerror(number))):
            load(tmp_path)
    assert_same(load(tmp_path), 2)


def test_what_a_kill_left_half_written_is_removed_at_the_next_start(tmp_path):
    save(tmp_path, 1)
    (tmp_path / FOLDER / "tmp-123").mkdir()
    (tmp_path / FOLDER / "tmp-123/tensors.safetensors").write_bytes(b"half")
    (tmp_path / FOLDER / "progress.json.tmp").write_bytes(b"{")
    assert_same(load(tmp_path), 1)
    assert not (tmp_path / FOLDER / "tmp-123").exists()


def test_the_folder_is_below_dvc_root_and_else_below_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("DVC_ROOT", raising=False)
    assert resume_dir() == Path(".resume")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    with ResumeStore.open("train@cot", FINGERPRINT, TENSORS_FILE) as store:
        assert store.folder == tmp_path / FOLDER


class SlowDisk:
    """A clock, and a tensors file whose writing takes as many seconds of it as it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.takes_s = 1000.0, 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        # Clocks that people and servers set must not matter.
        monkeypatch.setattr(time, "time", lambda: 5e9 if self.now > 1200 else 1e9)

    def write(self, tensors: Tensors, path: Path) -> None:
        save_tensors(dict(tensors), path)
        self.now += self.takes_s

    @contextlib.contextmanager
    def store(self, root: Path, save_every_s: float) -> Iterator[ResumeStore]:
        tensors_file = TensorsFile(self.write, load_tensors)
        with ResumeStore.open("train@cot", FINGERPRINT, tensors_file, root=root, save_every_s=save_every_s) as store:
            store.load()
            yield store

    def pause_after_save(self, store: ResumeStore, takes_s: float) -> float:
        """Seconds from the end of a save until the next one is due."""
        self.takes_s = takes_s
        store.save(make_state(1))
        end = self.now
        while not store.is_due():
            self.now += 1
        return self.now - end


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> SlowDisk:
    return SlowDisk(monkeypatch)


def test_saving_waits_until_it_costs_less_than_its_share(tmp_path, slow_disk):
    with slow_disk.store(tmp_path, 60.0) as store:
        assert not store.is_due()
        slow_disk.now += 60
        assert store.is_due()
        assert slow_disk.pause_after_save(store, 0.1) == 60
    with slow_disk.store(tmp_path, 60.0) as store:
        assert slow_disk.pause_after_save(store, 2.0) == 98


def test_one_slow_save_does_not_end_periodic_saving(tmp_path, slow_disk):
    with slow_disk.store(tmp_path, 60.0) as store:
        assert slow_disk.pause_after_save(store, 600.0) == 600, "as long as the only save there was"
        assert slow_disk.pause_after_save(store, 1.0) == 60
        assert slow_disk.pause_after_save(store, 600.0) == 60, "a stall among fast saves"


@pytest.mark.parametrize(
    ("takes_s", "save_every_s", "pause_s"), [(5, 60, 240), (100, 60, 240), (300, 60, 300), (1, 600, 600)]
)
def test_no_pause_is_longer_than_four_intervals_unless_a_save_takes_longer(
    tmp_path, slow_disk, takes_s, save_every_s, pause_s
):
    with slow_disk.store(tmp_path, save_every_s) as store:
        for _ in range(3):
            assert slow_disk.pause_after_save(store, takes_s) == pause_s


def test_a_pause_that_is_longer_than_asked_for_is_said_once(tmp_path, slow_disk, infos):
    with slow_disk.store(tmp_path, 60.0) as store:
        for _ in range(4):
            slow_disk.pause_after_save(store, 2.0)
    assert [line for line in infos if "saving" in line] == [
        "train@cot: saving the state took 2.0 s, so that it is saved every 98 s and not every 60 s"
        " (runtime.save_every_s)\n"
    ]


def test_a_disk_too_slow_for_the_grace_of_a_stop_signal_is_known_at_the_start(tmp_path, monkeypatch, warnings):
    fsync = os.fsync

    def crawl(descriptor: int) -> None:
        time.sleep(0.2)
        fsync(descriptor)

    with ResumeStore.open("train@cot", FINGERPRINT, TENSORS_FILE, root=tmp_path) as store:
        store.warn_if_slow(10_000_000)
        assert warnings == []
        monkeypatch.setattr(os, "fsync", crawl)  # At most 32 MB in .2 s, 160 MB/s.
        store.warn_if_slow(500_000_000)
        assert warnings == []
        store.warn_if_slow(5_000_000_000)
        assert re.search(r"a state of 5 GB takes about \d+ s to save on this disk", warnings[0])
        assert "25 s after a stop signal the process ends" in warnings[0]
    assert files(tmp_path) == [f"{FOLDER}/lock"]


def test_a_state_is_on_the_disk_before_it_has_its_name_and_its_name_before_older_ones_go(tmp_path, monkeypatch):
    """Flushed are the files, the folder that names them, and after the rename the folder above."""
    done: list[str] = []
    fsync, rename, rmtree = os.fsync, Path.rename, shutil.rmtree

    def name_of(path: str | Path) -> str:
        name = Path(path).relative_to(tmp_path / FOLDER.partition("/")[0]).as_posix()
        return re.sub(r"tmp-\d+", "tmp", name.partition("/")[2] or ".")

    monkeypatch.setattr(
        os, "fsync", lambda fd: (done.append(f"flush {name_of(Path(f'/proc/self/fd/{fd}').readlink())}"), fsync(fd))
    )
    monkeypatch.setattr(Path, "rename", lambda path, to: (done.append(f"rename {name_of(to)}"), rename(path, to))[1])
    monkeypatch.setattr(shutil, "rmtree", lambda path, *_, **__: (done.append(f"delete {name_of(path)}"), rmtree(path)))
    save(tmp_path, 1, 2, 3)
    steps = ["flush tmp/tensors.safetensors", "flush tmp/state.json", "flush tmp"]
    assert done[-6:] == [*steps, "rename state-00000003", "flush .", "delete state-00000001"]


JUNK = {
    "file": lambda path: path.write_bytes(b"junk"),
    "folder": lambda path: (path / "below").mkdir(parents=True),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "pipe": lambda path: os.mkfifo(path),
}
PLACES = [
    "",
    "lock",
    "progress.json",
    "progress.json.tmp",
    "tmp-1",
    f"tmp-{os.getpid()}",
    "state-00000001",
    "state-00000003",
    "state-99999999",
    "state-junk",
    "state-00000002/state.json",
    "state-00000002/tensors.safetensors",
]


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize(
    "place", PLACES, ids=lambda place: place.replace(str(os.getpid()), "own-pid") or "the folder itself"
)
def test_junk_in_the_folder_of_a_stage_ends_nothing(tmp_path, place, junk):
    save(tmp_path, 1, 2)
    path = tmp_path / FOLDER / place
    remove(path)
    path.parent.mkdir(exist_ok=True)
    JUNK[junk](path)
    assert last_update(tmp_path / FOLDER) in (None, 1, 2)
    with ResumeStore.open("train@cot", FINGERPRINT, TENSORS_FILE, root=tmp_path) as store:
        state = store.load()
        expected = {"": None, "state-00000002/state.json": 1, "state-00000002/tensors.safetensors": 1}.get(place, 2)
        assert (state.update if state else None) == expected
        store.num_bytes()
        store.save(make_state(3))
        store.write_progress(3, num_updates=5, loss=0.5, eta_s=None)
        store.save(make_state(4))
    assert_same(load(tmp_path), 4)
    names = {one.name for one in (tmp_path / FOLDER).iterdir()}
    assert len(names) == 4, names


@pytest.mark.parametrize("seed", range(20))
def test_junk_in_every_combination_ends_nothing(tmp_path, seed):
    draw = random.Random(seed)
    save(tmp_path, 1, 2)
    for place in draw.sample(PLACES[1:], draw.randint(2, 8)):
        path = tmp_path / FOLDER / place
        if path.parent.is_dir():
            remove(path)
            JUNK[draw.choice(list(JUNK))](path)
    save(tmp_path, 3, 4)
    assert_same(load(tmp_path), 4)


@pytest.mark.parametrize("junk", ["file", "dangling link"])
def test_junk_in_place_of_the_folder_of_all_states_is_a_message_with_the_cure(tmp_path, junk):
    """It may be a link to a disk that is not mounted: nothing is put in its place."""
    JUNK[junk](tmp_path / ".resume")
    with pytest.raises(OSError, match=r"\.resume") as raised:
        save(tmp_path, 1)
    assert "move away what stands there" in explain(raised.value)


def test_progress_is_readable_and_says_where_it_resumed(tmp_path):
    save(tmp_path, 40)
    with ResumeStore.open("train@cot", FINGERPRINT, TENSORS_FILE, root=tmp_path) as store:
        store.load()
        store.write_progress(41, num_updates=100, loss=1.5, eta_s=59.0)
    progress = json.loads((tmp_path / FOLDER / "progress.json").read_text())
    assert progress.pop("time") >= progress.pop("started")
    assert progress == {
        "stage": "train@cot",
        "update": 41,
        "num_updates": 100,
        "loss": 1.5,
        "eta_s": 59.0,
        "resumed_from": 40,
        "pid": os.getpid(),
    }
    assert last_update(tmp_path / FOLDER) == 40


HOLD_LOCK = """
import sys
from pathlib import Path
from coconut.pipeline.resume import ResumeStore, TensorsFile
with ResumeStore.open("train@cot", sys.argv[2], TensorsFile(None, None), root=Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD_LOCK, str(tmp_path), FINGERPRINT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


@pytest.mark.usefixtures("holder")
def test_two_trainers_never_share_a_state(tmp_path):
    store = ResumeStore.open("train@cot", FINGERPRINT, TENSORS_FILE, root=tmp_path, lock_wait_s=0.3)
    with pytest.raises(OSError, match="in use by another trainer for the last 0 s; two must never share"), store:
        pass


def test_the_lock_of_a_killed_trainer_is_free(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    start = time.time()
    assert load(tmp_path) is None
    assert time.time() - start < 5


SAVE_FOREVER = """
import sys
from pathlib import Path
import torch
from coconut.checkpoints.tensors import load_tensors, save_tensors
from coconut.pipeline.resume import ResumeStore, State, TensorsFile
tensors_file = TensorsFile(save_tensors, load_tensors)
with ResumeStore.open("train@cot", sys.argv[2], tensors_file, root=Path(sys.argv[1])) as store:
    state = store.load()
    update = state.update if state else 0
    print(update, flush=True)
    while True:
        update += 1
        store.save(State(update, {"w": torch.full((2, 3), float(update)), "rng": torch.arange(5, dtype=torch.uint8)},
                         {"epoch": 1, "history": [{"loss": 0.1 * update}]}))
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_leaves_a_good_state(tmp_path):
    command = [sys.executable, "-c", SAVE_FOREVER, str(tmp_path), FINGERPRINT]
    num_saved = 0
    for delay_ms in (3, 20, 50, 111):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert int(process.stdout.readline()) >= num_saved
            time.sleep(delay_ms / 1000)
            process.kill()
        state = load(tmp_path)
        if state is not None:
            assert_same(state, state.update)
            assert state.update >= num_saved
            num_saved = state.update
    assert num_saved > 0


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode != 0:
        pytest.skip("a small tmpfs can be mounted by root on Linux only")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_is_a_clear_error_and_the_last_good_state_stays(small_disk):
    save(small_disk, 1)
    filler = small_disk / "filler"
    with ResumeStore.open("train@cot", FINGERPRINT, TENSORS_FILE, root=small_disk) as store:
        store.load()
        too_big = State(2, {"w": torch.zeros(1_000_000)}, {})
        with pytest.raises(OSError, match=r"No space left.*state-00000001, is intact, and training") as raised:
            store.save(too_big)
        assert explain(raised.value).endswith("; make room on its disk and run `dvc repro` again")
        assert can_pass(raised.value)
        filler.write_bytes(b"0" * 900_000)
        with pytest.raises(OSError, match="No space left"):
            store.save(State(2, {}, {"history": ["x" * 500_000]}))
    assert not list((small_disk / FOLDER).glob("tmp-*"))
    assert_same(load(small_disk), 1)
    filler.unlink()
    save(small_disk, 3)
    assert_same(load(small_disk), 3)
