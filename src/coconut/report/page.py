"""The report: `report.md` with its figures next to it, `report.html` with everything inside, and the curves."""

import base64
import html
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coconut.config.schema import BASE, Params
from coconut.files import check_free_space, replace_file
from coconut.report.curves import CURVES_FILE, write_curves
from coconut.report.figures import draw_figures
from coconut.report.paper import PAPER_NOTE, paper_table
from coconut.report.provenance import Provenance
from coconut.report.results import Result, find_last, read_facts, read_folder, read_results
from coconut.report.speed import explain_speed, speed_table
from coconut.report.tables import Table, accuracy_table, facts_table
from coconut.report.text import NOT_THERE, shorten, visible

PAGE_FILE = "report.html"
_NUM_MISTAKES = 10
_SMALL_TEST_SET = 100
_MOST = 0.5
"""Share of questions without an answer from which on the page says so in words."""
NO_DATA = "No data."

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: pre-wrap }
th.text, td.text { text-align: left }
img { max-width: 100%; height: auto }
"""


@dataclass(frozen=True)
class Section:
    """A heading and its content, independent of the output format."""

    title: str
    text: str = ""
    table: Table | None = None
    figure: str | None = None


def write_report(params: Params, outputs_dir: Path, report_dir: Path, provenance: Provenance | None = None) -> None:
    """Write the report on all entries of the curriculum; what a failed stage did not leave is said to be missing.

    Raises:
        ValueError: a file of an entry is damaged.
        OSError: the report cannot be written.
    """
    provenance = provenance or Provenance()
    read_text = read_folder(outputs_dir)
    results = read_results(params.curriculum, read_text, marks=provenance.marks)
    figures = draw_figures(results)
    sections = build_sections(results, facts=read_facts(read_text), provenance=provenance)
    title = visible(f"{params.model}, seed {params.seed}")
    report_dir.mkdir(parents=True, exist_ok=True)
    files = {f"{name}.png": png for name, png in figures.items()}
    files[CURVES_FILE] = write_curves(results).encode()
    files["report.md"] = render_markdown(title, sections, figures.keys()).encode()
    files[PAGE_FILE] = render_html(title, sections, figures).encode()
    check_free_space({report_dir: sum(map(len, files.values()))})
    for name, content in files.items():
        replace_file(report_dir / name, content)


def build_sections(
    results: Sequence[Result], *, facts: Mapping[str, Any] | None, provenance: Provenance
) -> list[Section]:
    """Decide what the report says, in its order."""
    unfinished = provenance.table()
    partial = [Section("This page is partial", _PARTIAL_TEXT, unfinished)] if unfinished.rows else []
    paper = paper_table(results)
    arms = [] if paper is None else [Section("The arms in the paper's layout", PAPER_NOTE, paper)]
    return [
        *partial,
        Section("Results", _results_text(results, provenance), accuracy_table(results)),
        *arms,
        Section("Accuracy by training stage", figure="accuracy"),
        Section("Accuracy by number of gold steps", "Each group has its own 95 % Wilson interval.", figure="steps"),
        Section("Loss", "There is one point an epoch; an entry starts where its parent ended.", figure="loss"),
        Section("Seconds by stage", figure="seconds"),
        Section("Speed over the epochs", explain_speed(results), speed_table(results), "speed"),
        _mistakes_section(results),
        _data_section(facts),
    ]


_PARTIAL_TEXT = "These stages of the pipeline are not up to date, so the results below are incomplete or marked."


def render_markdown(title: str, sections: Sequence[Section], figures: Collection[str]) -> str:
    """Write one Markdown page; the figures are files next to it."""
    blocks = [f"# {title}"]
    for section in sections:
        blocks += [f"## {section.title}", section.text]
        if section.figure is not None:
            blocks.append(f"![{section.title}]({section.figure}.png)" if section.figure in figures else NO_DATA)
        if section.table is not None:
            blocks.append(section.table.to_markdown() if section.table.rows else NO_DATA)
    return "\n\n".join(block for block in blocks if block) + "\n"


def render_html(title: str, sections: Sequence[Section], figures: Mapping[str, bytes]) -> str:
    """Write one page that needs no other file and no network."""
    blocks = [f"<h1>{html.escape(title)}</h1>"]
    for section in sections:
        blocks.append(f"<h2>{html.escape(section.title)}</h2>")
        if section.text:
            blocks.append(f"<p>{html.escape(section.text)}</p>")
        if section.figure is not None:
            blocks.append(_embed(figures[section.figure], section.title) if section.figure in figures else NO_DATA)
        if section.table is not None:
            blocks.append(section.table.to_html() if section.table.rows else NO_DATA)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return "\n".join([f'<!doctype html>\n<html lang="en"><head>{head}</head><body>', *blocks, "</body></html>\n"])


def _embed(png: bytes, title: str) -> str:
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{base64.b64encode(png).decode("ascii")}">'


def _results_text(results: Sequence[Result], provenance: Provenance) -> str:
    sentences = [
        "Accuracy on the test split with its 95 % Wilson interval: what another test set of this size might have"
        " given, not what another seed might have."
    ]
    reference = find_last(results, "coconut")
    if reference is not None:
        sentences.append(
            f"p: exact two-sided McNemar test of each entry against {reference.name}, paired by example,"
            " not corrected for the number of entries."
        )
    missing = [result.name for result in results if result.metrics is None]
    if missing:
        sentences.append(f"{NOT_THERE.capitalize()}: {', '.join(missing)}; `dvc repro` makes them.")
    sentences += [provenance.explain([result.label for result in results]), *_warnings(results)]
    return " ".join(filter(None, sentences))


def _warnings(results: Sequence[Result]) -> list[str]:
    """Say what makes these accuracies worth less than they seem."""
    sentences = []
    smallest = min((int(result.metric("num_examples") or 0) for result in results if result.metrics), default=0)
    if 0 < smallest < _SMALL_TEST_SET:
        sentences.append(
            f"The test split is small: with {smallest} examples one more right answer is worth {1 / smallest:.3f}."
        )
    trained = [result for result in results if result.name != BASE]
    silent = [result.label for result in trained if (result.metric("no_answer_share") or 0) >= _MOST]
    if silent:
        sentences.append(
            f"No answer to at least half of the questions: {', '.join(silent)}. A model that has not learnt the form"
            " of an answer scores 0 whatever it computes: train it longer, or raise evaluate.max_new_tokens if its"
            " text is cut off."
        )
    return sentences


def _mistakes_section(results: Sequence[Result]) -> Section:
    """Show some wrong answers of the entry that the report is about."""
    result = find_last(results, "coconut") or next((other for other in results if other.predictions), None)
    if result is None or not result.predictions:
        return Section("Mistakes", f"Predictions: {NOT_THERE}.")
    wrong = [prediction for prediction in result.predictions if not prediction.right]
    text = f"{result.label} got {len(wrong)} of {len(result.predictions)} test examples wrong"
    if not wrong:
        return Section("Mistakes", f"{text}.")
    rows = [
        [
            str(prediction.index),
            shorten(prediction.gold),
            shorten(prediction.answer or "none"),
            shorten(prediction.text),
        ]
        for prediction in wrong[:_NUM_MISTAKES]
    ]
    table = Table(["test example", "right answer", "its answer", "its text"], rows, num_text_columns=4)
    return Section("Mistakes", f"{text}; the first {len(rows)}:", table)


def _data_section(facts: Mapping[str, Any] | None) -> Section:
    if facts is None:
        return Section("Data", f"outputs/preprocess.json: {NOT_THERE}; `dvc repro preprocess` makes it.")
    return Section("Data", "What preprocess read, kept and dropped.", facts_table(facts))
