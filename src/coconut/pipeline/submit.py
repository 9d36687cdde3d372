"""A stage as a job of Slurm, submitted once: who starts again while it runs, waits for it.

`runtime.launcher: coconut submit --nodes=2 --gpus-per-node=8 --` runs trainings and evaluations as jobs, from a login
node on which `dvc repro` itself needs little. What is known of a job lies in `.resume/jobs/<stage>.json`: its number
and a fingerprint of the stage's inputs. A driver that was killed leaves the job running; the next one finds it there,
and submits another only if the inputs are others, whose job it cancels.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from coconut.files import replace_file
from coconut.layout import LOG_DIR
from coconut.pipeline.inputs import StageInputs
from coconut.pipeline.launch import RUN_ID
from coconut.pipeline.resume import resume_dir

_POLL_S = float(os.environ.get("COCONUT_POLL_S", "5"))
_PATIENCE = 12
"""Questions in a row that the scheduler may leave without an answer, or the shared disk without the job's end."""
_SCRIPT = """#!/bin/sh
# Written by `coconut submit`. Its end is told by a file, because accounting is not set up everywhere.
srun --ntasks-per-node=1 {command} &
child=$!
trap 'kill -TERM "$child"' TERM
wait "$child"; code=$?
# A signal ends the first `wait`, not the stage, which saves its state.
while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done
echo "$code" > {end}.new && mv {end}.new {end}
exit "$code"
"""


def run(words: Sequence[str]) -> int:
    """Run a stage's command as a job, or wait for the one that does already.

    Args:
        words: options of `sbatch`, and the command: `--nodes=2 -- python stages/train.py latent_1`.

    Returns:
        The exit code of the command.

    Raises:
        ValueError: the command is no stage's, or the scheduler refuses the job or loses it.
    """
    script = next((place for place, word in enumerate(words) if word.endswith(".py")), 0)
    options, command = [word for word in words[: max(0, script - 1)] if word != "--"], words[max(0, script - 1) :]
    inputs = StageInputs.of_command(["python", *command[1:]])
    job = _Job(inputs)
    number = job.running()
    if number is None:
        number = job.submit(options, command)
        _say(f"{inputs.stage}: submitted as job {number}; its output goes to {job.log}")
    else:
        _say(f"{inputs.stage}: job {number} runs it already; waiting for its end")
    return job.wait(number)


class _Job:
    """The job of a stage."""

    def __init__(self, inputs: StageInputs) -> None:
        self.name = inputs.stage.replace("@", "-")
        self.folder = resume_dir() / "jobs"
        self.log = LOG_DIR / f"{self.name}.job.log"
        self._stage, self._fingerprint = inputs.stage, inputs.fingerprint
        self._record = self.folder / f"{self.name}.json"

    def running(self) -> str | None:
        """Return the number of the job that runs or waits with the same inputs; one with others is cancelled."""
        try:
            record = json.loads(self._record.read_bytes())
            number, fingerprint = str(record["job"]), record["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if not number.isdigit() or not _state(number):
            return None
        if fingerprint == self._fingerprint:
            return number
        _say(f"{self._stage}: its inputs are others now than those of job {number}, which is cancelled")
        _ask(["scancel", number])
        return None

    def submit(self, options: Sequence[str], command: Sequence[str]) -> str:
        self.folder.mkdir(parents=True, exist_ok=True)
        LOG_DIR.mkdir(parents=True, exist_ok=True)
        script, end = self.folder / f"{self.name}.sh", self._end_file("$SLURM_JOB_ID")
        quoted = f'"$PWD"/{end}' if not end.is_absolute() else str(end)
        script.write_text(_SCRIPT.format(command=shlex.join(command), end=quoted), encoding="utf-8")
        arguments = [
            *("sbatch", "--parsable", f"--job-name={self._stage}", f"--output={self.log}", "--open-mode=append"),
            *("--signal=B:TERM@120", "--requeue", *options, str(script)),
        ]
        # Hosts of the job find each other by this; a requeued job keeps it, and its first host writes anew.
        variables = os.environ | {RUN_ID: f"{self.name}-{time.time():.0f}-{os.getpid()}"}
        answer = _ask(arguments, environment={key: value for key, value in variables.items() if key != "DVC_STAGE"})
        number = answer.strip().partition(";")[0]  # A cluster's name may follow.
        if not number.isdigit():
            raise ValueError(f"sbatch: found {answer!r:.200}, wanted the number of a job")
        replace_file(self._record, json.dumps({"job": number, "fingerprint": self._fingerprint}))
        return number

    def wait(self, number: str) -> int:
        """Return the exit code of the job's command, once it has ended."""
        num_silent = 0
        state = ""
        while num_silent <= _PATIENCE:
            try:
                now = _state(number)
            except ValueError:
                num_silent += 1  # The scheduler is busy, or away for a moment.
                time.sleep(_POLL_S)
                continue
            if now and now != state:
                _say(f"{self._stage}: job {number}: {now.lower()}")
            state = now or state
            if not now:
                with suppress(OSError, ValueError):
                    return int(self._end_file(number).read_text(encoding="utf-8"))
                num_silent += 1
            else:
                num_silent = 0
            time.sleep(_POLL_S)
        raise ValueError(
            f"{self._stage}: job {number} is gone and has left no exit code: it was cancelled, or its host failed; see"
            f" {self.log}. `dvc repro` submits it again, and it goes on from its last saved state"
        )

    def _end_file(self, number: str) -> Path:
        return self.folder / f"{self.name}.{number}.end"


def _state(number: str) -> str:
    """Return the state of a job, PENDING or RUNNING; an empty text if the scheduler has none of this number."""
    try:
        return _ask(["squeue", "--noheader", "--format=%T", f"--jobs={number}"]).strip()
    except ValueError as error:
        if "Invalid job id" in str(error):
            return ""
        raise


def _ask(command: Sequence[str], environment: dict[str, str] | None = None) -> str:
    """Return what a command of the scheduler prints.

    Raises:
        ValueError: it is not there, or fails.
    """
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ValueError(f"{command[0]}: cannot be started ({error.strerror}); `coconut submit` needs Slurm") from error
    if done.returncode != 0:
        raise ValueError(f"{command[0]}: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
    return done.stdout


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
