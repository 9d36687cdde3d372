"""The script for machines with GPUs runs on this one in a small form, and a part that fails costs that part alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from project import ROOT, environment

pytestmark = pytest.mark.long


def check(results: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/gpu_check.py", "--small", "--results", str(results), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(ROOT), capture_output=True, text=True, check=False)


def outcomes(folder: Path) -> dict[str, str]:
    return {path.stem: json.loads(path.read_text())["outcome"] for path in folder.glob("*.json")}


def test_the_parts_run_on_a_cpu(tmp_path: Path) -> None:
    done = check(tmp_path, "--device", "cpu", "--only", "synchronisations,profile,memory,resume,graph,srun")
    assert done.returncode == 0, done.stdout + done.stderr
    skipped = dict.fromkeys(("synchronisations", "graph", "srun"), "skipped")
    assert outcomes(tmp_path / "cpu") == skipped | dict.fromkeys(("profile", "memory", "resume"), "ok")
    page = (tmp_path / "results.md").read_text()
    assert "| resume | ok |" in page
    assert "| deterministic: equal bytes | True |" in page


def test_the_parts_run_on_a_device_that_is_not_the_cpu(tmp_path: Path) -> None:
    parts = "agreement,memory,resume,generation"
    done = check(tmp_path, "--backend", "tests/pretend_device.py", "--device", "pretend:0", "--only", parts)
    assert done.returncode == 0, done.stdout + done.stderr
    assert outcomes(tmp_path / "pretend") == dict.fromkeys(parts.split(","), "ok")
    found = json.loads((tmp_path / "pretend/agreement.json").read_text())["found"]["relative_error"]
    assert len(found) == 36
    assert max(error for case, error in found.items() if case.endswith("fp32")) < 1e-4
    assert json.loads((tmp_path / "pretend/generation.json").read_text())["found"]["8 rows: equal texts of 4"] == 4


def test_the_pipeline_runs_in_two_processes_on_a_cpu(tmp_path: Path) -> None:
    done = check(tmp_path, "--device", "cpu", "--only", "processes,sharded")
    assert done.returncode == 0, done.stdout + done.stderr
    of_two = json.loads((tmp_path / "cpu/processes.json").read_text())["found"]["train"]["latent_1"]
    assert len(of_two["peak_memory_mb_of_processes"]) == 2
    of_shards = json.loads((tmp_path / "cpu/sharded.json").read_text())["found"]["pass"]["train"]["latent_1"]
    assert of_shards["passes"] == "plain: runtime.sharding"


def test_a_part_that_fails_costs_that_part_alone(tmp_path: Path) -> None:
    done = check(tmp_path, "--device", "nonsense", "--only", "generation,graph")
    assert done.returncode == 1
    assert "failed: generation" in done.stderr
    assert outcomes(tmp_path / "nonsense") == {"generation": "failed", "graph": "skipped"}
    assert "| generation | failed |" in (tmp_path / "results.md").read_text()
