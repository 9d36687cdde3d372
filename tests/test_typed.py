"""The package from a user's side: typed, with a version, and its public names listed."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import coconut
from project import ROOT

SCRIPT = """
from coconut import Example, Reasoner, Solution, __version__

reasoner = Reasoner.from_pretrained("outputs/latent_4/checkpoint", device="cpu")
solutions: list[Solution] = reasoner.solve(["1 + 1 ?"], max_new_tokens=8)
answers: list[str | None] = [solution.answer for solution in solutions]
nll, num_tokens = reasoner.nll([Example("1 + 1 ?", ["2"], "2")], latent_stage=1)
num_values: int = nll.numel()
count: int = num_tokens + solutions[0].num_thoughts
print(__version__.upper(), answers, count)
"""


def test_the_public_names_are_listed_and_there() -> None:
    assert set(coconut.__all__) == {
        "Example",
        "Reasoner",
        "Solution",
        "Thinking",
        "Thought",
        "__version__",
        "check_method",
        "same_answer",
    }
    assert set(coconut.__all__) <= set(dir(coconut))
    assert all(getattr(coconut, name) for name in coconut.__all__)
    with pytest.raises(AttributeError, match="module 'coconut' has no attribute 'Reasonner'"):
        _ = coconut.Reasonner


def test_the_version_stands_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "coconut.__version__"}
    assert f"## [{coconut.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_names_are_listed_without_torch() -> None:
    code = "import sys, coconut; dir(coconut); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def check_types(script: str, folder: Path) -> str:
    """What mypy says of a script in a folder of its own, as a user's."""
    (folder / "script.py").write_text(script, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(folder / "cache"), "script.py"]
    # Imported packages are read for their types; errors are reported for the script alone.
    return subprocess.run(
        [*command, "--follow-imports", "silent"], cwd=folder, capture_output=True, text=True, check=False
    ).stdout


@pytest.mark.slow
@pytest.mark.long
def test_a_users_script_passes_strict_type_checks_and_a_wrong_one_does_not(tmp_path: Path) -> None:
    assert "Success: no issues found" in check_types(SCRIPT, tmp_path)
    wrong = check_types(SCRIPT.replace('device="cpu"', "device=3"), tmp_path)
    assert 'has incompatible type "int"; expected "str"' in wrong
