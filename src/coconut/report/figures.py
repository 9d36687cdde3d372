"""The report's figures, as PNG bytes; the same results give the same bytes.

Only matplotlib's object interface is used: no backend, no global state, no display.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from coconut.evaluation.statistics import wilson_interval
from coconut.report.results import Result, count_updates_before, find_last, find_lineage

_OTHER_COLOURS = ("#d62728", "#ff7f0e", "#8c564b", "#9467bd", "#e377c2", "#bcbd22", "#7f7f7f", "#17becf")
_MARKERS = "osD^vPX"
"""The marker changes each time all colours are used up."""
_GREY = "#808080"


def draw_figures(results: Sequence[Result]) -> dict[str, bytes]:
    """Draw every figure for which there is data, by name."""
    drawers: dict[str, Callable[[Sequence[Result]], Figure | None]] = {
        "accuracy": _draw_accuracy,
        "loss": _draw_loss,
        "steps": _draw_steps,
        "seconds": _draw_seconds,
        "speed": _draw_speed,
    }
    figures = {name: draw(results) for name, draw in drawers.items()}
    return {name: _to_png(figure) for name, figure in figures.items() if figure is not None}


def _to_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without matplotlib's version, which `Software: None` leaves out, the bytes do not depend on it.
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _draw_accuracy(results: Sequence[Result]) -> Figure | None:
    scored = [result for result in results if result.metric("accuracy") is not None]
    if not scored:
        return None
    figure, axes = _new_figure(width=8.0, height=1.3 + 0.32 * len(scored))
    styles = _styles(results)
    for row, result in enumerate(scored):
        accuracy = result.metric("accuracy") or 0.0
        low, high = (result.metric(name) for name in ("accuracy_low", "accuracy_high"))
        error = [[accuracy - (accuracy if low is None else low)], [(accuracy if high is None else high) - accuracy]]
        axes.errorbar(accuracy, row, xerr=error, capsize=4, ls="", **styles[result.name])
        axes.annotate(f"{accuracy:.3f}", (1.06, row), va="center", fontsize=8, annotation_clip=False)
        first = result.history[0].get("first_update_accuracy") if result.history else None
        if first is not None:
            axes.plot(first, row, ls="", mfc="white", zorder=1, **styles[result.name])
    axes.plot([], [], "o", color=_GREY, label="test, after training, 95 % interval")
    axes.plot([], [], "o", mfc="white", color=_GREY, label="validation, before the first update")
    axes.set(xlim=(-0.03, 1.03), ylim=(len(scored) - 0.5, -0.5), xlabel="accuracy")
    axes.set_yticks(range(len(scored)), [result.label for result in scored])
    _legend_above(axes, num_columns=2)
    return figure


def _draw_loss(results: Sequence[Result]) -> Figure | None:
    trained = [result for result in results if result.history]
    if not trained:
        return None
    figure, panels = _new_figure(width=10.0, height=_height_for_legend(trained), num_columns=2)
    styles = _styles(results)
    for axes, column, title in zip(panels, ("train_loss", "valid_loss"), ("training", "validation"), strict=True):
        for result in trained:
            before = count_updates_before(results, result)
            points = [
                (before + (row.get("update") or 0), loss)
                for row in result.history
                if (loss := row.get(column)) is not None and loss > 0
            ]
            axes.plot(*_transpose(points), ms=3, lw=1.2, label=result.training_label, **styles[result.name])
        axes.set(yscale="log", xlabel="updates since the untouched model", title=f"{title} loss, nats per token")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    _legend_beside(figure, panels[0])
    return figure


def _draw_steps(results: Sequence[Result]) -> Figure | None:
    scored = [result for result in results if result.predictions]
    if not scored:
        return None
    counts: dict[int, int] = {}
    for prediction in scored[0].predictions:
        counts[prediction.num_steps] = counts.get(prediction.num_steps, 0) + 1
    groups = sorted({prediction.num_steps for result in scored for prediction in result.predictions})
    width = min(14.0, max(6.0, 3 + 0.12 * len(groups) * len(scored)))
    figure, axes = _new_figure(width=width, height=_height_for_legend(scored))
    styles = _styles(results)
    for order, result in enumerate(scored):
        # Entries stand side by side within a group, so that no interval hides another.
        shift = 0.7 * ((order + 0.5) / len(scored) - 0.5)
        for column, num_steps in enumerate(groups):
            right = [prediction.right for prediction in result.predictions if prediction.num_steps == num_steps]
            if not right:
                continue
            accuracy, (low, high) = sum(right) / len(right), wilson_interval(sum(right), len(right))
            error = [[accuracy - low], [high - accuracy]]
            axes.errorbar(column + shift, accuracy, yerr=error, ls="", ms=4, capsize=2, **styles[result.name])
        axes.plot([], [], ls="", ms=4, label=result.label, **styles[result.name])
    for column in range(1, len(groups)):
        axes.axvline(column - 0.5, color="#dddddd", lw=0.8)
    axes.set(ylim=(-0.04, 1.04), xlim=(-0.5, len(groups) - 0.5), ylabel="test accuracy")
    axes.set_xlabel("gold steps (and how many examples have so many)")
    axes.set_xticks(range(len(groups)), [f"{num_steps}\n({counts.get(num_steps, 0)})" for num_steps in groups])
    _legend_beside(figure, axes)
    return figure


def _draw_seconds(results: Sequence[Result]) -> Figure | None:
    timed = [result for result in results if result.metrics is not None]
    if not timed:
        return None
    figure, axes = _new_figure(width=8.0, height=1.2 + 0.32 * len(timed))
    names = [result.label for result in timed]
    training = [result.metric("train_seconds") or 0.0 for result in timed]
    scoring = [(result.metric("seconds_per_example") or 0) * (result.metric("num_examples") or 0) for result in timed]
    axes.barh(names, training, color="#4c78a8", label="training")
    axes.barh(names, scoring, left=training, color="#f2b447", label="generating the test answers")
    for row, total in enumerate(train + score for train, score in zip(training, scoring, strict=True)):
        axes.annotate(f"{total:.3g} s", (total, row), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.margins(x=0.12)
    axes.set_xlabel("seconds")
    _legend_above(axes, num_columns=2)
    return figure


_SPEED_PANELS = (
    ("ms_per_update", "ms / update"),
    ("tokens_per_s", "tokens / s"),
    ("padding_share", "padding share"),
    ("num_latents", "latents / example"),
)


def _draw_speed(results: Sequence[Result]) -> Figure | None:
    trained = [result for result in results if result.history]
    if not trained:
        return None
    num_epochs = sum(len(result.history) for result in trained)
    width = min(14.0, max(7.0, 2 + 0.22 * num_epochs, 2 + 0.8 * len(trained)))
    figure, panels = _new_figure(width=width, height=7.0, num_rows=4)
    styles = _styles(results)
    for axes, (column, label) in zip(panels, _SPEED_PANELS, strict=True):
        start = 0
        for order, result in enumerate(trained):
            end = start + len(result.history)
            if order % 2:
                axes.axvspan(start - 0.5, end - 0.5, color="#f1f1f1", lw=0)
            known = [(start + row, epoch.get(column)) for row, epoch in enumerate(result.history)]
            points = [(epoch, value) for epoch, value in known if value is not None]
            axes.plot(*_transpose(points), ms=3, lw=1.2, **styles[result.name])
            start = end
        top = max(axes.get_ylim()[1], 1e-3)
        # Panels start at 0 so that heights can be compared; the margin keeps points off the frame.
        axes.set(ylabel=label, xlim=(-0.5, num_epochs - 0.5), ylim=(-0.05 * top, 1.05 * top))
        axes.set_xticks([])
    _name_bands(panels[-1], trained)
    return figure


_MANY = 12
"""With more entries than this, names are written vertically so that they do not overlap."""


def _name_bands(axes: Any, trained: Sequence[Result]) -> None:
    ends = [sum(len(result.history) for result in trained[: order + 1]) for order in range(len(trained))]
    centres = [end - (len(result.history) + 1) / 2 for end, result in zip(ends, trained, strict=True)]
    many = len(trained) > _MANY
    turn = {"rotation": 90, "va": "center", "fontsize": 7} if many else {"rotation": 30}
    axes.set_xticks(centres, [result.training_label for result in trained], ha="right", rotation_mode="anchor", **turn)
    axes.set_xlabel("epochs of every entry, in the curriculum's order")


def _new_figure(*, width: float, height: float = 4.0, num_rows: int = 1, num_columns: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(num_rows, num_columns)
    for axes in [panels] if num_rows * num_columns == 1 else panels:
        axes.grid(axis="y", color="#e4e4e4", lw=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _styles(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """Choose colour and marker: `coconut` in ever darker blue along its curriculum, `cot` green, others their own."""
    reference = find_last(results, "coconut")
    lineage = [] if reference is None else find_lineage(results, reference.name)
    chain = [result.name for result in lineage if result.method == "coconut"]
    styles: dict[str, dict[str, Any]] = {
        name: {"color": colormaps["Blues"](0.35 + 0.6 * (order + 1) / len(chain)), "marker": "o"}
        for order, name in enumerate(chain)
    }
    styles |= {result.name: {"color": "#2ca02c", "marker": "o"} for result in results if result.method == "cot"}
    others = [result.name for result in results if result.name not in styles]
    for order, name in enumerate(others):
        again, colour = divmod(order, len(_OTHER_COLOURS))
        styles[name] = {"color": _OTHER_COLOURS[colour], "marker": _MARKERS[again % len(_MARKERS)]}
    return styles


def _legend_above(axes: Any, *, num_columns: int) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=num_columns, frameon=False, fontsize=8)


def _legend_beside(figure: Figure, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)


def _height_for_legend(results: Sequence[Result]) -> float:
    return max(4.0, 0.4 + 0.18 * len(results))


def _transpose(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
