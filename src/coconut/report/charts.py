"""Which lines the report draws: single updates, epochs, and accuracy by number of steps."""

from collections.abc import Mapping, Sequence

from coconut.evaluation.statistics import wilson_interval
from coconut.layout import UPDATE_COLUMNS
from coconut.report.results import Result, count_updates_before, find_lineage, find_reference, find_sizes
from coconut.report.svg import Chart, Point, Series

_OTHER_HUES = (4, 28, 290, 330, 178, 60, 255, 100)
_DASHES = ("", "5 3", "1.5 2.5", "8 3 2 3")
"""The dashes change each time that all hues are used up."""
_UPDATES = "updates since the untouched model"

Styles = Mapping[str, tuple[str, str]]
"""Colour and dashes of each entry."""


def choose_styles(results: Sequence[Result]) -> Styles:
    """Choose colour and dashes: the reference's chain in ever darker blue, steps in words green, others their own."""
    reference = find_reference(results)
    lineage = [] if reference is None else find_lineage(results, reference.name)
    chain = [result.name for result in lineage if reference is not None and result.method == reference.method]
    styles = {name: (f"hsl(212 80% {68 - 22 * (n + 1) / len(chain):.0f}%)", "") for n, name in enumerate(chain)}
    styles |= {result.name: ("hsl(140 55% 42%)", "") for result in results if result.kind.role == "words"}
    others = [result.name for result in results if result.name not in styles]
    for order, name in enumerate(others):
        again, hue = divmod(order, len(_OTHER_HUES))
        styles[name] = (f"hsl({_OTHER_HUES[hue]} 62% 52%)", _DASHES[again % len(_DASHES)])
    return styles


def draw_updates(results: Sequence[Result]) -> list[Chart]:
    """Draw training loss, learning rate and gradient norm of single updates, and the epochs' validation."""
    styles = choose_styles(results)

    def chart(title: str, label: str, column: str, *, epochs: bool = False, is_log: bool = True) -> Chart:
        series = [_series(results, one, column, styles, epochs=epochs) for one in results]
        limits = None if is_log or not epochs else (0.0, 1.0)
        return Chart(title, _UPDATES, label, series, is_log=is_log, limits=limits)

    charts = [
        chart("Training loss", "nats per token", "loss"),
        *(chart(f"Training loss: {name}", name, name) for name in _parts_of_losses(results)),
        chart("Validation loss", "nats per token", "valid_loss", epochs=True),
        chart("Validation accuracy", "share of right answers", "valid_accuracy", epochs=True, is_log=False),
        chart("Gradient norm", "norm before clipping", "grad_norm"),
        chart("Learning rate", "rate", "lr", is_log=False),
    ]
    return [one for one in charts if one.shown]


def _parts_of_losses(results: Sequence[Result]) -> list[str]:
    """Name the parts of losses that have several, as `updates.csv` does."""
    names = (name for result in results for row in result.updates[:1] for name in row)
    return list(dict.fromkeys(name for name in names if name not in UPDATE_COLUMNS))


def _series(results: Sequence[Result], result: Result, column: str, styles: Styles, *, epochs: bool) -> Series:
    before = count_updates_before(results, result)
    rows = result.history if epochs or not result.updates else result.updates
    # Where a run of an earlier version left no file of its updates, its epochs stand for them.
    column = column if epochs or result.updates else {"loss": "train_loss"}.get(column, column)
    points = [Point(before + (row.get("update") or 0), value) for row in rows if (value := row.get(column)) is not None]
    colour, dashes = styles[result.name]
    return Series(result.training_label, colour, points, dashes)


def draw_steps(results: Sequence[Result]) -> Chart | None:
    """Draw accuracy by number of gold steps, with Wilson's intervals; None where all questions have equally many."""
    scored = [result for result in results if result.predictions]
    groups = sorted({prediction.num_steps for result in scored for prediction in result.predictions})
    if len(groups) < 2:
        return None
    styles = choose_styles(results)
    series = []
    for order, result in enumerate(scored):
        # Entries stand side by side within a group, so that no interval hides another.
        shift = 0.5 * ((order + 0.5) / len(scored) - 0.5)
        points = []
        for num_steps in groups:
            right = [prediction.right for prediction in result.predictions if prediction.num_steps == num_steps]
            if right:
                low, high = wilson_interval(sum(right), len(right))
                points.append(Point(num_steps + shift, sum(right) / len(right), low, high))
        series.append(Series(result.label, styles[result.name][0], points, styles[result.name][1]))
    counts = [sum(p.num_steps == num_steps for p in scored[0].predictions) for num_steps in groups]
    named = ", ".join(f"{steps}: {count}" for steps, count in zip(groups, counts, strict=True))
    label = f"gold steps (questions: {named})" if len(groups) <= 6 else "gold steps"
    return Chart("Accuracy by number of steps", label, "test accuracy", series, limits=(0.0, 1.0), x_ticks=groups)


def draw_coverage(results: Sequence[Result], title: str) -> Chart | None:
    """Draw how probably one of k samples is right, over k; None where nothing was sampled more than once."""
    styles, series = choose_styles(results), []
    for result in results:
        points = []
        for size in find_sizes(result):
            value, low, high = (result.metric(f"pass_at_{size}{end}") for end in ("", "_low", "_high"))
            if value is not None:
                points.append(Point(size, value, low, high))
        if len(points) > 1:
            series.append(Series(result.label, styles[result.name][0], points, styles[result.name][1]))
    ticks = sorted({point.x for one in series for point in one.points})
    return Chart(title, "samples", "one is right", series, limits=(0.0, 1.0), x_ticks=ticks) if series else None


def draw_speed(results: Sequence[Result]) -> list[Chart]:
    """Draw what an update costs over the updates, and the tokens that it learns from in a second."""
    styles = choose_styles(results)
    charts = []
    for column, label in (("ms_per_update", "ms an update"), ("tokens_per_s", "tokens a second")):
        series = [_series(results, result, column, styles, epochs=True) for result in results]
        charts.append(Chart(label.capitalize(), _UPDATES, label, series))
    return [chart for chart in charts if chart.shown]
