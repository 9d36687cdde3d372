"""Run stages of dvc.yaml without DVC: `python run_stages.py KIND...` in a project's folder.

DVC and the imports of torch and transformers cost some seconds a stage. Here they are imported once, and every stage
runs its script in a fork, with the arguments that its command in dvc.yaml gives it.
"""

import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml


def list_commands(kinds: list[str]) -> Iterator[list[str]]:
    """List the words after `python` of the stages' commands, in dvc.yaml's order, in which parents come first."""
    params, pipeline = (yaml.safe_load(Path(name).read_text(encoding="utf-8")) for name in ("params.yaml", "dvc.yaml"))
    for kind, stage in pipeline["stages"].items():
        for entry in (params["curriculum"] if "foreach" in stage else [""]) if kind in kinds else []:
            command = stage.get("do", stage)["cmd"].replace("${key}", entry).split()
            yield command[command.index("python") + 1 :]


def run_in_fork(script: str, *arguments: str) -> int:
    """Run a script as a process of its own; return its exit code."""
    child = os.fork()
    if child == 0:
        sys.argv = [script, *arguments]
        sys.path[0] = str(Path(script).parent.resolve())
        exit_code = 1
        try:
            runpy.run_path(script, run_name="__main__")
            exit_code = 0
        except SystemExit as end:
            exit_code = int(end.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            if exit_code == 0:
                os._exit(0)
        sys.exit(exit_code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> int:
    """Run the stages; end with the exit code of the first that fails."""
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401

    for command in list_commands(sys.argv[1:]):
        if exit_code := run_in_fork(*command):
            return exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
