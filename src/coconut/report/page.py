"""The report: `report.md` with its figures next to it, `report.html` with everything inside, and the curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coconut.config.schema import Params
from coconut.files import check_free_space, replace_file
from coconut.report.charts import choose_styles, draw_coverage, draw_speed, draw_steps, draw_updates
from coconut.report.curves import CURVES_FILE, write_curves
from coconut.report.origin import describe_training
from coconut.report.outcome import describe_outcome, describe_warnings
from coconut.report.paper import PAPER_NOTE, paper_table
from coconut.report.probes import (
    MOST_QUESTIONS,
    cards,
    contents_table,
    edits_table,
    find_thinkers,
    has_slots,
    not_measured,
    numbers_chart,
)
from coconut.report.provenance import Provenance
from coconut.report.questions import browse_questions, read_questions, show_task
from coconut.report.reading import read_folder
from coconut.report.render import Group, Section, draw_figures, render_html, render_markdown
from coconut.report.results import Result, find_reference, find_sets, read_facts, read_results
from coconut.report.speed import explain_speed, speed_table
from coconut.report.svg import Chart
from coconut.report.tables import (
    Table,
    accuracy_table,
    expected_table,
    facts_table,
    groups_table,
    methods_table,
    samples_table,
    sets_table,
    tree_table,
)
from coconut.report.text import NOT_THERE, shorten, visible

PAGE_FILE = "report.html"
_NUM_MISTAKES = 10
_NEED = "Do answers need the thoughts?"


def write_report(
    params: Params,
    outputs_dir: Path,
    report_dir: Path,
    provenance: Provenance | None = None,
    examples_dir: Path | None = None,
) -> None:
    """Write the report on all entries of the curriculum; what a failed stage did not leave is said to be missing.

    Args:
        examples_dir: with the questions of the test set; without them the page shows answers alone.

    Raises:
        ValueError: a file of an entry is damaged.
        OSError: the report cannot be written.
    """
    provenance = provenance or Provenance()
    read_text = read_folder(outputs_dir)
    results = read_results(params.curriculum, read_text, marks=provenance.marks, reference=params.report.reference)
    browser = None if examples_dir is None else browse_questions(results, read_questions(examples_dir))
    sections = [] if browser is None else [show_task(params, browser)]
    sections += build_sections(results, facts=read_facts(read_text), provenance=provenance, browser=browser)
    origin = provenance.origin
    about = f"Written {origin['written']}, commit {origin['commit']}." if {"written", "commit"} <= origin.keys() else ""
    lead = "\n\n".join(filter(None, [describe_outcome(results), describe_warnings(results), about]))
    title = visible(f"{params.model}, seed {params.seed}")
    front = next((chart for section in sections if section.title == _NEED for chart in section.charts), None)
    write_page(title, lead, sections, report_dir, {CURVES_FILE: write_curves(results)}, front)


def write_page(
    title: str,
    lead: str,
    sections: Sequence[Section],
    folder: Path,
    files: Mapping[str, str] | None = None,
    front: Chart | None = None,
) -> None:
    """Write a page in both forms, its figures, and other files beside it.

    Args:
        lead: what came out, in paragraphs between empty lines.
        front: what stands beside the lead, of the figures in the sections.

    Raises:
        OSError: they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {**(files or {}), **draw_figures(sections)}
    texts |= {"report.md": render_markdown(title, lead, sections), PAGE_FILE: render_html(title, lead, sections, front)}
    contents = {name: text.encode() for name, text in texts.items()}
    check_free_space({folder: sum(map(len, contents.values()))})
    for name, content in contents.items():
        replace_file(folder / name, content)


def build_sections(
    results: Sequence[Result],
    *,
    facts: Mapping[str, Any] | None,
    provenance: Provenance,
    browser: Section | None = None,
) -> list[Section]:
    """Decide what the report says, in its order; a part that has nothing to say is left out.

    Args:
        browser: all questions, to stand before the mistakes.
    """
    colours = {name: colour for name, (colour, _) in choose_styles(results).items()}
    unfinished, paper, steps = provenance.table(), paper_table(results), draw_steps(results)
    speed, updates, sets = speed_table(results), draw_updates(results), find_sets(results)
    sections = []
    if unfinished.rows:
        sections.append(Section("This page is partial", _PARTIAL_TEXT, unfinished))
    sections += [
        Section("Curriculum", "Every entry starts from the weights of the one above it.", tree_table(results, colours)),
        Section("Results", _results_text(results, provenance), accuracy_table(results)),
    ]
    if (methods := methods_table(results)) is not None:
        sections.append(Section("Methods beside each other", _METHODS_TEXT, methods))
    if sets:
        sections.append(Section("Further test sets", _sets_text(results), sets_table(results, sets)))
    sections += _group_sections(results, ["", *sets])
    sections += _sample_sections(results, ["", *sets])
    expected = expected_table(results)
    if expected is not None:
        sections.append(Section("Expected figures", _EXPECTED_TEXT, expected))
    if paper is not None:
        sections.append(Section("The arms in the paper's layout", PAPER_NOTE, paper))
    sections += _thought_sections(results, colours)
    if updates:
        files = [f"../{one.name}/{file}" for one in results if one.updates for file in ("updates.csv", "history.csv")]
        sections.append(Section("Training", _UPDATES_TEXT, charts=updates, links=files))
    if steps is not None:
        sections.append(Section("Accuracy by number of gold steps", _STEPS_TEXT, charts=[steps]))
    sections += [] if browser is None else [browser]
    sections.append(_mistakes_section(results))
    if speed.rows:
        sections.append(Section("Speed", explain_speed(results), speed, draw_speed(results)))
    sections.append(_data_section(facts))
    about = {**provenance.origin, **describe_training(results)}
    if about or provenance.params:
        parameters = Table(["parameter", "value"], [[key, str(v)] for key, v in provenance.params.items()], 2)
        origin = Table(["", ""], [[key, value] for key, value in about.items()], 2)
        sections.append(
            Section("Origin", "", origin, folded=parameters if parameters.rows else None, folded_title="Parameters")
        )
    return sections


