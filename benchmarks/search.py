"""How far does the search of the default go? One pipeline run for every setting, and a table for LOG.md.

    python benchmarks/search.py                      # every setting that has no result yet, one after the other
    python benchmarks/search.py layers-4 hops-4      # these
    python benchmarks/search.py --table              # only the table

Every setting is the shipped `params.yaml` with some values changed, in a copy of the repository below `--work`, where
it is resumed if it was stopped. Its row holds the accuracies on 2,000 test questions; chance is one in as many as there
are candidates.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from coconut.report.tables import Table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/search"


@dataclass(frozen=True)
class Setting:
    """What differs from the shipped default."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    """Values of `params.yaml`, by dotted key."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """Values of the model's `config.json`."""
    warm_up: int = 3
    """Epochs of the chain of thought."""
    stage: int = 1
    """Epochs of each latent stage but the last, which has twice as many, with a falling rate."""
    controls: bool = False
    """Whether the curriculum without thoughts runs too."""


def _search(**values: Any) -> dict[str, Any]:
    return {f"data.generator.{key}": value for key, value in values.items()}


PRODUCT = {"task": "graph_symbols", "num_nodes": 14, "num_edges": 20, "min_hops": 3, "max_hops": 3, "edges": "words"}
SETTINGS = {
    "default": Setting(controls=True),
    "default, seed 1": Setting({"seed": 1}, controls=True),
    "layers-3": Setting(model={"n_layer": 3}),
    "layers-4": Setting(model={"n_layer": 4}),
    "layers-6": Setting(model={"n_layer": 6}),
    "layers-4, lr 1e-3": Setting({"lr": 1.0e-3}, {"n_layer": 4}),
    "hops-2": Setting(_search(hops=2)),
    "hops-4": Setting(_search(hops=4)),
    "hops-5": Setting(_search(hops=5)),
    "branches-3": Setting(_search(branches=3)),
    "branches-3, longer": Setting(_search(branches=3), warm_up=6, stage=2),
    "branches-3, hops-2": Setting(_search(branches=3, hops=2)),
    "candidates-3": Setting(_search(roots=3)),
    "candidates-4, hops-2": Setting(_search(roots=4, hops=2)),
    "triples": Setting(_search(edges="triples")),
    "triples, hops-2, longer": Setting(_search(edges="triples", hops=2), warm_up=8, stage=2),
    "product graphs": Setting({"data.generator": PRODUCT}, warm_up=6, stage=2),
    "mixing 0": Setting({"latent.uniform_prob": 0.0}),
    "mixing .1": Setting({"latent.uniform_prob": 0.1}),
    "mixing .6": Setting({"latent.uniform_prob": 0.6}),
    "hidden[-1]": Setting({"latent.thought": "hidden[-1]"}),
    "projection": Setting({"latent.thought": "projection"}),
    "markers": Setting({"latent.markers": True}),
    "2 thoughts a step": Setting({"latent.c_thought": 2}),
    "mixing 0, seed 1": Setting({"latent.uniform_prob": 0.0, "seed": 1}),
    "hidden[-1], seed 1": Setting({"latent.thought": "hidden[-1]", "seed": 1}),
    "markers, seed 1": Setting({"latent.markers": True, "seed": 1}),
    "hops-4, seed 1": Setting(_search(hops=4) | {"seed": 1}),
    "product graphs, seed 1": Setting({"data.generator": PRODUCT, "seed": 1}, warm_up=6, stage=2),
}


