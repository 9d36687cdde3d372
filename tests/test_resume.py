import json
import os
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

from coconut.pipeline import resume
from coconut.pipeline.resume import ResumeStore, State, last_update, resume_dir

FINGERPRINT = "0123456789abcdef" * 4
FOLDER = ".resume/train@cot-0123456789abcdef"


def make_state(update: int) -> State:
    tensors = {"w": torch.full((2, 3), float(update)), "rng": torch.arange(5, dtype=torch.uint8)}
    return State(update, tensors, {"epoch": 1, "history": [{"loss": 0.1 * update}]})


def save(root: Path, *updates: int) -> None:
    with ResumeStore.open("train@cot", FINGERPRINT, root) as store:
        store.load()
        for update in updates:
            store.save(make_state(update))


def load(root: Path, fingerprint: str = FINGERPRINT) -> State | None:
    with ResumeStore.open("train@cot", fingerprint, root) as store:
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
    handler = resume.logger.add(lambda line: lines.append(str(line)), level="WARNING", format="{message}")
    yield lines
    resume.logger.remove(handler)


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
    with ResumeStore.open("train@cot", FINGERPRINT, tmp_path) as store:
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
    assert sorted(path.name for path in (tmp_path / FOLDER).glob("state-*")) == ["state-00000001", "state-00000003"]
    (tmp_path / FOLDER / "state-00000003/state.json").write_bytes(b"")
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
    with ResumeStore.open("train@cot", other, tmp_path) as store:
        store.load()
        store.save(make_state(9))
    assert files(tmp_path / FOLDER) == before
    assert_same(load(tmp_path), 1)


def test_a_state_moved_into_the_folder_of_other_inputs_is_refused(tmp_path, warnings):
    save(tmp_path, 1)
    (tmp_path / FOLDER).rename(tmp_path / ".resume/train@cot-ffffffffffffffff")
    assert load(tmp_path, "f" * 64) is None
    assert "it belongs to other inputs" in warnings[0]


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
    with ResumeStore.open("train@cot", FINGERPRINT) as store:
        assert store.folder == tmp_path / FOLDER


def test_saving_waits_until_it_costs_less_than_its_share(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(resume.time, "time", lambda: clock[0])
    with ResumeStore.open("train@cot", FINGERPRINT, tmp_path) as store:
        store.load()
        assert not store.is_due(60.0)
        clock[0] += 60
        assert store.is_due(60.0)
        write = store._write

        def write_slowly(folder: Path, state: State) -> None:
            write(folder, state)
            clock[0] += 2

        monkeypatch.setattr(store, "_write", write_slowly)
        store.save(make_state(1))
        assert store.saving_seconds == 2
        clock[0] += 97
        assert not store.is_due(60.0)
        clock[0] += 2
        assert store.is_due(60.0)


def test_progress_is_readable_and_says_where_it_resumed(tmp_path):
    save(tmp_path, 40)
    with ResumeStore.open("train@cot", FINGERPRINT, tmp_path) as store:
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
from coconut.pipeline.resume import ResumeStore
with ResumeStore.open("train@cot", sys.argv[2], Path(sys.argv[1])):
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
def test_two_trainers_never_share_a_state(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "LOCK_WAIT_S", 0.3)
    with pytest.raises(OSError, match="in use by another trainer for the last 0 s; two must never share"):
        load(tmp_path)


def test_the_lock_of_a_killed_trainer_is_free(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    start = time.time()
    assert load(tmp_path) is None
    assert time.time() - start < 5


SAVE_FOREVER = """
import sys
from pathlib import Path
import torch
from coconut.pipeline.resume import ResumeStore, State
with ResumeStore.open("train@cot", sys.argv[2], Path(sys.argv[1])) as store:
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
    with ResumeStore.open("train@cot", FINGERPRINT, small_disk) as store:
        store.load()
        too_big = State(2, {"w": torch.zeros(1_000_000)}, {})
        with pytest.raises(OSError, match=r"No space left.*state-00000001, is intact; make room"):
            store.save(too_big)
        filler.write_bytes(b"0" * 900_000)
        with pytest.raises(OSError, match="No space left"):
            store.save(State(2, {}, {"history": ["x" * 500_000]}))
    assert not list((small_disk / FOLDER).glob("tmp-*"))
    assert_same(load(small_disk), 1)
    filler.unlink()
    save(small_disk, 3)
    assert_same(load(small_disk), 3)
