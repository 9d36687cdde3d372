"""Branches side by side: the same files as in a row, kills, failures."""

import json
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

import standin
from coconut.pipeline.branches import Branches
from coconut.pipeline.events import events_path, last_run
from coconut.pipeline.repro import fitting_jobs, gpus_of
from coconut.pipeline.status import stage_rows

NAMES = ["base", "train@cot", "train@latent_1", "train@no_cot"]


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return standin.make_repository(tmp_path_factory.mktemp("branches") / "repository")


@pytest.fixture
def root(repository, tmp_path):
    return Path(shutil.copytree(repository, tmp_path / "repository"))


def outputs(root: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((root / "outputs").iterdir()) if path.is_file()}


@pytest.fixture(scope="module")
def straight(repository, tmp_path_factory):
    """What one stage after the other makes."""
    root = Path(shutil.copytree(repository, tmp_path_factory.mktemp("straight") / "repository"))
    done = standin.run(root, "dvc", "repro")
    assert done.returncode == 0, done.stderr
    return outputs(root)


def times(root: Path, name: str) -> tuple[float, float]:
    """Begin and end of a stage's only run."""
    found = [json.loads(line) for line in events_path(name, root).read_text().splitlines() if line]
    return found[0]["time"], found[-1]["time"]


@pytest.mark.slow
def test_branches_overlap_in_time_and_leave_the_same_files(root, straight):
    standin.behave(root, {name: [{"nap": 0.1}] for name in NAMES[1:]})
    done = standin.run(root, "coconut", "repro", "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert outputs(root) == straight
    (cot, cot_end), (other, other_end) = times(root, "train@cot"), times(root, "train@no_cot")
    assert max(cot, other) < min(cot_end, other_end)
    assert times(root, "train@latent_1")[0] > cot_end
    assert {row.state for row in stage_rows(root)} == {"done"}
    again = standin.run(root, "coconut", "repro", "--jobs", "2")
    assert again.stdout.splitlines()[-1] == "Data and pipelines are up to date."
    assert "Running stage" not in again.stdout


@pytest.mark.slow
@pytest.mark.parametrize("keep_going", [False, True])
def test_a_failed_branch_is_named_and_the_other_one_is_kept(root, straight, keep_going):
    standin.behave(root, {"train@cot": [{"fail_at": 3}], "train@no_cot": [{"nap": 0.1}]})
    done = standin.run(root, "coconut", "repro", "--jobs", "2", *(["--keep-going"] if keep_going else []))
    assert done.returncode not in (0, 1)
    assert "train@cot: failed: " in done.stdout
    assert "a loss that is not finite at update 3" in done.stdout
    states = {row.stage: row.state for row in stage_rows(root)}
    assert states["train@no_cot"] == "done"
    assert states["train@cot"] == "failed"
    assert last_run("train@latent_1", root) is None
    assert outputs(root)["no_cot"] == straight["no_cot"]
    after = standin.run(root, "coconut", "repro", "--jobs", "2")
    assert after.returncode == 0, after.stdout + after.stderr
    assert outputs(root) == straight


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(one, marks=pytest.mark.long) for one in (signal.SIGINT, signal.SIGKILL))]
)
def test_a_signal_ends_all_branches_and_both_go_on_from_where_they_were(root, straight, number):
    standin.behave(root, {"train@cot": [{"nap": 0.3}], "train@no_cot": [{"nap": 0.3}]})
    process = standin.start(root, "coconut", "repro", "--jobs", "2")
    deadline = time.monotonic() + 60
    while any(len(list(root.glob(f".resume/{name}-*/state-*"))) < 2 for name in ("train@cot", "train@no_cot")):
        assert time.monotonic() < deadline, "both have saved two updates"
        time.sleep(0.05)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), printed
    pids = {last_run(name, root).pid for name in ("train@cot", "train@no_cot")}
    deadline = time.monotonic() + 30
    while any(
        Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text() for pid in pids
    ):
        assert time.monotonic() < deadline, "nobody may be left behind"
        time.sleep(0.05)
    standin.behave(root, {})
    assert standin.run(root, "coconut", "repair").returncode == 0
    again = standin.run(root, "coconut", "repro", "--jobs", "2")
    assert again.returncode == 0, again.stdout + again.stderr
    assert all(last_run(name, root).resumed_at for name in ("train@cot", "train@no_cot"))
    assert outputs(root) == straight


