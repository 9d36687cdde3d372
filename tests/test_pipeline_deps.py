"""A stage depends on the digests of the modules that its script imports, directly or not, and on no knob."""

import ast
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from coconut.pipeline.dvc_file import read_pipeline
from coconut.pipeline.stage_code import method_scripts, stage_code
from inprocess import make_folder, succeed

ROOT = Path(__file__).parents[1]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


def script_of(stage: str) -> str:
    command = STAGES[stage].get("do", STAGES[stage])["cmd"].split()
    return str(command[2])


def module_path(module: str) -> Path | None:
    """File of a module of ours below `src/`; a package is its `__init__.py`."""
    path = ROOT / "src" / Path(*module.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


@cache
def imported(path: Path) -> frozenset[Path]:
    """Our modules named in the import statements of a file, wherever they stand, and their packages."""
    found: set[Path] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guards = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    for_annotations = {inner for guard in guards for inner in ast.walk(guard)}
    for node in ast.walk(tree):
        if node in for_annotations:
            continue
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            packages = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
            found |= {path for package in packages if (path := module_path(package))}
    return frozenset(found)


def closure(script: Path) -> set[Path]:
    todo, seen = [script], {script}
    # What the package's own front door offers lazily is not what a stage loads.
    front_door = ROOT / "src/coconut/__init__.py"
    while todo:
        path = todo.pop()
        new = (imported(path) if path != front_door else frozenset()) - seen
        seen |= new
        todo += new
    return seen


CANNOT_CHANGE_BYTES = {"pipeline", "logs.py", "devices.py", "files.py", "tracking.py", "layout.py", "__init__.py"}
"""Below `src/coconut`: how a stage is run, watched and stored, not what it computes."""


LOADED_BY_NAME = {
    "stages/preprocess.py": ("data/generators", "data/presets"),
    "stages/probe.py": ("probing/added",),
}
"""Folders of modules that no import shows, by the one script whose results depend on them."""


@pytest.mark.parametrize("stage", [name for name in STAGES if name != "code"])
def test_a_stage_depends_on_the_digests_of_its_own_script_alone(stage: str) -> None:
    deps = STAGES[stage].get("do", STAGES[stage])["deps"]
    wanted = [f"outputs/code/{Path(script_of(stage)).stem}.txt"]
    if stage in ("train", "evaluate", "probe"):
        wanted.append("outputs/code/methods/${item.method}.txt")  # Of the entry's own method alone.
    elif stage in ("params", "report"):
        wanted.append("outputs/code/methods")
    assert [dep for dep in deps if dep.startswith(("src", "stages", "outputs/code"))] == wanted


def test_every_method_has_digests_of_its_own_and_no_stage_shares_them() -> None:
    scripts = method_scripts(ROOT)
    assert "src/coconut/methods/codi.py" in scripts
    assert not any("__init__" in script for script in scripts)
    for script in scripts:
        assert script in stage_code(script, ROOT)
        assert "src/coconut/methods/__init__.py" in stage_code(script, ROOT)
    for stage in (ROOT / "stages").glob("*.py"):
        assert not set(stage_code(f"stages/{stage.name}", ROOT)) & set(scripts)


def test_the_digests_are_written_from_all_our_code() -> None:
    assert STAGES["code"]["deps"] == ["stages", "src/coconut"]
    assert STAGES["code"]["outs"] == ["outputs/code"]


@pytest.mark.parametrize(
    "script", [*sorted({script_of(stage) for stage in STAGES} - {"stages/digest_code.py"}), *method_scripts(ROOT)]
)
def test_the_code_of_a_stage_or_method_is_all_that_it_imports_and_that_can_change_a_result(script: str) -> None:
    paths = {path.relative_to(ROOT) for path in closure(ROOT / script)}
    for folder in LOADED_BY_NAME.get(script, ()):
        for path in (ROOT / "src/coconut" / folder).glob("*.py"):
            paths |= {other.relative_to(ROOT) for other in closure(path)}
    wanted = {path for path in paths if path.parts[0] != "src" or path.parts[2] not in CANNOT_CHANGE_BYTES}
    counted = stage_code(script, ROOT)
    assert {Path(name) for name in counted if name.endswith(".py")} == wanted
    beside = {name for name in counted if not name.endswith(".py")}
    assert ("src/coconut/report/templates/curves.json" in beside) == (script == "stages/report.py")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with code of its own, to be edited."""
    project = make_folder(tmp_path / "project", {})
    (project / "src").unlink()
    shutil.copytree(ROOT / "src", project / "src", ignore=shutil.ignore_patterns("__pycache__"))
    return project


def digests(project: Path) -> dict[str, str]:
    """The files of digests as the stage `code` leaves them."""
    succeed(project, "digest_code")
    folder = project / "outputs/code"
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in folder.rglob("*.txt")}


def differing(one: dict[str, str], other: dict[str, str]) -> set[str]:
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")


def test_an_edited_method_changes_its_own_digests_alone_and_what_all_share_those_of_all(project: Path) -> None:
    methods = project / "src/coconut/methods"
    before = digests(project)
    of_methods = {f"methods/{Path(script).stem}.txt" for script in method_scripts(ROOT)}
    assert of_methods < before.keys()

    append(methods / "pause.py", "# A comment.\n")
    assert differing(before, digests(project)) == set()
    append(methods / "pause.py", "EDITED = 1\n")
    after = digests(project)
    assert differing(before, after) == {"methods/pause.txt"}
    append(project / "src/coconut/data/layouts.py", "EDITED = 1\n")
    assert of_methods < differing(after, digests(project))


def test_a_new_method_and_a_module_beside_it_change_no_other_digests(project: Path) -> None:
    methods = project / "src/coconut/methods"
    before = digests(project)
    shutil.copy(methods / "cot.py", methods / "mine.py")
    append(methods / "mine.py", "from coconut.methods._beside import NUMBER\n")
    (methods / "_beside.py").write_text("NUMBER = 1\n")
    new = digests(project)
    assert differing(before, new) == {"methods/mine.txt"}
    assert new["methods/mine.txt"].count("src/coconut/methods/_beside.py") == 1

    (methods / "_beside.py").write_text("NUMBER = 2\n")
    assert differing(new, digests(project)) == {"methods/mine.txt"}
    (methods / "mine.py").unlink()
    assert differing(before, digests(project)) == set(), "a method that is gone leaves no digests"


def test_no_stage_depends_on_knobs_that_cannot_change_a_result() -> None:
    for name, stage in STAGES.items():
        assert "runtime" not in stage.get("do", stage).get("params", []), name


def test_commands_replace_their_shell_and_hold_an_entrys_key_but_no_value() -> None:
    commands = {name: stage.get("do", stage)["cmd"] for name, stage in STAGES.items()}
    for name, command in commands.items():
        script = f"exec python {script_of(name)}"
        assert command in (script, f"{script} ${{key}}", f"{script} base")


@pytest.mark.parametrize("path", sorted((ROOT / "stages").glob("*.py")), ids=lambda path: path.name)
def test_a_stage_script_is_thin(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 35


@pytest.mark.parametrize("path", sorted((ROOT / "stages").glob("*.py")), ids=lambda path: path.name)
def test_a_stage_runs_the_code_of_its_own_work_tree(path: Path, tmp_path: Path) -> None:
    """Not that of the checkout which is installed: in `dvc exp run --temp` it may be another by now."""
    (tmp_path / "stages").mkdir()
    (tmp_path / "src/coconut").mkdir(parents=True)
    copy = shutil.copy(path, tmp_path / "stages")
    (tmp_path / "src/coconut/__init__.py").write_text("raise SystemExit('code of the copy')")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, copy, "cot"], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "code of the copy\n")


def test_git_holds_nothing_that_dvc_keeps():
    """DVC fails after the training if git tracks its output."""
    held = subprocess.run(["git", "ls-files", "outputs", "data"], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = set(held.stdout.split())
    uncached = re.compile(r"outputs/(?:[^/]+/(?:metrics|costs|thoughts)|preprocess|encode)\.json")
    cached = {out for stage in read_pipeline(ROOT).values() for out in stage.outs if not uncached.fullmatch(out)}
    assert len(cached) > 40
    assert {file for file in tracked for out in cached if file == out or file.startswith(f"{out}/")} == set()
