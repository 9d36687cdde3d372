"""Pipeline stage `code`: what the code of every other stage does, one file of digests a script or method."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # This work tree's code, whichever is installed.

from coconut.pipeline.stage import Work, run_script


def load() -> Work:
    from coconut.pipeline.stage_code import write_code

    return write_code


if __name__ == "__main__":
    run_script(load, "code")
