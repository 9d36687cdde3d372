"""A throwaway project: a source tree's own files in a temporary folder, with parameters of a few seconds.

What works on it are commands (`dvc`, `python -m coconut`, `python stages/...`); nothing here imports the package.
"""

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
_PARTS = ("src", "stages", "models", "recipes", "dvc.yaml", "params.yaml", "pyproject.toml", ".dvcignore", ".gitignore")
_RUN_STAGES = Path(__file__).with_name("run_stages.py")
_TIMINGS = {
    "seconds", "cpu_seconds", "load", "tokens_per_s", "ms_per_update", "seconds_per_example", "cpu_seconds_per_example",
    "train_seconds", "train_cpu_seconds", "train_load", "eval_load", "peak_memory_mb", "peak_memory_mb_of_processes",
}  # fmt: skip
"""Columns of history.csv and keys of metrics.json and train.json that say how busy the machine was."""

SMALL: Mapping[str, Any] = {
    "model": "models/tiny",
    "seed": 0,
    "data.seed": 0,
    "data.train": {"format": "generated", "rows": 96},
    "data.valid": {"format": "generated", "rows": 16},
    "data.tests": {"test": {"format": "generated", "rows": 16}},
    "data.generator": {"task": "chained_arithmetic", "num_operations": 3, "modulus": 11},
    "latent.c_thought": 1,
    "latent.max_latent_stage": 2,
    "latent.pad_latent_to_max": True,
    "latent.markers": False,
    "latent.uniform_prob": 0.3,
    "latent.thought": "hidden[-1]",
    "latent.parallel_iterations": 0,
    "train.batch_size": 16,
    "train.precision": "fp32",
    "train.beta1": 0.9,
    "train.beta2": 0.98,
    "train.weight_decay": 0.01,
    "train.max_grad_norm": 1.0,
    "train.warmup_updates": 2,
    "train.schedule": "constant",
    "train.reset_optimizer": False,
    "train.select": "last",
    "train.validate_examples": 8,
    "evaluate.max_new_tokens": 6,
    "evaluate.precision": "fp32",
    "evaluate.max_examples": "all",
    "probe.enabled": False,
    "runtime.device": "cpu",
    "runtime.threads": 1,
    "runtime.num_workers": 1,
}
"""Dotted keys of params.yaml. What a result depends on stands here, so that another default changes no test."""


def train_entry(method: str, parent: str = "base", latent_stage: int = 0, /, **more: Any) -> dict[str, Any]:
    """Return an entry of the curriculum."""
    fields = {"parent": parent, "method": method, "latent_stage": latent_stage, "epochs": 1, "lr": 2e-3}
    return fields | more


def make_project(folder: Path, changes: Mapping[str, Any], *, sources: Path = ROOT, is_versioned: bool = False) -> Path:
    """Copy a source tree, put the small values and `changes` into its params.yaml, and set up git and DVC if asked."""
    folder.mkdir(parents=True)
    for name in _PARTS:
        if (sources / name).is_dir():
            shutil.copytree(sources / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        elif (sources / name).exists():
            shutil.copy(sources / name, folder / name)
    (folder / "data/raw").mkdir(parents=True)
    for name in ("README.md", ".gitignore"):
        shutil.copy(sources / "data/raw" / name, folder / "data/raw")
    change_params(folder, {**SMALL, **changes})
    if is_versioned:
        run(folder, "git", "init", "-q")
        run(folder, "dvc", "init", "-q")
        shutil.copy(sources / ".dvc/config", folder / ".dvc/config")
        run(folder, "git", "add", "-A")
        run(folder, "git", "commit", "-qm", "state")
    return folder


def read_params(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))


def change_params(folder: Path, changes: Mapping[str, Any]) -> None:
    """Put values at dotted keys of params.yaml."""
    tree = read_params(folder)
    for dotted_key, value in changes.items():
        *keys, last = dotted_key.split(".")
        section = tree
        for key in keys:
            section = section.setdefault(key, {})
        section[last] = value
    (folder / "params.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")


