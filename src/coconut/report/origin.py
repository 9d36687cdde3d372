"""Where a report comes from: commit, date, machine, versions, load, and the parameters of the run."""

import datetime
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coconut.config.strict import parse_yaml
from coconut.report.results import Result
from coconut.report.text import visible
from coconut.tracking import flatten


def describe_origin(root: Path) -> dict[str, str]:
    """Name the commit, the time and the machine of this moment."""
    now = datetime.datetime.now(datetime.UTC)
    return {
        "commit": _commit(root),
        "written": f"{now:%Y-%m-%d %H:%M} UTC",
        "machine": f"{_processor()}, {os.cpu_count()} cores, {platform.system()}",
    }


def describe_training(results: Sequence[Result]) -> dict[str, str]:
    """Name the versions that trained the entries, how their passes were done, and how busy the machine was."""
    trained = [result.facts for result in results if result.facts]
    found = {}
    versions = {_join(facts.get("versions")) for facts in trained} - {""}
    if versions:
        found["versions"] = visible("; or ".join(sorted(versions)))
    loads = [load for facts in trained if isinstance(load := facts.get("train_load"), int | float)]
    if loads:
        found["load per core while training"] = f"{min(loads):.2f} to {max(loads):.2f}"
    passes = {str(facts.get("passes")) for facts in trained if facts.get("passes")}
    if passes:
        found["passes"] = visible("; or ".join(sorted(passes)))
    return found


def read_parameters(path: Path) -> dict[str, Any]:
    """Read params.yaml as dotted keys and values."""
    return flatten(parse_yaml(path.read_text(encoding="utf-8"), path.name))


def _join(versions: Any) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) if isinstance(versions, dict) else ""


def _commit(root: Path) -> str:
    """Name the commit, and whether files differ from it that the pipeline does not write."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "--short=12", "HEAD")
    if commit is None:
        return "not in git"
    changed = git("status", "--porcelain", "--", "src", "stages", "params.yaml", "dvc.yaml")
    return f"{commit}, with uncommitted changes" if changed else commit


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
