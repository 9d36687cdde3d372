"""A scheduler with Slurm's commands that runs jobs as processes of this machine; every command is noted in `calls`.

tests/slurm.py FOLDER   writes sbatch, squeue, scancel, scontrol and srun into FOLDER
"""

import os
import sys
from pathlib import Path

_COMMAND = """#!{python}
import os, signal, subprocess, sys, time
from pathlib import Path
home = Path({folder!r})
name, arguments = Path(sys.argv[0]).name, sys.argv[1:]
if name != "squeue":
    with (home / "calls").open("a") as file:
        file.write(" ".join([name, *arguments]) + "\\n")

def pid_of(number):
    return int((home / f"job-{{number}}").read_text())

def is_alive(number):
    try:
        os.kill(pid_of(number), 0)
        return "Z" not in Path(f"/proc/{{pid_of(number)}}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, ValueError):
        return False

def fail(text):
    sys.stderr.write(text + "\\n")
    sys.exit(1)

if (home / "away").exists() and name in ("squeue", "sbatch"):
    fail(f"{{name}}: error: Unable to contact slurm controller")
if name == "sbatch":
    number = str(100 + len(list(home.glob("job-*"))))
    output = next((word.partition("=")[2] for word in arguments if word.startswith("--output=")), "slurm.log")
    environment = os.environ | {{"SLURM_JOB_ID": number}}
    job = subprocess.Popen(["bash", arguments[-1]], env=environment, stdout=open(output, "a"),
                           stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)
    (home / f"job-{{number}}").write_text(str(job.pid))
    print(number)
elif name == "squeue":
    number = next(word.partition("=")[2] for word in arguments if word.startswith("--jobs="))
    if not is_alive(number):
        fail("slurm_load_jobs error: Invalid job id specified")
    print("RUNNING")
elif name == "scancel":
    os.kill(pid_of(arguments[-1]), signal.SIGTERM)
elif name == "srun":
    command = [word for word in arguments if not word.startswith("--")]
    shared = os.environ | {{"SLURM_NNODES": "2"}}
    tasks = [subprocess.Popen(command, env=shared | {{"SLURM_NODEID": str(host)}}) for host in range(2)]
    def forward(number, frame):
        for task in tasks:
            task.send_signal(number)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, forward)
    sys.exit(max(code if code >= 0 else 128 - code for code in [task.wait() for task in tasks]))
"""


def write_commands(folder: Path) -> None:
    """Put the commands into a folder, which also holds what they note."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("sbatch", "squeue", "scancel", "scontrol", "srun"):
        path = folder / name
        path.write_text(_COMMAND.format(python=sys.executable, folder=str(folder)))
        path.chmod(0o755)


def calls(folder: Path, name: str) -> list[str]:
    """Return how often, and with what, a command was called."""
    path = folder / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in lines if line.split()[0] == name]


def path_with(folder: Path) -> str:
    return f"{folder}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
