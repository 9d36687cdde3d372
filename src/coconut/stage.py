"""How the process of a pipeline stage begins, before its slow imports: `inputs = begin()`.

Importing this module is cheap (no torch).
"""

import sys

from coconut.training.fingerprint import StageInputs
from coconut.training.guard import die_with_parent


def begin() -> StageInputs | None:
    """End with the `dvc` that started this process, and digest what the stage depends on as it is now.

    First of all: the imports that follow take seconds, in which `dvc` may be killed or a module edited.

    Returns:
        None where `dvc.yaml` or what it names cannot be read; `main` says what is wrong with it.
    """
    die_with_parent()
    try:
        return StageInputs.of_command(["python", *sys.argv])
    except (ValueError, OSError):
        return None
