"""What the arms of a curriculum reached and how fast, over runs that differ in their seed: LOG.md's tables and figures.

    python benchmarks/arms.py FIGURE.png RUN [RUN ...]       # each RUN a finished copy of the repository

An arm is an entry that no other entry has as its parent. Speed is the mean validation accuracy over the epochs after
the shared warm-up (an entry with its whole chain in words), each stage's accuracy before its first update included: 1
would be an arm that never failed.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from coconut.config.params import load_params
from coconut.evaluation.statistics import mean_interval
from coconut.report.reading import read_folder
from coconut.report.results import Result, find_lineage, read_results
from coconut.report.tables import Table

Curve = list[tuple[float, float]]
"""(epochs after the warm-up, validation accuracy)."""


@dataclass(frozen=True)
class Run:
    """The arms of one finished run that were trained to their end, each as its lineage without the warm-up."""

    seed: int
    arms: dict[str, list[Result]]


def read_run(folder: Path) -> Run:
    """Read a copy of the repository after its `dvc repro`."""
    params = load_params(folder / "params.yaml")
    results = [result for result in read_results(params.curriculum, read_folder(folder / "outputs")) if result.history]
    parents = {entry.parent for entry in params.curriculum.values()}
    arms = {}
    for leaf in results:
        if leaf.name not in parents:
            lineage = find_lineage(results, leaf.name)
            arms[leaf.name] = [part for part in lineage if part is leaf or not _is_warm_up(part)]
    return Run(params.seed, arms)


def _is_warm_up(result: Result) -> bool:
    # `coconut` at stage 0 is a chain of thought after its markers.
    return result.method == "cot" or (result.method == "coconut" and result.latent_stage == 0)


def curve(lineage: Sequence[Result]) -> Curve:
    """Validation accuracy along the arm; two points where a stage begins."""
    points, epochs = [], 0
    for part in lineage:
        first = part.history[0].get("first_update_accuracy")
        if first is not None:
            points.append((float(epochs), first))
        for row in part.history:
            epochs += 1
            if (accuracy := row.get("valid_accuracy")) is not None:
                points.append((float(epochs), accuracy))
    return points


def tabulate(runs: Sequence[Run]) -> str:
    """One row an arm: test accuracy of each seed, mean and interval over seeds, updates, speed."""
    rows = []
    for name in dict.fromkeys(name for run in runs for name in run.arms):
        arms = [run.arms.get(name) for run in runs]
        tested = [None if arm is None else arm[-1].metric("accuracy") for arm in arms]
        found = [accuracy for accuracy in tested if accuracy is not None]
        mean, low, high = mean_interval(found) if found else (float("nan"),) * 3
        interval = f" [{max(0.0, low):.3f}, {min(1.0, high):.3f}]" if len(found) > 1 else ""
        trained = [arm for arm in arms if arm is not None]
        speeds = [sum(y for _, y in curve(arm)) / len(curve(arm)) for arm in trained]
        updates = sum(part.history[-1]["update"] or 0 for part in trained[0])
        rows.append(
            (
                name,
                " ".join("-" if accuracy is None else f"{accuracy:.3f}" for accuracy in tested),
                f"{mean:.3f}{interval}" if found else "-",
                f"{updates:.0f}",
                f"{sum(speeds) / len(speeds):.2f}",
            )
        )
    seeds = " ".join(str(run.seed) for run in runs)
    headers = ("arm", f"test accuracy, seeds {seeds}", "mean [95 %]", "updates after the warm-up", "speed")
    return Table(headers, rows).to_markdown()


def draw(runs: Sequence[Run], path: Path) -> None:
    """One panel an arm, one line a seed."""
    names = list(dict.fromkeys(name for run in runs for name in run.arms))
    num_columns = min(4, len(names))
    num_rows = -(-len(names) // num_columns)
    figure = Figure(figsize=(2.4 * num_columns, 1.7 * num_rows), layout="constrained")
    panels = list(figure.subplots(num_rows, num_columns, sharey=True, squeeze=False).flat)
    for panel in panels:
        panel.set_axis_off()
    for panel, name in zip(panels, names, strict=False):
        panel.set_axis_on()
        panel.set_title(name, fontsize=8)
        panel.set_ylim(-0.03, 1.03)
        panel.tick_params(labelsize=7)
        panel.grid(axis="y", color="#e4e4e4", lw=0.6)
        for run in runs:
            if name in run.arms:
                panel.plot(*zip(*curve(run.arms[name]), strict=True), lw=1.1)
    figure.supxlabel("epochs after the warm-up", fontsize=8)
    figure.supylabel("validation accuracy", fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", type=Path, help="PNG file to write")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a finished run")
    arguments = parser.parse_args()
    runs = [read_run(folder) for folder in arguments.runs]
    if len({run.seed for run in runs}) < len(runs):
        parser.error("two runs of one seed: found " + ", ".join(f"{run.seed}" for run in runs) + ", wanted one a seed")
    draw(runs, arguments.figure)
    print(tabulate(runs))


if __name__ == "__main__":
    main()
