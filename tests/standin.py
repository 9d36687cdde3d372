"""A git + DVC repository with a stand-in for the pipeline: the same shapes, seconds instead of hours.

`behaviour.json` is no dependency: it says how a stage behaves this time, without changing what it is.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

DVC_YAML = """
stages:
  base:
    cmd: exec python stage.py base
    deps: [stage.py]
    outs: [outputs/base]
  train:
    foreach: ${curriculum}
    do:
      cmd: exec python stage.py train@${key}
      deps: [stage.py, "outputs/${item.parent}"]
      params: ["curriculum.${key}"]
      outs: ["outputs/${key}"]
"""
PARAMS_YAML = """
curriculum:
  cot: {parent: base, num_updates: 20}
  latent_1: {parent: cot, num_updates: 20}
  no_cot: {parent: base, num_updates: 20}
"""
STAGE = """
import json, os, signal, sys, time
from pathlib import Path
from coconut.pipeline.signals import die_with_parent
die_with_parent()
import yaml
from loguru import logger
from coconut.pipeline.stage import run_stage

def behaviour(name):
    path = Path(os.environ.get("DVC_ROOT", "."), "behaviour.json")
    behaviours = json.loads(path.read_text())
    todo = behaviours.get(name, [])
    now = todo.pop(0) if todo else {}
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.write_text(json.dumps(behaviours))
    fresh.replace(path)  # Another branch may be reading.
    return now

def train(name):
    import torch
    from coconut.checkpoints.tensors import load_tensors, save_tensors
    from coconut.pipeline.inputs import StageInputs
    from coconut.pipeline.signals import stop_on_signals
    from coconut.pipeline.resume import ResumeStore, State, TensorsFile
    inputs = StageInputs.read(name)
    now = behaviour(name)
    entry = yaml.safe_load(Path("params.yaml").read_text())["curriculum"][name.split("@")[1]]
    with stop_on_signals() as stop, ResumeStore.open(
        name, inputs.fingerprint, TensorsFile(save_tensors, load_tensors)
    ) as store:
        state = store.load() or State(0, {"w": torch.zeros(3)}, {})
        update, w = state.update, state.tensors["w"]
        while update < entry["num_updates"]:
            update, w = update + 1, w * 1.5 + update
            store.save(State(update, {"w": w}, {}))
            store.write_progress(update, num_updates=entry["num_updates"], loss=1 / update, eta_s=1.0)
            time.sleep(now.get("nap", 0))
            if update == now.get("die_at"):
                os.kill(os.getpid(), signal.SIGKILL)
            if update == now.get("fail_at"):
                raise ValueError(f"curriculum.{name}: a loss that is not finite at update {update}")
            if stop.requested:
                logger.warning("{}: stopped at update {}", name, update)
                raise stop.preempted()
        inputs.refuse_if_changed()
        Path("outputs", name.split("@")[1]).write_text(f"{w.tolist()}\\n")

def base():
    time.sleep(behaviour("base").get("nap", 0))
    Path("outputs").mkdir(exist_ok=True)
    Path("outputs/base").write_text("base\\n")

name = sys.argv[1]
run_stage(base if name == "base" else lambda: train(name), name)
"""


def environment() -> dict[str, str]:
    """This environment without DVC's variables, with this Python first and nothing sent anywhere."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DVC_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return clean | {"PATH": path, "DVC_NO_ANALYTICS": "1", "OMP_NUM_THREADS": "1"}


def make_repository(root: Path) -> Path:
    """Create the repository in the folder `root`; nothing has run in it yet."""
    root.mkdir(parents=True, exist_ok=True)
    texts = {
        "dvc.yaml": DVC_YAML,
        "params.yaml": PARAMS_YAML,
        "stage.py": STAGE,
        ".gitignore": "/.resume/\n/outputs/\n/behaviour.json\n",
    }
    for name, text in texts.items():
        (root / name).write_text(text)
    behave(root, {})
    for command in (
        ["git", "init", "-q"],
        [sys.executable, "-m", "dvc", "init", "-q"],
        ["git", "add", "."],
        ["git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "start"],
    ):
        subprocess.run(command, cwd=root, env=environment(), check=True)
    return root


def behave(root: Path, behaviours: dict[str, list[dict[str, Any]]]) -> None:
    """Say how the next runs of each stage behave; after the last one, well."""
    (root / "behaviour.json").write_text(json.dumps(behaviours))


def run(root: Path, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `python -m COMMAND` in the repository to its end."""
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=root, env=environment(), capture_output=True, text=True, **options
    )


def start(root: Path, *command: str, **options: Any) -> subprocess.Popen[str]:
    """Start `python -m COMMAND` in the repository, in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=root,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **options,
    )
