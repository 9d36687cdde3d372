"""The command `coconut` as a process: help, completion, what it imports, how it ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from marks import slow_but

SUBCOMMANDS = [
    "status",
    "plan",
    "repro",
    "overnight",
    "recipe",
    "model",
    "table",
    "compare",
    "report",
    "solve",
    "think",
    "chat",
    "push",
    "prune",
    "submit",
    "check-method",
    "repair",
]
ROOT = Path(__file__).parents[1]


def coconut(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run it as a service would, without SHELL and TERM, from a work tree that is not installed."""
    environment = {name: value for name, value in os.environ.items() if name not in ("SHELL", "TERM")}
    environment |= {"PYTHONPATH": str(ROOT / "src"), **variables}
    command = [sys.executable, "-m", "coconut", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_help_lists_every_subcommand_with_a_whole_sentence(tmp_path):
    done = coconut(tmp_path, "--help")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.partition("Commands:\n")[2].partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in lines] == SUBCOMMANDS
    assert all(line.endswith(".") and not line.endswith("..") for line in lines), "cut off"


@pytest.mark.parametrize("name", slow_but(["repro", "solve"], SUBCOMMANDS))
def test_each_subcommand_explains_itself(tmp_path, name):
    done = coconut(tmp_path, name, "-h")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Usage: coconut {name}")


def test_the_shell_completes_subcommands(tmp_path):
    done = coconut(tmp_path, _COCONUT_COMPLETE="complete_bash", COMP_WORDS="coconut re", COMP_CWORD="1")
    assert done.stdout.split() == ["repro", "recipe", "report", "repair"]
    assert "--install-completion" in coconut(tmp_path, "--help").stdout


def test_help_and_completion_import_nothing_slow():
    code = "import coconut.cli, sys; print(*{'torch', 'dvc', 'matplotlib', 'yaml', 'transformers'} & set(sys.modules))"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


@pytest.mark.parametrize(
    "arguments",
    slow_but(
        [["status"], ["report"]],
        [[name] for name in ("status", "plan", "repro", "overnight", "table", "report", "prune")],
    ),
)
def test_outside_of_the_repository_it_is_one_message_and_exit_code_1(tmp_path, arguments):
    done = coconut(tmp_path, *arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    (message,) = done.stderr.splitlines()
    assert message.startswith("coconut: params.yaml: no such file; run from the repository's top folder")
    assert list(tmp_path.iterdir()) == []


def test_what_a_message_quotes_cannot_steer_the_terminal(tmp_path):
    (tmp_path / "params.yaml").write_text('{"model": "\\e[2J\\u202e", "curriculum": {"a\\e[2Jb\\u202e": {}}}')
    for command in ("table", "report", "status"):
        done = coconut(tmp_path, command)
        assert done.returncode == 1
        assert not {"\x1b", "\u202e"} & set(done.stderr + done.stdout)


def test_a_wrong_argument_is_exit_code_2_and_no_traceback(tmp_path):
    for arguments in (["statu"], ["overnight", "--tries", "0"], ["table", "x"], ["status", "--nope"]):
        done = coconut(tmp_path, *arguments)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert "Usage: coconut" in done.stderr


def test_the_version_is_that_of_the_package(tmp_path):
    import coconut as package

    assert coconut(tmp_path, "--version").stdout == f"coconut {package.__version__}\n"


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_error_message():
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    with subprocess.Popen(
        [sys.executable, "-m", "coconut", "status"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
