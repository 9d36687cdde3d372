"""Pipeline stage: tables, figures and one self-contained page from the outputs of all entries."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # This work tree's code, whichever is installed.

from coconut.pipeline.stage import Work, run_script


def load() -> Work:
    from coconut.config.params import load_params
    from coconut.files import writing
    from coconut.layout import EXAMPLES_DIR, OUTPUTS_DIR, REPORT_DIR
    from coconut.report.page import write_report
    from coconut.report.provenance import judge, with_origin

    def main() -> None:
        """Write `outputs/report`."""
        params = load_params()
        with writing(REPORT_DIR):
            provenance = with_origin(judge(Path(), ignore=["report"]), Path())
            write_report(params, OUTPUTS_DIR, REPORT_DIR, provenance, EXAMPLES_DIR)

    return main


if __name__ == "__main__":
    run_script(load, "report")
