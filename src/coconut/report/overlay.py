"""Several runs on one page: seeds beside each other, groups of experiments over each other."""

from collections.abc import Sequence

from coconut.report.compare import Group, describe_changes, pairs_table, seeds_table
from coconut.report.render import Section
from coconut.report.results import Result, count_updates_before, find_lineage, find_reference
from coconut.report.svg import Chart, Point, Series
from coconut.report.tables import Table
from coconut.report.text import visible

_HUES = (212, 28, 140, 290, 4, 178, 330, 60)
_DASHES = ("", "5 3", "1.5 2.5", "8 3 2 3")
"""The first seed of a group is drawn through, the next ones with dashes."""


def compare_sections(groups: Sequence[Group]) -> list[Section]:
    """Decide what a page over several runs says, in its order."""
    sections = [
        Section("Experiments", _EXPERIMENTS_TEXT, _experiments_table(groups)),
        Section("Accuracy over seeds", _SEEDS_TEXT, seeds_table(groups), _accuracy_charts(groups)),
    ]
    for other in groups[1:]:
        table = pairs_table(groups[0], other)
        if table.rows:
            title = f"{other.letter} against {groups[0].letter}"
            sections.append(Section(title, "Paired by seed and by test example.", table))
    curves = _curves(groups)
    if curves:
        sections.append(Section("Training, to the last latent entry", _CURVES_TEXT, charts=curves))
    return [one for one in sections if one.charts or (one.table is not None and one.table.rows)]


_EXPERIMENTS_TEXT = "Experiments that differ only in the seed are one group, which a letter names."
_SEEDS_TEXT = "The interval counts both kinds of chance: which seed, and which test examples."
_CURVES_TEXT = "One colour for each group, one form of dash for each of its seeds."


def _experiments_table(groups: Sequence[Group]) -> Table:
    rows = []
    for group in groups:
        changes = describe_changes(groups[0].params, group.params) if group is not groups[0] else "the first"
        for seed, one in group.by_seed().items():
            left_out = ", ".join(one.left_out) or "-"
            rows.append([group.letter, visible(one.name), str(seed), visible(changes), left_out])
    return Table(["group", "experiment", "seed", "what its params change", "left out, not up to date"], rows, 5)


def _accuracy_charts(groups: Sequence[Group]) -> list[Chart]:
    """Draw the accuracy of every entry, in the curriculum's order, one line a run."""
    names = list(dict.fromkeys(r.name for g in groups for e in g.experiments for r in e.results))
    series = []
    for label, colour, dashes, results in _runs(groups):
        by_name = {result.name: result for result in results}
        points = [
            Point(place, accuracy, by_name[name].metric("accuracy_low"), by_name[name].metric("accuracy_high"))
            for place, name in enumerate(names, 1)
            if name in by_name and (accuracy := by_name[name].metric("accuracy")) is not None
        ]
        series.append(Series(label, colour, points, dashes))
    ticks = list(range(1, len(names) + 1))
    chart = Chart("Accuracy by entry", "entry", "test accuracy", series, limits=(0, 1), x_ticks=ticks, x_names=names)
    return [chart] if chart.shown else []


def _curves(groups: Sequence[Group]) -> list[Chart]:
    charts = []
    for title, label, column, is_log in (
        ("Training loss", "nats per token", "loss", True),
        ("Gradient norm", "norm before clipping", "grad_norm", True),
    ):
        series = [Series(run, colour, _points(results, column), d) for run, colour, d, results in _runs(groups)]
        charts.append(Chart(title, "updates since the untouched model", label, series, is_log=is_log))
    return [chart for chart in charts if chart.shown]


def _points(results: Sequence[Result], column: str) -> list[Point]:
    """Join the curves from the untouched model to the last latent entry, or to the first entry that there is."""
    end = find_reference(results) or next((one for one in results if one.updates), None)
    points = []
    for result in [] if end is None else find_lineage(results, end.name):
        before = count_updates_before(results, result)
        points += [
            Point(before + (row.get("update") or 0), value)
            for row in result.updates
            if (value := row.get(column)) is not None
        ]
    return points


def _runs(groups: Sequence[Group]) -> list[tuple[str, str, str, Sequence[Result]]]:
    """Return name, colour, dashes and results of every run."""
    return [
        (
            f"{group.letter}, seed {seed}",
            f"hsl({_HUES[place % len(_HUES)]} 62% 52%)",
            _DASHES[number % len(_DASHES)],
            experiment.results,
        )
        for place, group in enumerate(groups)
        for number, (seed, experiment) in enumerate(group.by_seed().items())
    ]