def build_params(setting: Setting) -> dict[str, Any]:
    """Return the whole parameters of a setting."""
    params: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    rate = 2.0e-3
    for dotted_key, value in setting.changes.items():
        if dotted_key == "lr":
            rate = value
            continue
        *keys, last = dotted_key.split(".")
        section = params
        for key in keys:
            section = section[key]
        section[last] = value
    generator = params["data"]["generator"]
    num_stages = params["latent"]["max_latent_stage"] = generator.get("hops", generator.get("max_hops"))
    params["model"] = "models/search"
    if "probe" in params:
        params["probe"]["enabled"] = False
    entries = {"cot": _entry("base", "cot", 0, setting.warm_up, rate)}
    for arm, method in [("latent", "coconut")] + [("no_thoughts", "no_thoughts")] * setting.controls:
        for stage in range(1, num_stages + 1):
            parent = "cot" if stage == 1 else f"{arm}_{stage - 1}"
            is_last = stage == num_stages
            entries[f"{arm}_{stage}"] = _entry(
                parent, method, stage, setting.stage * (1 + is_last), rate, falls=is_last
            )
    entries["no_cot"] = _entry("cot", "no_cot", 0, setting.stage * (num_stages + 1), rate, falls=True)
    params["curriculum"] = entries
    return params


def _entry(parent: str, method: str, stage: int, epochs: int, rate: float, *, falls: bool = False) -> dict[str, Any]:
    entry = {"parent": parent, "method": method, "latent_stage": stage, "epochs": epochs, "lr": rate}
    return entry | ({"schedule": "linear"} if falls else {})


def run(name: str, setting: Setting, work: Path) -> dict[str, Any]:
    """Run the pipeline of a setting to its end; return the accuracy of every entry."""
    tree = work / name.replace(" ", "-").replace("[", "").replace("]", "").replace(",", "")
    if not (tree / "dvc.yaml").exists():
        subprocess.run(["git", "clone", "-q", str(ROOT), str(tree)], check=True)
    config = json.loads((ROOT / "models/two-layers/config.json").read_text(encoding="utf-8"))
    (tree / "models/search").mkdir(parents=True, exist_ok=True)
    (tree / "models/search/config.json").write_text(json.dumps(config | {"n_positions": 96} | dict(setting.model)))
    params = build_params(setting)
    (tree / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    environment = os.environ | {
        "PYTHONPATH": str(tree / "src"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DVC_NO_ANALYTICS": "1",
    }
    targets = [f"evaluate@{entry}" for entry in params["curriculum"]]
    with (tree / "run.log").open("a", encoding="utf-8") as log:
        subprocess.run(["dvc", "repro", *targets], cwd=tree, env=environment, check=True, stdout=log, stderr=log)
    found = {}
    for entry in params["curriculum"]:
        metrics = json.loads((tree / f"outputs/{entry}/metrics.json").read_text(encoding="utf-8"))
        found[entry] = {key: metrics[key] for key in ("accuracy", "accuracy_low", "accuracy_high", "train_updates")}
    shutil.rmtree(tree)
    return found


def tabulate(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Lay out one row a setting, in the order of `SETTINGS`."""
    rows = []
    for name in SETTINGS:
        if name not in results:
            continue
        found = results[name]
        latent = [found[entry] for entry in sorted(found) if entry.startswith("latent_")]
        control = [found[entry]["accuracy"] for entry in sorted(found) if entry.startswith("no_thoughts_")]
        updates = sum(entry["train_updates"] for entry in latent)
        rows.append(
            [
                name,
                f"{found['cot']['accuracy']:.3f}",
                " ".join(f"{entry['accuracy']:.3f}" for entry in latent),
                f"{found['no_cot']['accuracy']:.3f}",
                f"{control[-1]:.3f}" if control else "-",
                f"{found['cot']['train_updates']:.0f} + {updates:.0f}",
            ]
        )
    headers = ["setting", "cot", "latent stages", "no_cot", "curriculum without thoughts", "updates"]
    return Table(headers, rows, num_text_columns=1).to_markdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="settings; default: all that have no result yet")
    parser.add_argument("--work", type=Path, default=ROOT / ".resume/search", help="folder of the copies")
    parser.add_argument("--table", action="store_true", help="print the table of the results there are")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in SETTINGS]:
        parser.error(f"no setting {unknown[0]!r}; known: {', '.join(SETTINGS)}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "accuracies.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not arguments.table:
        for name in arguments.names or [name for name in SETTINGS if name not in results]:
            results[name] = run(name, SETTINGS[name], arguments.work.absolute())
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            print(name, {entry: row["accuracy"] for entry, row in results[name].items()}, flush=True)
    print(tabulate(results))


if __name__ == "__main__":
    main()
