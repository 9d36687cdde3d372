"""Pipeline stage: tables, figures and one self-contained page from the outputs of all entries."""

import sys
from pathlib import Path

# Before the installed package: `dvc exp run --temp` and the queue work in a copy, whose code is the one that counts.
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from coconut.pipeline.stage import begin

if __name__ == "__main__":
    inputs = begin()

from coconut.config.params import load_params
from coconut.files import writing
from coconut.layout import OUTPUTS_DIR, REPORT_DIR
from coconut.pipeline.stage import run_stage
from coconut.report.page import write_report
from coconut.report.provenance import judge, with_origin


def main() -> None:
    """Write `outputs/report`."""
    with writing(REPORT_DIR):
        write_report(load_params(), OUTPUTS_DIR, REPORT_DIR, with_origin(judge(Path(), ignore=["report"]), Path()))


if __name__ == "__main__":
    run_stage(main, "report", inputs=inputs)
