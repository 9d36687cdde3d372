"""Where the wall time of `make` on the embedded default goes: `dvc repro` from nothing, in a copy of the tree."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PROBE = """
import atexit, json, os, sys, time
STARTED = time.time()
def install():
    import importlib.abc, importlib.util
    spent = {}
    def timed(owner, name, key):
        function = getattr(owner, name)
        def wrapper(*arguments, **named):
            started = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                spent[key] = spent.get(key, 0.0) + time.perf_counter() - started
        setattr(owner, name, wrapper)
    targets = {
        "coconut.training.loop": [("Trainer", "update", "updates")],
        "coconut.evaluation.evaluator": [("Evaluator", "decode", "decoding"), ("Evaluator", "loss", "scoring")],
        "coconut.pipeline.resume": [("ResumeStore", "save", "saving states")],
        "coconut.pipeline.inputs": [("StageInputs", "read", "hashing"),
                                         ("StageInputs", "refuse_if_changed", "hashing")],
    }
    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name not in targets:
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            sys.meta_path.insert(0, self)
            run = spec.loader.exec_module
            def exec_module(module):
                run(module)
                for owner, function, key in targets[name]:
                    timed(getattr(module, owner), function, key)
            spec.loader.exec_module = exec_module
            return spec
    sys.meta_path.insert(0, Finder())
    def write():
        with open(os.environ["BENCH_PROBE"], "a") as file:
            file.write(json.dumps({"argv": sys.argv, "wall": time.time() - STARTED, **spent}) + "\\n")
    atexit.register(write)
if os.environ.get("BENCH_PROBE") and sys.argv and sys.argv[0].startswith("stages/"):
    install()
"""
"""Put into a `sitecustomize` module that only the copy's stages find; the code measured is not changed."""


def measure(*, device: str, repeats: int, **_: Any) -> dict[str, Any]:
    """Run `dvc repro` once in a copy and take its wall time apart."""
    del device, repeats
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        names = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split("\0")
        for name in filter(None, names):
            if (ROOT / name).is_file():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, tree / name)
        probe = Path(folder) / "probe"
        probe.mkdir()
        (probe / "sitecustomize.py").write_text(PROBE, encoding="utf-8")
        log_path = Path(folder) / "stages.jsonl"
        bin_dir = str(Path(sys.executable).parent)
        environment = os.environ | {
            "PYTHONPATH": f"{probe}{os.pathsep}{tree / 'src'}",
            "BENCH_PROBE": str(log_path),
            "PATH": bin_dir + os.pathsep + os.environ["PATH"],
            "DVC_NO_ANALYTICS": "1",
        }
        # Python's default: where it may not keep what it has compiled, every stage compiles our modules anew.
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        subprocess.run(["git", "init", "-q"], cwd=tree, check=True)
        subprocess.run(
            ["dvc", "config", "cache.dir", str(Path(folder) / "cache")], cwd=tree, env=environment, check=True
        )
        started = time.perf_counter()
        subprocess.run(["dvc", "repro", "-q"], cwd=tree, env=environment, check=True, stdout=subprocess.DEVNULL)
        wall = time.perf_counter() - started
        stages = [json.loads(line) for line in log_path.read_text(encoding="utf-8").splitlines()]
    return _account(wall, stages)


def _account(wall: float, stages: list[dict[str, Any]]) -> dict[str, Any]:
    keys = ("updates", "decoding", "scoring", "saving states", "hashing")
    spent = {key: sum(stage.get(key, 0.0) for stage in stages) for key in keys}
    in_stages = sum(stage["wall"] for stage in stages)
    rows = [
        {"stage": " ".join([Path(stage["argv"][0]).stem, *stage["argv"][1:]]), "wall": stage["wall"]}
        | {key: stage.get(key, 0.0) for key in keys}
        for stage in stages
    ]
    work = spent["updates"] + spent["decoding"] + spent["scoring"]
    return {
        "wall_s": wall,
        "work_s": work,
        "overhead_share": 1 - work / wall,
        "parts_s": {
            **spent,
            "stages: imports, loading, writing, all else": in_stages - sum(spent.values()),
            "DVC itself: its imports, hashing, copies": wall - in_stages,
        },
        "stages": rows,
    }


if __name__ == "__main__":
    print(json.dumps(measure(device="cpu", repeats=1), indent=1))
