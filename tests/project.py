"""A throwaway project: the repository's own files in a temporary folder, under git and DVC, with a tiny recipe."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
_PARTS = ("src", "stages", "models", "recipes", "dvc.yaml", "params.yaml", ".dvcignore", ".gitignore", "pyproject.toml")

TINY: dict[str, Any] = {
    "model": "models/tiny",
    "data.train.rows": 96,
    "data.valid.rows": 16,
    "data.tests.test.rows": 16,
    "data.generator": {"task": "chained_arithmetic", "num_operations": 2, "modulus": 11},
    "latent.max_latent_stage": 2,
    "latent.thought": "hidden[-1]",
    "train.batch_size": 16,
    "train.warmup_updates": 2,
    "train.validate_examples": 8,
    "evaluate.max_new_tokens": 6,
    "runtime.threads": 1,
    "runtime.device": "cpu",
    "curriculum": {
        "cot": {"parent": "base", "method": "cot", "latent_stage": 0, "epochs": 2, "lr": 2e-3},
        "latent_1": {"parent": "cot", "method": "coconut", "latent_stage": 1, "epochs": 1, "lr": 2e-3},
        "latent_2": {"parent": "latent_1", "method": "coconut", "latent_stage": 2, "epochs": 1, "lr": 2e-3},
        "no_cot": {"parent": "base", "method": "no_cot", "latent_stage": 0, "epochs": 1, "lr": 2e-3},
    },
}
"""Changes to the shipped params.yaml that make every stage a matter of seconds."""


def make_project(folder: Path, changes: dict[str, Any] | None = None) -> Path:
    """Copy the sources, write the tiny params with `changes` on top, and set up git and DVC."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _PARTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, folder / name)
    (folder / "data/raw").mkdir(parents=True)
    for name in ("README.md", ".gitignore"):
        shutil.copy(ROOT / "data/raw" / name, folder / "data/raw")
    write_params(folder, TINY | (changes or {}))
    run(folder, "git", "init", "-q")
    run(folder, "dvc", "init", "-q")
    shutil.copy(ROOT / ".dvc/config", folder / ".dvc/config")
    commit(folder)
    return folder


def write_params(folder: Path, changes: dict[str, Any]) -> None:
    """Put values at dotted keys of the project's params.yaml."""
    path = folder / "params.yaml"
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    for dotted_key, value in changes.items():
        *keys, last = dotted_key.split(".")
        section = tree
        for key in keys:
            section = section[key]
        section[last] = value
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")


def commit(folder: Path) -> None:
    run(folder, "git", "add", "-A")
    run(folder, "git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "state", "--allow-empty")


def environment(folder: Path) -> dict[str, str]:
    """Ours, without what an outer DVC or an accelerator run left, with the project's own sources first."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "ACCELERATE_"))}
    return clean | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}",
        "PYTHONPATH": str(folder / "src"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "DVC_NO_ANALYTICS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_AUTHOR_NAME": "t",
        "GIT_AUTHOR_EMAIL": "t@t",
        "GIT_COMMITTER_NAME": "t",
        "GIT_COMMITTER_EMAIL": "t@t",
    }


def run(folder: Path, *command: str, check: bool = True, timeout_s: float = 900) -> subprocess.CompletedProcess[str]:
    """Run a command in the project; with `check`, a failure shows what it printed."""
    done = subprocess.run(
        command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=timeout_s, check=False
    )
    if check:
        assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


def stages_run(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Names of the pipeline stages that DVC says it ran."""
    marks = ("Running stage '",)
    return [line.split("'")[1] for line in done.stdout.splitlines() if line.strip().startswith(marks)]
