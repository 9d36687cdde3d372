"""How the cost of an update grows with thoughts, rows and columns."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coconut.data.collator import Batch
from workload import (
    Update,
    alternate,
    build_gpt2,
    make_batch,
    plain,
    share_optimizer,
    update_peak_mb,
    with_thoughts,
)


def over_thoughts(*, device: str, repeats: int, results_dir: Path, **_: Any) -> dict[str, Any]:
    """0 to 24 thoughts, B = 8."""
    batches = {count: make_batch(8, device, num_latents=count) for count in (0, 1, 2, 4, 6, 8, 12, 16, 24)}
    return _measure(batches, device, repeats, results_dir / "growth_thoughts.png", "thoughts (B = 8)")


def over_batch(*, device: str, repeats: int, results_dir: Path, **_: Any) -> dict[str, Any]:
    """1 to 64 rows, 6 thoughts."""
    batches = {count: make_batch(count, device) for count in (1, 2, 4, 8, 16, 32, 64)}
    return _measure(batches, device, repeats, results_dir / "growth_batch.png", "rows (6 thoughts)", log=True)


def over_columns(*, device: str, repeats: int, results_dir: Path, **_: Any) -> dict[str, Any]:
    """64 to 1024 columns, 6 thoughts, B = 4; all but 22 of them are question."""
    batches = {
        count: make_batch(4, device, question=(count - 22, count - 22), supervised=(16, 16))
        for count in (64, 128, 256, 512, 1024)
    }
    return _measure(batches, device, repeats, results_dir / "growth_columns.png", "columns (B = 4)", log=True)


def _measure(
    batches: Mapping[int, Batch], device: str, repeats: int, figure_path: Path, label: str, *, log: bool = False
) -> dict[str, Any]:
    model = build_gpt2(device)
    result: dict[str, Any] = {"label": label}
    rows = []
    for size, batch in batches.items():
        updates = {"plain": Update(model, batch, plain), "latent": Update(model, batch, with_thoughts)}
        share_optimizer(updates)
        rows.append(
            {
                "size": size,
                "seconds": alternate(updates, repeats=min(3, repeats)),
                "peak_mb": {name: update_peak_mb(update) for name, update in updates.items()},
            }
        )
    _draw(rows, figure_path, label, log=log)
    return result | {"rows": rows, "figure": figure_path.name}


def _draw(rows: list[dict[str, Any]], path: Path, label: str, *, log: bool) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, key, unit in ((axes[0], "seconds", "s per update"), (axes[1], "peak_mb", "peak MB above weights")):
        for name, style in (("plain", "o--"), ("latent", "o-")):
            axis.plot([row["size"] for row in rows], [row[key][name] for row in rows], style, label=name)
        if log:
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks([row["size"] for row in rows], [str(row["size"]) for row in rows])
        else:
            axis.set_ylim(bottom=0)
        axis.set_xlabel(label)
        axis.set_ylabel(unit)
        axis.grid(alpha=0.3)
        axis.legend()
    # No date inside: the same numbers give the same bytes.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
