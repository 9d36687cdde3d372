"""Pipeline stages run inside the test's process, in a project folder: imports are paid once, not per stage."""

import contextlib
import io
import json
import os
import runpy
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from loguru import logger

from coconut.data import encoder
from coconut.pipeline.stage import run_stage
from project import ROOT, TINY, write_params

_SHARED = ("src", "stages", "models", "dvc.yaml")
ROWS_FILE = "data/raw/rows.json"


@dataclass(frozen=True)
class Ended:
    """How a stage ended: as a process would, with an exit code and what stood on the terminal."""

    exit_code: int
    terminal: str

    @property
    def error(self) -> str:
        """The one message of a stage that failed through a user's mistake."""
        assert self.exit_code == 1, self.terminal
        assert "Traceback" not in self.terminal
        errors = [line for line in self.terminal.splitlines() if "| ERROR " in line]
        assert len(errors) == 1, self.terminal
        assert self.terminal.splitlines()[-1] == errors[0], "the message is the last line"
        return errors[0].partition("| ERROR   | ")[2]


def stage(project: Path, name: str) -> Ended:
    """Run `preprocess`, `train@cot` and so on in `project`; an error that is no user's mistake comes through."""
    script, *arguments = name.split("@")
    work = runpy.run_path(str(ROOT / "stages" / f"{script}.py"), run_name="stage")["load"]()
    terminal, exit_code = io.StringIO(), 0
    before = Path.cwd()
    os.chdir(project)
    encoder._cached_tokenizer.cache_clear()  # By path, which is relative and so another folder in each project.
    try:
        with contextlib.redirect_stderr(terminal), contextlib.redirect_stdout(terminal):
            try:
                run_stage(partial(work, *arguments, None) if arguments else work, name)
            except SystemExit as end:
                exit_code = int(end.code or 0)
    finally:
        logger.remove()  # The stage's sinks; its log file would keep a mount busy.
        os.chdir(before)
    return Ended(exit_code, terminal.getvalue())


def succeed(project: Path, *names: str) -> None:
    """Run stages that must not fail."""
    for name in names:
        ended = stage(project, name)
        assert ended.exit_code == 0, f"{name}:\n{ended.terminal}"


def make_folder(folder: Path, changes: dict[str, Any]) -> Path:
    """A project without git and DVC; what no test changes is the repository's own, linked."""
    (folder / "data/raw").mkdir(parents=True)
    for name in _SHARED:
        (folder / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "params.yaml", folder)
    write_params(folder, TINY | changes)
    return folder


def write_rows(project: Path, rows: list[dict[str, Any]]) -> None:
    """Write raw data in canonical form."""
    (project / ROWS_FILE).write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")


def sums(count: int) -> list[dict[str, Any]]:
    """As many different small problems, the answer in 0..8."""
    return [
        {"question": f"{n // 9 % 9} + {n % 9} + {n // 81} ?", "steps": [str((n // 9 + n) % 9)], "answer": str(n % 9)}
        for n in range(count)
    ]


def canonical_splits(*, train: int = 64, held_out: int = 8) -> dict[str, Any]:
    """Parameters that cut `ROWS_FILE` into splits."""
    source = {"format": "canonical", "file": Path(ROWS_FILE).name}
    return {
        "data.train": source | {"rows": train},
        "data.valid": source | {"start": train, "rows": held_out},
        "data.tests.test": source | {"start": train + held_out, "rows": held_out},
    }