def _group_sections(results: Sequence[Result], sets: Sequence[str]) -> list[Section]:
    """Show accuracies by the kind of the question, for every test set whose map names a kind."""
    sections = []
    for name in sets:
        table = groups_table([result.of_set(name) for result in results] if name else results)
        if table is not None:
            sections.append(Section(f"Accuracy by kind of question{f' of {name}' if name else ''}", "", table))
    return sections


def _sample_sections(results: Sequence[Result], sets: Sequence[str]) -> list[Section]:
    """Show what samples give, for every test set that was sampled."""
    sections = []
    for name in sets:
        own, of_set = [result.of_set(name) for result in results] if name else results, f" of {name}" if name else ""
        table, chart = samples_table(own), draw_coverage(own, f"Coverage{of_set}")
        if table is not None:
            sections.append(Section(f"Samples{of_set}", _SAMPLES_TEXT, table, [] if chart is None else [chart]))
    return sections


_SAMPLES_TEXT = (
    "Several answers to each question (`evaluate.samples`). pass@k: how probably one of k is right, without bias, with"
    " a bootstrap over questions. Majority: the most frequent answer, ties to the first."
)


def _sets_text(results: Sequence[Result]) -> str:
    reference = find_reference(results)
    against = f" p: exact McNemar test against {reference.label}, question by question." if reference else ""
    return f"The same checkpoints on other questions; training and selection saw none of them.{against}"


_EXPECTED_TEXT = "What others report for this model (`evaluate.expected`), beside what was found here."
_METHODS_TEXT = (
    "The end of the longest chain of every method whose thoughts are meant to work. p: exact two-sided McNemar test,"
    " paired by example. Equal numbers of updates are no equal cost: see the speed below."
)
_PARTIAL_TEXT = "These stages of the pipeline are not up to date, so the results below are incomplete or marked."
_STEPS_TEXT = "Each group has its own 95 % Wilson interval."
_UPDATES_TEXT = (
    "An entry starts where its parent ended. Loss and gradient norm are means over a few updates each; validation"
    " has one point an epoch. Move the pointer over a chart, or use the arrow keys, to read values; a name in the"
    " list switches its lines off and on."
)


def _thought_sections(results: Sequence[Result], colours: Mapping[str, str]) -> list[Section]:
    """Show what the probes found: what thoughts hold, what answers need, and some questions in full."""
    entry, control = find_thinkers(results)
    groups = []
    ordered = [one for one in results if one is entry] + [one for one in results if one is not entry]
    for result in ordered:
        chosen = cards(result, MOST_QUESTIONS[result is entry])
        if chosen and (result is entry or has_slots(result) or entry is None):
            groups.append(Group(result.label, chosen))
    questions = [Section("Thoughts of single questions", _QUESTIONS_TEXT, cards=groups)] if groups else []
    if entry is None:
        return questions
    chart = numbers_chart(entry, control, colours)
    missing = not_measured(entry)
    text = _EDITS_TEXT if control is None else f"{_EDITS_TEXT} {_CONTROL_TEXT.format(control.label)}"
    contents_text = _CONTENTS_TEXT + (f" Not measured here, or in part: {'; '.join(missing)}." if missing else "")
    return [
        Section(_NEED, text, edits_table(entry, control), [chart] if chart else []),
        Section("What thoughts hold", contents_text, contents_table(entry)),
        *questions,
    ]


_EDITS_TEXT = (
    "The vectors that enter the slots are replaced and the same questions asked again. p: exact McNemar test against"
    " the untouched run. Zeros and noise are strange to a model in any slot; the thoughts of another question are not."
)
_CONTROL_TEXT = "{} is the control: its slots hold the same vector in every question."
_CONTENTS_TEXT = (
    "What the output head, and a linear probe of the best layer, read in each thought, and beside it what chance gives:"
    " the steps of other questions, the frontier's share of all nodes, permuted labels. Intervals are over questions."
)
_QUESTIONS_TEXT = (
    "The most probable tokens of every thought, and the answer if the model had to stop there. In a graph a node is as"
    " dark as its probability among the nodes; the root has a black ring, the nodes one hop further in every column a"
    " blue one, candidates are squares."
)


def _results_text(results: Sequence[Result], provenance: Provenance) -> str:
    sentences = [
        "Accuracy on the test split with its 95 % Wilson interval: what another test set of this size might have"
        " given, not what another seed might have."
    ]
    reference = find_reference(results)
    if reference is not None:
        sentences.append(
            f"p: exact two-sided McNemar test of each entry against {reference.name}, paired by example,"
            " not corrected for the number of entries."
        )
    missing = [result.name for result in results if result.metrics is None]
    if missing:
        sentences.append(f"{NOT_THERE.capitalize()}: {', '.join(missing)}; `dvc repro` makes them.")
    sentences.append(provenance.explain([result.label for result in results]))
    return " ".join(filter(None, sentences))


def _mistakes_section(results: Sequence[Result]) -> Section:
    """Show some wrong answers of the entry that the report is about."""
    result = find_reference(results) or next((other for other in results if other.predictions), None)
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
