"""`coconut table` and `coconut report`: the results in a terminal, and the path of their page."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from coconut.config.params import load_params
from coconut.files import writing
from coconut.layout import EXAMPLES_DIR, OUTPUTS_DIR, REPORT_DIR
from coconut.report.compare import (
    WORKSPACE,
    compare,
    describe_elsewhere,
    describe_left_out,
    describe_queue,
    find_stale,
    group_to_compare,
    list_experiments,
    open_revision,
    read_experiment,
)
from coconut.report.paper import paper_table
from coconut.report.provenance import judge, with_origin
from coconut.report.reading import read_folder
from coconut.report.results import read_results
from coconut.report.tables import accuracy_table, methods_table

COMPARISON_DIR = OUTPUTS_DIR / "comparison"
PARTIAL_REPORT_DIR = OUTPUTS_DIR / "partial-report"
"""Not an output of DVC, which owns `REPORT_DIR` and deletes it when the stage `report` begins."""


def run_table() -> int:
    """Print one row for each entry of the curriculum, and the paper's layout where its arms were run."""
    params = load_params()
    provenance = judge(Path())
    results = read_results(
        params.curriculum, read_folder(OUTPUTS_DIR), marks=provenance.marks, reference=params.report.reference
    )
    tables = [accuracy_table(results), methods_table(results), paper_table(results)]
    blocks = [table.to_text() for table in tables if table is not None]
    blocks.append(provenance.explain([result.label for result in results]))
    sys.stdout.write("\n".join(block + "\n" for block in blocks if block))
    return 0


def run_compare(names: Sequence[str]) -> int:
    """Compare the named experiments, or all of the current commit: print tables, and write a page over all of them."""
    from coconut.report.overlay import compare_sections
    from coconut.report.page import PAGE_FILE, write_page

    listed = [] if names else list_experiments()
    experiments = []
    for name in names or ["HEAD", *listed, WORKSPACE]:
        read_text = open_revision(name)
        experiments.append(read_experiment(name, read_text, marks=find_stale(name, read_text)))
    scored = [experiment for experiment in experiments if experiment.is_scored] or experiments
    missing = describe_left_out([one for one in experiments if one not in scored])
    missing += [] if names else [*describe_queue(listed), *describe_elsewhere()]
    groups = group_to_compare(scored)
    shutil.rmtree(COMPARISON_DIR, ignore_errors=True)
    with writing(COMPARISON_DIR):
        write_page(
            "Experiments compared",
            " ".join(
                [
                    f"{len(scored)} runs in {len(groups)} group{'s' if len(groups) > 1 else ''}.",
                    *(f"{line}." for line in missing),
                ]
            ),
            compare_sections(groups),
            COMPARISON_DIR,
        )
    sys.stdout.write(
        "\n".join([compare(groups), *missing, *([""] if missing else []), f"{COMPARISON_DIR / PAGE_FILE}\n"])
    )
    return 0


def run_report() -> int:
    """Print the path of the page, as the last line; write a partial one where the stage `report` is not up to date."""
    # Imported here: jinja2 is needed by the page only.
    from coconut.report.page import PAGE_FILE, write_report

    params = load_params()
    provenance = judge(Path())
    if provenance.problem is None and not provenance.unfinished:
        sys.stdout.write(f"{REPORT_DIR / PAGE_FILE}\n")
        return 0
    shutil.rmtree(PARTIAL_REPORT_DIR, ignore_errors=True)  # It may hold figures that are not drawn this time.
    with writing(PARTIAL_REPORT_DIR):
        write_report(params, OUTPUTS_DIR, PARTIAL_REPORT_DIR, with_origin(provenance, Path()), EXAMPLES_DIR)
    num_stages = len(provenance.unfinished)
    if provenance.problem is None:
        sys.stdout.write(
            f"{num_stages} stage{'s are' if num_stages != 1 else ' is'} not up to date; the page says why.\n"
        )
    sys.stdout.write(f"{PARTIAL_REPORT_DIR / PAGE_FILE}\n")
    return 0
