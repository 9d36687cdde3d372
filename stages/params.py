"""Pipeline stage `params`: params.yaml holds no mistake, before any stage runs or any old output is deleted."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # This work tree's code, whichever is installed.

from coconut.pipeline.stage import Work, run_script


def load() -> Work:
    from loguru import logger

    from coconut.config.params import find_former, load_params
    from coconut.files import replace_file
    from coconut.layout import OUTPUTS_DIR
    from coconut.pipeline.machine import check_machine
    from coconut.pipeline.plausibility import check_model_config, find_warnings, most_rows

    def main() -> None:
        """Write `outputs/params.checked`, always the same bytes, so that nothing runs again because of them."""
        params = load_params()
        check_model_config(params)
        for warning in [*find_former(), *check_machine(params), *find_warnings(params, most_rows(params.data))]:
            logger.warning("{}", warning)
        OUTPUTS_DIR.mkdir(parents=True, exist_ok=True)
        replace_file(OUTPUTS_DIR / "params.checked", "params.yaml holds no mistake\n")

    return main


if __name__ == "__main__":
    run_script(load, "params")
