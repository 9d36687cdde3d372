"""The Makefile: what only looks installs nothing, and `make` on a real project ends with the page's path."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from project import commit, environment, make_project, run, write_params

ROOT = Path(__file__).parents[1]
LOOKING = ["status", "table", "report", "compare", "prune"]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make without SHELL and TERM, and never let it install anything: the stamp counts as up to date."""
    variables = {name: value for name, value in environment(folder).items() if name not in ("SHELL", "TERM")}
    command = ["make", "-o", ".venv/.installed", *arguments]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)


def targets() -> list[str]:
    return re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)


@pytest.fixture
def bare(tmp_path):
    """A checkout without an environment; `make` would find none."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    return tmp_path


@pytest.mark.parametrize("target", LOOKING)
def test_what_only_looks_says_in_one_line_that_there_is_no_environment(bare, target):
    done = subprocess.run(["make", "--silent", target], cwd=bare, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.splitlines()[0] == (
        f"make {target}: no environment in .venv; run `make setup` first (1 to 3 minutes, 1.8 GB)"
    )
    assert [path.name for path in bare.iterdir()] == ["Makefile"]


@pytest.mark.parametrize("target", ["help", "clean"])
def test_help_and_clean_need_no_environment(bare, target):
    done = make(bare, target)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in bare.iterdir()] == ["Makefile"]
    if target == "help":
        assert [line.split()[0] for line in done.stdout.splitlines()] == targets()


def test_pip_shows_its_progress():
    assert "--quiet" not in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project on which `make` has run; and what it printed."""
    project = make_project(tmp_path_factory.mktemp("make") / "project")
    shutil.copy(ROOT / "Makefile", project)
    (project / ".venv").symlink_to(sys.prefix)
    (project / ".git/info/exclude").write_text("/.venv\n")
    commit(project)
    done = make(project)
    assert done.returncode == 0, done.stdout + done.stderr
    commit(project)
    return project, done.stdout


@pytest.fixture
def project(made, tmp_path):
    """A copy of it for one test."""
    shutil.copytree(made[0], tmp_path / "copy", symlinks=True)
    return tmp_path / "copy"


@pytest.mark.long
def test_make_ends_with_the_table_and_the_path_of_the_page(made):
    project, printed = made
    *_, last = printed.splitlines()
    assert last == "outputs/report/report.html"
    page = (project / last).read_text(encoding="utf-8")
    for text in (printed, page):
        assert "of another run" not in text
        assert "shipped" not in text
        assert "partial" not in text


@pytest.mark.long
def test_dvc_plots_draws_a_line_for_every_entry(project):
    write_params(project, {"curriculum.no_cot.lr": 1e-3})
    run(project, "dvc", "repro")
    for command, revisions in ((["show"], {"workspace"}), (["diff", "HEAD"], {"workspace", "HEAD"})):
        plots = json.loads(run(project, "dvc", "plots", *command, "--json").stdout)
        assert "errors" not in plots
        assert list(plots["data"]) == ["training loss", "validation loss", "accuracy"]
        for (plot,) in plots["data"].values():
            points = plot["content"]["data"]["values"]
            lines = {(point["entry"], point["rev"]) for point in points}
            assert lines == {(entry, rev) for entry in ("cot", "latent_1", "latent_2", "no_cot") for rev in revisions}
            assert all(point["updates"] and point[plot["content"]["encoding"]["y"]["field"]] for point in points)


@pytest.mark.long
def test_an_experiment_in_a_copy_of_the_work_tree_has_a_page_without_marks(project):
    run(project, "dvc", "exp", "run", "--temp", "-n", "other", "-S", "curriculum.no_cot.lr=1e-3")
    run(project, "dvc", "exp", "apply", "other")
    text = (project / "outputs/report/report.md").read_text(encoding="utf-8")
    assert "| no_cot   |" in text
    assert "of another run" not in text
    assert "partial" not in text


@pytest.mark.long
def test_after_a_failure_make_names_the_page_of_what_there_is_and_the_table_marks_its_rows(project):
    write_params(project, {"curriculum.latent_1.min_accuracy": 1.0, "curriculum.latent_1.lr": 1e-9})
    done = make(project, "repro")
    assert done.returncode != 0
    assert done.stdout.splitlines()[-1] == "outputs/partial-report/report.html"
    assert "`make status` shows what runs and what failed" in done.stderr
    page = (project / "outputs/partial-report/report.html").read_text(encoding="utf-8")
    assert "This page is partial" in page
    (failed,) = re.findall(r'train@latent_1</td><td class="text">failed</td><td class="text">(.*?)</td>', page)
    assert "min_accuracy" in failed
    rows = {line.split()[0]: line for line in make(project, "table").stdout.splitlines() if line}
    assert "(of another run)" not in rows["cot"] + rows["no_cot"]
    assert "(of another run)" in rows["latent_2"]
    assert "latent_1 (of another run)" in rows["latent_1"]


@pytest.mark.long
def test_numbers_that_came_with_a_clone_are_marked(project, tmp_path):
    run(project, "git", "clone", "-q", ".", str(tmp_path / "clone"))
    clone = tmp_path / "clone"
    (clone / ".venv").symlink_to(sys.prefix)
    table = make(clone, "table").stdout
    rows = [line for line in table.splitlines() if line[:4] in ("base", "cot ", "late", "no_c")]
    assert len(rows) == 5
    assert all(" (shipped) " in row for row in rows)
    assert "(shipped): the numbers came with the repository and were not made here." in table
