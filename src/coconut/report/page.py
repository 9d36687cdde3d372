"""The report: `report.md` with its figures beside it, and `report.html` with everything inside."""

import base64
import html
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coconut.config.schema import Params
from coconut.files import check_free_space
from coconut.report.figures import draw_figures
from coconut.report.paper import PAPER_NOTE, paper_table
from coconut.report.results import Result, find_last, read_facts, read_folder, read_results
from coconut.report.tables import NOT_THERE, Table, accuracy_table, explain_speed, facts_table, speed_table

_NUM_MISTAKES = 10
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
    """A heading and what stands below it, free of the form it is written in."""

    title: str
    text: str = ""
    table: Table | None = None
    figure: str | None = None


def write_report(params: Params, outputs_dir: Path, report_dir: Path) -> None:
    """Write the report on all entries of the curriculum; what a failed stage did not leave is said to be missing."""
    read_text = read_folder(outputs_dir)
    results = read_results(params.curriculum, read_text)
    figures = draw_figures(results)
    sections = build_sections(results, facts=read_facts(read_text))
    title = f"{params.model}, seed {params.seed}"
    report_dir.mkdir(parents=True, exist_ok=True)
    files = {f"{name}.png": png for name, png in figures.items()}
    files["report.md"] = render_markdown(title, sections, figures.keys()).encode()
    files["report.html"] = render_html(title, sections, figures).encode()
    check_free_space({report_dir: sum(map(len, files.values()))})
    for name, content in files.items():
        (report_dir / name).unlink(missing_ok=True)  # It may be linked into DVC's cache.
        (report_dir / name).write_bytes(content)


def build_sections(results: Sequence[Result], *, facts: Mapping[str, Any] | None) -> list[Section]:
    """Decide what the report says, in its order."""
    paper = paper_table(results)
    arms = [] if paper is None else [Section("The arms in the paper's layout", PAPER_NOTE, paper)]
    return [
        Section("Results", _results_text(results), accuracy_table(results)),
        *arms,
        Section("Accuracy by training stage", figure="accuracy"),
        Section("Accuracy by number of gold steps", "Every group with its own 95 % Wilson interval.", figure="steps"),
        Section("Loss", "One point an epoch; an entry starts where its parent ended.", figure="loss"),
        Section("Seconds by stage", figure="seconds"),
        Section("Speed over the epochs", explain_speed(results), speed_table(results), "speed"),
        _mistakes_section(results),
        _data_section(facts),
    ]


def render_markdown(title: str, sections: Sequence[Section], figures: Collection[str]) -> str:
    """One Markdown page; the figures are files beside it."""
    blocks = [f"# {title}"]
    for section in sections:
        blocks += [f"## {section.title}", section.text]
        if section.figure is not None:
            blocks.append(f"![{section.title}]({section.figure}.png)" if section.figure in figures else NO_DATA)
        if section.table is not None:
            blocks.append(section.table.to_markdown() if section.table.rows else NO_DATA)
    return "\n\n".join(block for block in blocks if block) + "\n"


def render_html(title: str, sections: Sequence[Section], figures: Mapping[str, bytes]) -> str:
    """One page that needs no other file and no network."""
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


def _results_text(results: Sequence[Result]) -> str:
    text = (
        "Accuracy on the test split with its 95 % Wilson interval: what another test set of this size might have"
        " given, not what another seed might have."
    )
    reference = find_last(results, "coconut")
    if reference is not None:
        text += (
            f" p: exact two-sided McNemar test of each entry against {reference.name}, paired by example,"
            " not corrected for the number of entries."
        )
    missing = [result.name for result in results if result.metrics is None]
    return text + (f" {NOT_THERE.capitalize()}: {', '.join(missing)}; `dvc repro` makes them." if missing else "")


def _mistakes_section(results: Sequence[Result]) -> Section:
    """Show some wrong answers of the entry that the report is about."""
    result = find_last(results, "coconut") or next((other for other in results if other.predictions), None)
    wrong = [] if result is None else [prediction for prediction in result.predictions if not prediction.right]
    rows = [
        [str(prediction.index), prediction.gold, prediction.answer or "none", shorten(prediction.text)]
        for prediction in wrong[:_NUM_MISTAKES]
    ]
    if result is None or not result.predictions:
        return Section("Mistakes", f"Predictions: {NOT_THERE}.")
    text = f"{result.name} got {len(wrong)} of {len(result.predictions)} test examples wrong"
    if not wrong:
        return Section("Mistakes", f"{text}.")
    table = Table(["test example", "right answer", "its answer", "its text"], rows, num_text_columns=4)
    return Section("Mistakes", f"{text}; the first {len(rows)}:", table)


def _data_section(facts: Mapping[str, Any] | None) -> Section:
    if facts is None:
        return Section("Data", f"outputs/preprocess.json: {NOT_THERE}; `dvc repro preprocess` makes it.")
    return Section("Data", "What preprocess read, kept and dropped.", facts_table(facts))


def shorten(text: str) -> str:
    r"""One line of at most 120 characters.

    >>> shorten("4\n### 5")
    '4 ⏎ ### 5'
    """
    line = " ⏎ ".join(" ".join(part.split()) for part in text.strip().splitlines())
    return line if len(line) <= 120 else line[:119] + "…"
