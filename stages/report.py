"""Pipeline stage: tables, figures and one self-contained page from the outputs of all entries."""

import sys
from pathlib import Path

# Before the installed package: `dvc exp run --temp` and the queue work in a copy, whose code is the one that counts.
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from coconut.stage import begin

if __name__ == "__main__":
    inputs = begin()

from coconut.config import load_params
from coconut.layout import OUTPUTS_DIR, REPORT_DIR
from coconut.report.page import write_report
from coconut.runtime import run_stage, writing


def main() -> None:
    with writing(REPORT_DIR):
        write_report(load_params(), OUTPUTS_DIR, REPORT_DIR)


if __name__ == "__main__":
    run_stage(main, "report", inputs=inputs)
