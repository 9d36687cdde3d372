"""One stage in several processes: the same update, the same scores, and an end in order whatever is killed."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

import update_of_ranks
from coconut.pipeline.events import last_run
from project import ROOT, commit, environment, make_project, run, write_params
from test_kills import Repro, results

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes end with their parent on Linux only")

NUM_ROUNDS = int(os.environ.get("COCONUT_PROCESS_KILLS", "0"))
"""Rounds of every way to end; 0 for one round of some of them."""
RECIPE: dict[str, Any] = {
    "data.train.rows": 256,
    "runtime.save_every_s": 0.3,
    "runtime.log_every_s": 0.2,
    "runtime.processes": 2,
    "curriculum": {
        "cot": {"parent": "base", "method": "cot", "latent_stage": 0, "epochs": 1, "lr": 1e-3},
        "latent_1": {"parent": "cot", "method": "coconut", "latent_stage": 1, "epochs": 30, "lr": 1e-3},
    },
}
SRUN = """
import os, signal, subprocess, sys
# What srun does in an allocation of two hosts: the command once on each of them, and signals handed on.
command = sys.argv[2:]
tasks = [subprocess.Popen(command, env=os.environ | {"SLURM_NNODES": "2", "SLURM_NODEID": str(n)}) for n in range(2)]
def forward(number, frame):
    for task in tasks:
        task.send_signal(number)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, forward)
sys.exit(max(abs(task.wait()) for task in tasks))
"""


# --- the mathematics ------------------------------------------------------------------------


def run_peers(folder: Path, count: int, sharding: str = "none", precision: str = "fp32") -> dict[str, torch.Tensor]:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    path = folder / f"of-{count}.safetensors"
    shared = environment(ROOT) | {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    shared |= {"LOCAL_WORLD_SIZE": str(count), "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}"}
    processes = [
        subprocess.Popen(
            [sys.executable, "tests/update_of_ranks.py", str(path), sharding, precision],
            cwd=ROOT,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]
    assert [process.wait(300) for process in processes] == [0] * count
    return load_file(path)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What one process finds."""
    return run_peers(tmp_path_factory.mktemp("alone"), 1)


