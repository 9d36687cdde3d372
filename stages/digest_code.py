"""Pipeline stage `code`: what the code of every other stage does, one file of digests a script in outputs/code."""

import sys
from pathlib import Path

# Before the installed package: `dvc exp run --temp` and the queue work in a copy, whose code is the one that counts.
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from coconut.pipeline.stage import begin

if __name__ == "__main__":
    inputs = begin()

from coconut.files import replace_file, writing
from coconut.layout import CODE_DIR
from coconut.pipeline.stage import run_stage
from coconut.pipeline.stage_code import code_file, describe_code, stage_code


def main() -> None:
    """Write `outputs/code`."""
    with writing(CODE_DIR):
        CODE_DIR.mkdir(parents=True, exist_ok=True)
        for script in sorted(Path("stages").glob("*.py")):
            if script.name != Path(__file__).name:
                replace_file(Path(code_file(script)), describe_code(stage_code(script.as_posix(), Path())))


if __name__ == "__main__":
    run_stage(main, "code", inputs=inputs)
