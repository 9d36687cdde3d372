"""`python -m coconut.report`: the table of accuracies on standard output, for `make`."""

import sys

from coconut.config.params import load_params
from coconut.layout import OUTPUTS_DIR
from coconut.report.paper import paper_table
from coconut.report.results import read_folder, read_results
from coconut.report.tables import accuracy_table


def main() -> None:
    """Print one row for each entry of the curriculum, and the paper's layout where its arms were run."""
    try:
        results = read_results(load_params().curriculum, read_folder(OUTPUTS_DIR))
    except (ValueError, OSError) as error:
        sys.exit(f"report: {error}")
    tables = [accuracy_table(results), paper_table(results)]
    sys.stdout.write("\n".join(table.to_text() + "\n" for table in tables if table is not None))


if __name__ == "__main__":
    main()