@pytest.fixture(scope="module")
def alone_in_bf16(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return run_peers(tmp_path_factory.mktemp("alone"), 1, precision="bf16")


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_an_updates_gradient_is_that_of_one_process(count: int, alone: dict[str, torch.Tensor], tmp_path: Path) -> None:
    together = run_peers(tmp_path, count)
    for name in update_of_ranks.CASES:
        check_case(name, alone, together)
    room = together["llama, no room for two rows in the last process/cost"]
    assert room[-1] >= 1, "it did run out of memory"
    assert room[-2] == 1, "and all processes go on with what fits everywhere"


def check_case(
    name: str, alone: dict[str, torch.Tensor], together: dict[str, torch.Tensor], tolerance: float = 1e-6
) -> None:
    """Compare one case's gradients and costs."""
    keys, of_together = ([key for key in found if key.startswith(f"{name}/")] for found in (alone, together))
    assert sorted(keys) == sorted(of_together), "a weight that no row reaches has no gradient, in any process"
    of_case = [key for key in keys if not key.endswith("/cost")]
    difference = torch.cat([(together[key] - alone[key]).flatten() for key in of_case]).norm()
    relative = float(difference / torch.cat([alone[key].flatten() for key in of_case]).norm())
    assert relative < tolerance, f"{name}: {relative:.1e}"
    cost, wanted = together[f"{name}/cost"], alone[f"{name}/cost"]
    assert torch.allclose(cost[:4], wanted[:4], rtol=tolerance)
    assert (bool(cost[4]), bool(wanted[4])) == (True, False), "one process is asked to stop, and all know it"


# --- under dvc ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that is ready to train in two processes."""
    project = make_project(tmp_path_factory.mktemp("processes") / "encoded", RECIPE)
    (project / "srun.py").write_text(SRUN)
    commit(project)
    run(project, "dvc", "repro", "encode", "base")
    return project


@pytest.fixture(scope="module")
def straight(encoded: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an undisturbed run in two processes leaves."""
    project = Path(shutil.copytree(encoded, tmp_path_factory.mktemp("processes") / "straight"))
    run(project, "dvc", "repro", "train@latent_1")
    return trained(project)


def trained(project: Path) -> dict[str, Any]:
    return {name: value for name, value in results(project).items() if name.startswith(("outputs/cot", "outputs/lat"))}


def processes_in(project: Path) -> list[psutil.Process]:
    """Every process that works in the project's folder, this one excepted."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.cwd() == str(project) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def with_variable(project: Path, name: str) -> dict[str, psutil.Process]:
    """The stage's processes that have a variable in their environment, by its value."""
    found = {}
    for process in processes_in(project):
        with suppress(psutil.Error, OSError):
            value = process.environ().get(name)
            if value is not None and "stages/train.py" in process.cmdline():
                found[value] = process
    return found


@pytest.mark.long
def test_two_processes_train_and_score_as_one_does(encoded: Path, straight: dict[str, Any], tmp_path: Path) -> None:
    project = Path(shutil.copytree(encoded, tmp_path / "project"))
    shown = run(project, "dvc", "repro", "evaluate@latent_1")
    assert "2 processes on cpu" in shown.stderr + shown.stdout
    assert trained(project).keys() > straight.keys()
    assert {name: value for name, value in trained(project).items() if name in straight} == straight
    summary = json.loads((project / "outputs/latent_1/train.json").read_text())
    assert len(summary["peak_memory_mb_of_processes"]) == 2
    assert summary["peak_memory_mb"] == max(summary["peak_memory_mb_of_processes"])
    assert (project / "outputs/logs/train-latent_1.process-1.log").is_file()
    last = last_run("train@latent_1", project)
    assert last is not None
    assert last.end == "ended"
    # The same checkpoint in one and three processes: the same predictions and figures.
    for count in (1, 3):
        write_params(project, {"runtime.processes": count})
        again = run(project, "dvc", "repro", "-s", "-f", "evaluate@latent_1", "--no-run-cache", check=False)
        assert again.returncode == 0, again.stderr
        shutil.rmtree(project / ".resume/scores")
        run(project, "dvc", "repro", "-s", "-f", "evaluate@latent_1")
        now = results(project)
        for name, value in trained(project).items():
            assert now[name] == value, name
    write_params(project, {"runtime.processes": 2})
    assert "didn't change, skipping" in run(project, "dvc", "repro", "train@latent_1").stdout, (
        "runtime is no dependency"
    )


def kill(process: psutil.Process, number: int) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def worker(rank: int, number: int) -> Callable[[Path, Repro], None]:
    return lambda project, _repro: kill(with_variable(project, "RANK")[str(rank)], number)


def stage(number: int) -> Callable[[Path, Repro], None]:
    def strike(_project: Path, repro: Repro) -> None:
        process = repro.stage_process()
        if process is not None:
            kill(process, number)

    return strike


def dvc(number: int) -> Callable[[Path, Repro], None]:
    return lambda _project, repro: repro.process.send_signal(number)


def agent_of_host(host: int, number: int) -> Callable[[Path, Repro], None]:
    def strike(project: Path, _repro: Repro) -> None:
        for process in processes_in(project):
            with suppress(psutil.Error):
                variables = process.environ()
                if "LOCAL_RANK" not in variables and variables.get("SLURM_NODEID") == str(host):
                    kill(process, number)

    return strike


ONE_HOST = {
    "kill -9 of the first process": worker(0, signal.SIGKILL),
    "kill -9 of the second process": worker(1, signal.SIGKILL),
    "kill -9 of the stage": stage(signal.SIGKILL),
    "kill -9 of dvc": dvc(signal.SIGKILL),
    "SIGTERM to the second process": worker(1, signal.SIGTERM),
    "SIGTERM to the stage": stage(signal.SIGTERM),
}
TWO_HOSTS = {
    "kill -9 of a process of the second host": worker(1, signal.SIGKILL),
    "kill -9 of the second host's agent": agent_of_host(1, signal.SIGKILL),
    "SIGTERM to the stage": stage(signal.SIGTERM),
    "kill -9 of the stage": stage(signal.SIGKILL),
}


@pytest.fixture
def left_behind(tmp_path: Path) -> Iterator[Path]:
    """The folder of a project, in which no process may be left."""
    project = tmp_path / "project"
    yield project
    for process in processes_in(project):  # Only after a failure.
        process.kill()


def strike_and_finish(project: Path, strike: Callable[[Path, Repro], None], count: int) -> str:
    """Disturb the training of latent_1 once, wait for the end of all its processes, and finish it."""
    repro = Repro(project, "train@latent_1")
    deadline = time.monotonic() + 120
    while not (
        repro.stage == "train@latent_1"
        and len(with_variable(project, "RANK")) == count
        and any(project.glob(".resume/train@latent_1-*/state-*"))
    ):
        assert time.monotonic() < deadline, "".join(repro.lines)
        assert repro.process.poll() is None, "".join(repro.lines)
        time.sleep(0.02)
    strike(project, repro)
    struck_at = time.monotonic()
    assert repro.finish() != 0, "".join(repro.lines)
    while processes_in(project):
        assert time.monotonic() < struck_at + 28, [process.cmdline() for process in processes_in(project)]
        time.sleep(0.05)
    shown = "".join(repro.lines)
    again = Repro(project, "train@latent_1")
    assert again.finish() == 0, "".join(again.lines)
    assert any("resumed at update" in line for line in again.lines), "".join(again.lines)
    return shown


def ways(of: dict[str, Any], *some: str) -> list[str]:
    return list(of) if NUM_ROUNDS else list(some)


@pytest.mark.long
@pytest.mark.parametrize("way", ways(ONE_HOST, "kill -9 of the second process", "SIGTERM to the second process"))
def test_whatever_ends_on_one_host_the_bytes_are_those_of_a_straight_run(
    way: str, encoded: Path, straight: dict[str, Any], left_behind: Path
) -> None:
    for _ in range(NUM_ROUNDS or 1):
        shutil.copytree(encoded, left_behind)
        shown = strike_and_finish(left_behind, ONE_HOST[way], 2)
        assert trained(left_behind) == straight
        if "process" in way and "-9" in way:
            rank = 0 if "first" in way else 1
            assert f"process {rank} of " in shown
            assert "was ended by SIGKILL; `dvc repro` continues from the last saved state" in shown
        assert "Traceback" not in shown, shown
        shutil.rmtree(left_behind)


@pytest.mark.long
@pytest.mark.parametrize("way", ways(TWO_HOSTS, "kill -9 of the second host's agent"))
def test_whatever_ends_on_two_hosts_the_bytes_are_those_of_a_straight_run(
    way: str, encoded: Path, straight: dict[str, Any], left_behind: Path
) -> None:
    """Two hosts are simulated on this one: a launcher that starts two agents, of one process each."""
    for _ in range(NUM_ROUNDS or 1):
        shutil.copytree(encoded, left_behind)
        launcher = f"{sys.executable} srun.py --ntasks-per-node=1"
        write_params(left_behind, {"runtime.processes": 1, "runtime.launcher": launcher})
        strike_and_finish(left_behind, TWO_HOSTS[way], 2)
        assert trained(left_behind) == straight
        shutil.rmtree(left_behind)


@pytest.mark.long
def test_a_process_that_hangs_is_ended_before_a_preempted_machine_is(
    encoded: Path, straight: dict[str, Any], left_behind: Path
) -> None:
    shutil.copytree(encoded, left_behind)

    def hang(project: Path, repro: Repro) -> None:
        kill(with_variable(project, "RANK")["1"], signal.SIGSTOP)
        time.sleep(1)
        stage(signal.SIGTERM)(project, repro)

    strike_and_finish(left_behind, hang, 2)
    assert trained(left_behind) == straight


# --- shards ---------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(("kind", "count"), [("update", 3), ("pass", 2)])
def test_the_gradient_of_sharded_weights_is_that_of_whole_ones(
    kind: str, count: int, alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    together = run_peers(tmp_path, count, kind)
    for name, case in update_of_ranks.CASES.items():
        if kind == "pass" and "parallel_iterations" in case:
            continue
        check_case(name, alone, together)
        num_gathers, num_sums = together[f"{name}/cost"][5:7].tolist()
        # Once per update, what three do not divide padded; once per pass and layer, forwards and backwards.
        assert 0.999 < num_gathers < 1.1 if kind == "update" else num_gathers > 1.5
        # A layer's gradients go after each pass, so that they are never whole for more than one layer and pass.
        in_one_pass = case.get("num_thoughts") == 0 or "parallel_iterations" in case
        assert 0.999 < num_sums < 1.1 if in_one_pass and "micro_batch" not in case else num_sums > 1.5, name


@pytest.mark.long
@pytest.mark.parametrize("kind", ["update", "pass"])
def test_the_gradient_of_shards_in_bf16_is_that_of_one_process_but_for_rounding(
    kind: str, alone: dict[str, torch.Tensor], alone_in_bf16: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """One process converts under autocast; shards are gathered in bf16, so that no pass keeps a converted copy."""
    together = run_peers(tmp_path, 2, kind, "bf16")
    for name, case in update_of_ranks.CASES.items():
        if kind == "pass" and "parallel_iterations" in case:
            continue
        check_case(name, alone, together, tolerance=3e-2)
        of_one = distance(name, alone, alone_in_bf16)
        assert distance(name, alone, together) < 1.5 * of_one, "no less exact than in one process"


def distance(name: str, one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    keys = [key for key in one if key.startswith(f"{name}/") and not key.endswith("/cost")]
    return float(torch.cat([(one[key] - other[key]).flatten() for key in keys]).norm())


@pytest.mark.long
@pytest.mark.parametrize("kind", ["update", "pass"] if NUM_ROUNDS else ["update"])
def test_sharded_training_goes_on_after_a_kill_with_any_number_of_processes(
    kind: str, encoded: Path, left_behind: Path, tmp_path: Path
) -> None:
    changes = {"runtime.sharding": kind, "curriculum.latent_1.epochs": 20, "curriculum.latent_1.select": "best",
               "curriculum.latent_1.thought": "projection"}  # fmt: skip
    write_params(encoded_copy := Path(shutil.copytree(encoded, tmp_path / "prepared")), changes)
    straight = Path(shutil.copytree(encoded_copy, tmp_path / "straight"))
    run(straight, "dvc", "repro", "evaluate@latent_1")
    summary = json.loads((straight / "outputs/latent_1/train.json").read_text())
    assert (summary["passes"], len(summary["peak_memory_mb_of_processes"])) == ("plain: runtime.sharding", 2)

    shutil.copytree(encoded_copy, left_behind)
    strike_and_finish(left_behind, worker(1, signal.SIGKILL), 2)
    wanted = {name: value for name, value in trained(straight).items() if name in trained(left_behind)}
    assert trained(left_behind) == wanted, "the same bytes, as with whole weights"

    # The same state, with one process more, or with whole weights in one process.
    project = Path(shutil.copytree(encoded_copy, tmp_path / "other"))
    repro = Repro(project, "train@latent_1")
    while not any(project.glob(".resume/train@latent_1-*/state-*")):
        assert repro.process.poll() is None, "".join(repro.lines)
        time.sleep(0.02)
    stage(signal.SIGTERM)(project, repro)
    assert repro.finish() != 0
    write_params(project, {"runtime.processes": 3 if kind == "update" else 1})
    shown = run(project, "dvc", "repro", "train@latent_1")
    assert "resumed at update" in shown.stderr + shown.stdout
    one, two = (load_file(folder / "outputs/latent_1/checkpoint/model.safetensors") for folder in (straight, project))
    assert one.keys() == two.keys()
    assert {name: tensor.shape for name, tensor in one.items()} == {n: t.shape for n, t in two.items()}


@pytest.mark.slow
@pytest.mark.long
def test_the_first_update_of_sharded_weights_is_that_of_one_process(encoded: Path, tmp_path: Path) -> None:
    found = {}
    for kind, count in (("none", 1), ("update", 2), ("pass", 3)):
        project = Path(shutil.copytree(encoded, tmp_path / kind))
        write_params(project, {"runtime.sharding": kind, "runtime.processes": count, "curriculum.cot.max_updates": 1})
        run(project, "dvc", "repro", "train@cot")
        found[kind] = {
            name: load_file(project / "outputs/cot" / name)
            for name in ("checkpoint/model.safetensors", "optimizer.safetensors")
        }
        files = sorted(path.name for path in (project / "outputs/cot/checkpoint").iterdir())
        found[kind]["files"] = files
    for kind in ("update", "pass"):
        assert found[kind]["files"] == found["none"]["files"]
        for name in ("checkpoint/model.safetensors", "optimizer.safetensors"):
            assert found[kind][name].keys() == found["none"][name].keys()
        moments, wanted = found[kind]["optimizer.safetensors"], found["none"]["optimizer.safetensors"]
        firsts = [name for name in wanted if name.endswith("exp_avg")]
        difference = torch.cat([(moments[name] - wanted[name]).flatten() for name in firsts]).norm()
        assert difference < 1e-6 * torch.cat([wanted[name].flatten() for name in firsts]).norm()


@pytest.mark.slow
def test_what_shards_cannot_do_is_refused(encoded: Path, tmp_path: Path) -> None:
    project = Path(shutil.copytree(encoded, tmp_path / "project"))
    write_params(project, {"runtime.sharding": "pass", "curriculum.cot.parallel_iterations": 2})
    done = run(project, "dvc", "repro", "train@cot", check=False)
    assert done.returncode != 0
    assert "process 0: runtime.sharding: pass needs parallel_iterations 0" in done.stdout + done.stderr


OUT_OF_MEMORY = """
import torch
from coconut.evaluation.evaluator import Evaluator
from coconut.training.objective import Objective

def limited(method, rows_of, lasts):
    left = [lasts]
    def call(self, first, *others, **named):
        left[0] -= 1
        if os.environ.get("RANK") == "1" and left[0] < 0 and rows_of(first, *others) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return method(self, first, *others, **named)
    return call

Objective._read = limited(Objective._read, lambda name, rows, places, *_: len(places), 20)
if VALIDATES:
    Evaluator._decode_batch = limited(Evaluator._decode_batch, lambda prompts, *_: len(prompts), 2)
"""


@pytest.mark.long
@pytest.mark.parametrize("kind", ["update", "pass"] if NUM_ROUNDS else ["pass"])
def test_sharded_training_begins_again_with_what_fits_into_memory(kind: str, encoded: Path, left_behind: Path) -> None:
    """One process of two runs out of memory, in an update, and where all read the same rows in a validation too."""
    project = Path(shutil.copytree(encoded, left_behind))
    changes = {"runtime.sharding": kind, "runtime.save_every_s": 0, "curriculum.cot.epochs": 6}
    write_params(project, changes | {"train.precision": "fp32" if kind == "update" else "bf16"})
    script = project / "stages/train.py"
    head, load = script.read_text().split("\ndef load", 1)
    limits = OUT_OF_MEMORY.replace("VALIDATES", str(kind == "pass"))
    script.write_text(f"{head}\nimport os\n{limits}\ndef load{load}")
    shown = run(project, "dvc", "repro", "train@cot")
    said = shown.stdout + shown.stderr
    assert "process 1: out of memory with 8 rows at once; 4 are tried next, from the last saved state on" in said
    assert "process 1: out of memory with 4 rows at once; 2 are tried next" in said
    assert "resumed at update" in said, "what was trained is not lost"
    assert "Traceback" not in said
    summary = json.loads((project / "outputs/cot/train.json").read_text())
    assert summary["micro_batch"] == 2
    assert summary["train_oom_retries"] == said.count("are tried next") == (2 if kind == "update" else 4)
    assert len((project / "outputs/cot/history.csv").read_text().splitlines()) == 7
    assert not processes_in(project)


# --- what is said ---------------------------------------------------------------------------

SCRIPT = """
import errno, os, sys
sys.path.insert(0, "src")
from coconut.pipeline.stage import run_script

def load():
    from coconut.devices import build_accelerator, ranks_of
    from coconut.config.params import load_params

    def main(entry, inputs):
        ranks = ranks_of(build_accelerator(load_params().runtime, "fp32"))
        ranks.wait()
        if ranks.rank == 1:
            FAIL
        ranks.wait()

    return main

run_script(load, "train", of_entry=True, is_shared=True, guards_itself=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failure", "message", "can_pass"),
    [
        ('raise ValueError("rows 3, 4: bad")', "train@cot: process 1: rows 3, 4: bad", False),
        (
            'raise OSError(errno.ENOSPC, "No space left on device", "x")',
            "train@cot: process 1: x: No space left on device; make room on its disk and run `dvc repro` again",
            True,
        ),
        ('raise AssertionError("a defect")', "train@cot: process 1: AssertionError: a defect", False),
        ("os._exit(9)", "train@cot: process 1 of 2 ended with exit code 9; its own words stand above", False),
    ],
)
def test_an_error_of_any_process_reaches_the_terminal_with_its_number(
    failure: str, message: str, can_pass: bool, encoded: Path, tmp_path: Path
) -> None:
    project = Path(shutil.copytree(encoded, tmp_path / "project"))
    (project / "stages/train.py").write_text(SCRIPT.replace("FAIL", failure))
    done = run(project, sys.executable, "stages/train.py", "cot", check=False)
    # The command is that of dvc.yaml, in which the interpreter's name stands without its folder.
    assert done.returncode == 1, done.stderr
    errors = [line for line in done.stderr.splitlines() if "| ERROR " in line]
    assert len(errors) == 1, done.stderr
    assert message in errors[0]
    assert ("Traceback" in done.stderr) == ("AssertionError" in failure)
    last = last_run("train@cot", project)
    assert last is not None
    assert (last.end, last.can_pass) == ("failed", can_pass)


@pytest.mark.slow
def test_a_launcher_that_is_not_there_is_named(encoded: Path, tmp_path: Path) -> None:
    project = Path(shutil.copytree(encoded, tmp_path / "project"))
    write_params(project, {"runtime.launcher": "no-such-srun --ntasks-per-node=1"})
    done = run(project, sys.executable, "stages/train.py", "cot", check=False)
    assert done.returncode == 1
    assert "runtime.launcher: no-such-srun cannot be started (No such file or directory)" in done.stderr