def environment(folder: Path) -> dict[str, str]:
    """Return our environment without what an outer DVC or make left, with the project's own sources first."""
    left = ("DVC_", "ACCELERATE_", "COCONUT_", "MAKE", "MFLAGS")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(left)}
    author = {f"GIT_{who}_{what}": "t" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    return clean | author | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}",
        "PYTHONPATH": str(folder / "src"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "DVC_NO_ANALYTICS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "SHELL": "/bin/sh",
    }  # fmt: skip


def run(folder: Path, *command: str, is_checked: bool = True, timeout_s: float = 900) -> subprocess.CompletedProcess:
    """Run a command in the project; a failure shows what it printed."""
    done = subprocess.run(
        command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=timeout_s, check=False
    )
    if is_checked:
        assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


def start(folder: Path, *command: str) -> subprocess.Popen:
    """Start a command in the project, in a session of its own; what it says on either stream goes to `stdout`."""
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run_stages(projects: Iterable[Path], *kinds: str) -> None:
    """Run the stages of dvc.yaml that have one of these names, all projects at once, without DVC.

    Each stage runs its own command in a process of its own, which has torch and transformers from the start.
    """
    running = [(project, start(project, "python", str(_RUN_STAGES), *kinds)) for project in projects]
    ended = [(project, process.communicate(timeout=1000)[0], process.returncode) for project, process in running]
    for project, output, exit_code in ended:
        assert exit_code == 0, f"{project}: exit {exit_code}\n{output[-4000:]}"


def results(project: Path, entries: Iterable[str]) -> dict[str, Any]:
    """Return by name what the entries left: the digest of each file, or its values where it holds timings.

    The model card is left out, which is prose.
    """
    found: dict[str, Any] = {}
    for entry in entries:
        folder = project / "outputs" / entry
        checkpoint, predictions = (sorted((folder / name).rglob("*")) for name in ("checkpoint", "predictions"))
        single = [folder / name for name in ("optimizer.safetensors", "predictions.jsonl", "updates.csv")]
        for path in [*checkpoint, *predictions, *filter(Path.exists, single)]:
            if path.is_file() and path.name not in ("README.md", ".gitignore"):
                found[path.relative_to(project).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
        files = ("history.csv", "metrics.json", "costs.json", "train.json")
        for path in filter(Path.exists, (folder / name for name in files)):
            # A key that has moved from one file to another has kept its value.
            found |= {f"outputs/{entry}: {key}": value for key, value in _values(path).items()}
    return found


def _values(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        values = json.loads(text)
    else:
        rows = list(csv.DictReader(text.splitlines()))
        values = {column: [row[column] for row in rows] for column in rows[0]}
    return {key: value for key, value in values.items() if key not in _TIMINGS}


def expect_same(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Fail with the names of what is not as it was; what is new beside it is no fault."""
    different = [
        f"{name}: {value} became {ours.get(name)}" for name, value in theirs.items() if ours.get(name) != value
    ]
    assert not different, f"{len(different)} of {len(theirs)} differ:\n" + "\n".join(different)


# --- the commit before ----------------------------------------------------------------------


def reference_commit() -> str:
    """Return the commit whose results ours must equal.

    It is `COCONUT_CONTRACT_BASE`. Where that is not set, it is HEAD if the code of the work tree is not HEAD's, else
    the parent of the last commit that touched the code: with commits of documents since, HEAD^ would have our own code.
    """
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top) != ROOT:
        pytest.skip("the repository has no git history here: there is no commit to compare with")
    code = ("--", "src", "stages", "models", "dvc.yaml")
    if (asked := os.environ.get("COCONUT_CONTRACT_BASE")) is None and _git("status", "--porcelain", *code):
        asked = "HEAD"
    commit = asked or f"{_git('log', '-1', '--first-parent', '--format=%H', *code)}^"
    found = _git("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}")
    assert found or asked is None, f"COCONUT_CONTRACT_BASE: git knows no commit {asked!r}"
    if not found:
        pytest.skip(f"git history ends here (a shallow clone?): {commit} is not in it")
    return found


def unpack(commit: str, folder: Path) -> Path:
    """Write the files of a commit into a new folder."""
    folder.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True)
    subprocess.run(["tar", "-x"], cwd=folder, input=archive.stdout, check=True)
    return folder


def _git(*arguments: str) -> str | None:
    """Return what git says of the repository, or None if it fails or is not there."""
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
