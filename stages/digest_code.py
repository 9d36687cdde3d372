"""Pipeline stage `code`: what the code of every other stage does, one file of digests a script or method."""

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
from coconut.pipeline.stage_code import code_file, describe_code, method_scripts, script_of, stage_code


def main() -> None:
    """Write `outputs/code`."""
    with writing(CODE_DIR):
        for script in [*(path.as_posix() for path in Path("stages").glob("*.py")), *method_scripts(Path())]:
            if Path(script).name != Path(__file__).name:
                path = Path(code_file(Path(script)))
                path.parent.mkdir(parents=True, exist_ok=True)
                replace_file(path, describe_code(stage_code(script, Path())))
        for path in (CODE_DIR / "methods").glob("*.txt"):
            if not Path(script_of(path.as_posix()) or "").is_file():
                path.unlink()


if __name__ == "__main__":
    run_stage(main, "code", inputs=inputs)