@pytest.mark.slow
def test_what_another_dvc_holds_is_tried_again_and_what_ran_before_it_counts(root, straight):
    standin.behave(root, {"train@no_cot": [{"nap": 0.5}]})  # The other branch goes on meanwhile.
    other = subprocess.Popen(["sleep", "120"])
    threading.Thread(target=other.wait).start()  # Or dvc would still see it.
    held = {"write": {str(root / "outputs/latent_1"): {"pid": other.pid, "cmd": "sleep 120"}}}
    (root / ".dvc/tmp").mkdir(exist_ok=True)
    (root / ".dvc/tmp/rwlock").write_text(json.dumps(held))
    said = []

    def hear(line):
        said.append(line)
        if "outputs/latent_1' is busy" in line:
            other.terminate()

    branches = Branches(root, 2, hear)
    assert branches.run() == 0, "\n".join(said)
    assert any("outputs/latent_1' is busy" in line for line in said)
    assert {name: branches.log.outcomes[name].result for name in NAMES} == dict.fromkeys(NAMES, "ran")
    assert outputs(root) == straight


@pytest.mark.slow
def test_a_night_of_two_jobs_retries_and_sums_up_in_the_order_of_the_tree(root, straight):
    standin.behave(root, {"train@cot": [{"die_at": 5}], "train@no_cot": [{"nap": 0.1}]})
    done = standin.run(root, "coconut", "overnight", "--jobs", "2", "--pause-s", "0.1")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = done.stdout.partition("Summary: ")[2].splitlines()[2:]
    assert [line.split()[:2] for line in summary[:4]] == [
        ["base", "ran"],
        ["train@cot", "resumed"],
        ["train@latent_1", "ran"],
        ["train@no_cot", "ran"],
    ]
    assert outputs(root) == straight


@pytest.mark.slow
def test_outputs_on_another_disk_are_refused_with_the_cure(root, tmp_path):
    (root / "outputs").symlink_to(tmp_path)
    done = standin.run(root, "coconut", "repro")
    assert done.returncode == 255, done.stdout
    assert "a folder above it is a link to elsewhere, and DVC works on no output there: let the whole" in done.stdout
    assert "Having any troubles?" not in done.stdout


@pytest.mark.parametrize(
    ("runtime", "variables", "gpus"),
    [
        ({"device": "auto"}, {"CUDA_VISIBLE_DEVICES": "0,2"}, ["0", "2"]),
        ({"device": "cpu"}, {"CUDA_VISIBLE_DEVICES": "0,2"}, []),
        ({"device": "auto"}, {"CUDA_VISIBLE_DEVICES": ""}, []),
        ({"device": "auto"}, {"CUDA_VISIBLE_DEVICES": "-1"}, []),
    ],
)
def test_one_job_for_every_gpu_that_may_be_used(tmp_path, monkeypatch, runtime, variables, gpus):
    (tmp_path / "params.yaml").write_text(json.dumps({"runtime": runtime}))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert gpus_of(tmp_path) == gpus
    if gpus:
        assert fitting_jobs(tmp_path) == len(gpus)


def test_without_a_number_of_threads_one_stage_takes_the_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for threads in ("auto", None, 10_000):
        (tmp_path / "params.yaml").write_text(json.dumps({"runtime": {"threads": threads}}))
        assert fitting_jobs(tmp_path) == 1
    (tmp_path / "outputs/a").mkdir(parents=True)
    (tmp_path / "outputs/a/costs.json").write_text('{"peak_memory_mb": 1e9}')
    (tmp_path / "params.yaml").write_text(json.dumps({"runtime": {"threads": 1}}))
    assert fitting_jobs(tmp_path) == 1, "an earlier stage took all the memory that there is"
