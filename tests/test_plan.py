"""What would run, how long it takes, when all of it ends; and what does not fit is said before the night."""

import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coconut.pipeline.dvc_file import Stage
from coconut.pipeline.forecast import Times, read_times, seconds_left, simulate, write_times
from coconut.pipeline.status import Row
from coconut.planning import plan
from project import make_project, run, write_params


def make_stages(parents: dict[str, list[str]]) -> dict[str, Stage]:
    return {
        name: Stage(name=name, cmd=name, deps=[f"outputs/{one}" for one in above], params=[], outs=[f"outputs/{name}"])
        for name, above in parents.items()
    }


def test_branches_side_by_side_take_as_long_as_the_longest_of_them() -> None:
    stages = make_stages({"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"]})
    seconds = {"a": 1.0, "b": 10.0, "c": 4.0, "d": 2.0}
    assert simulate(stages, seconds, 1) == 17
    assert simulate(stages, seconds, 2) == 13
    assert simulate(stages, {"c": 4.0, "d": 2.0}, 2) == 6, "what is done takes no time"
    assert simulate(stages, {}, 3) == 0


@given(st.lists(st.tuples(st.floats(0, 100), st.sets(st.integers(0, 20), max_size=3)), max_size=12), st.integers(1, 5))
def test_no_plan_is_shorter_than_its_longest_chain_or_its_share_of_the_work(
    drawn: list[tuple[float, set[int]]], jobs: int
) -> None:
    names = [f"s{number}" for number in range(len(drawn))]
    parents = {name: [names[p % n] for p in drawn[n][1]] if n else [] for n, name in enumerate(names)}
    seconds = {name: one for name, (one, _) in zip(names, drawn, strict=True)}
    chains: dict[str, float] = {}
    for name in names:
        chains[name] = seconds[name] + max((chains[one] for one in parents[name]), default=0.0)
    total = simulate(make_stages(parents), seconds, jobs)
    slack = 1e-6 + 1e-9 * sum(seconds.values())
    assert max([*chains.values(), sum(seconds.values()) / jobs]) - slack <= total <= sum(seconds.values()) + slack
    assert simulate(make_stages(parents), seconds, 1) == pytest.approx(sum(seconds.values()))


def test_the_times_are_kept_and_damage_to_them_is_no_error(tmp_path: Path) -> None:
    assert read_times(tmp_path) is None
    write_times(Times({"train@cot": 12.5}, 2, 1e9), tmp_path)
    assert read_times(tmp_path) == Times({"train@cot": 12.5}, 2, 1e9)
    path = next(tmp_path.rglob("plan.json"))
    text = path.read_text()
    wrong = [text.replace("12.5", other) for other in ('"x"', "-3", "NaN")]
    for damaged in ("", "[]", text[:20], "[" * 100_000, text.replace("2,", "0,"), *wrong):
        path.write_text(damaged)
        assert read_times(tmp_path) is None, damaged[:40]


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = make_project(tmp_path_factory.mktemp("plan") / "project")
    run(project, "dvc", "repro", "encode", "base")
    return project


@pytest.mark.slow
def test_a_plan_names_every_stage_that_would_run_with_its_time(encoded: Path) -> None:
    before = run(encoded, "dvc", "status").stdout
    shown = run(encoded, "python", "-m", "coconut", "plan", "--jobs", "2").stdout
    line = next(line for line in shown.splitlines() if line.startswith("train@latent_1"))
    assert re.search(r"for train@cot +96 +6 +\d+\.\d +0:00:\d\d$", line), line
    assert {"train@cot", "evaluate@no_cot", "probe@latent_2", "evaluate_base", "report"} <= {
        line.split()[0] for line in shown.splitlines() if line
    }
    assert "preprocess " not in shown, "it is done"
    assert re.search(r"^About 0:0\d:\d\d with 2 stages at once: begun now, it ends at \d\d:\d\d", shown, re.MULTILINE)
    assert "Memory: about " in shown
    assert "Disk: at most " in shown
    assert run(encoded, "dvc", "status").stdout == before, "a plan changes nothing"
    times = read_times(encoded)
    assert times is not None
    assert times.seconds["train@cot"] > 0.5


@pytest.mark.slow
def test_what_does_not_fit_is_said_and_the_exit_code_is_1(
    encoded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(encoded)
    # Where data and model are not there yet, and after everything is done, no time is said.
    assert plan.run(Path(), jobs=1, measures=False) == 0
    assert "About" not in capsys.readouterr().out
    monkeypatch.setattr(plan, "free_memory_mb", lambda: 1.0)
    assert plan.run(Path(), jobs=2) == 1
    shown = capsys.readouterr().out
    assert "WARNING: the memory does not suffice: fewer --jobs" in shown
    assert "the disk does not suffice" not in shown


@pytest.mark.slow
def test_before_there_is_data_a_plan_says_what_makes_it(tmp_path: Path) -> None:
    project = make_project(tmp_path / "fresh")
    shown = run(project, "python", "-m", "coconut", "plan").stdout
    assert "after `dvc repro encode` the plan can measure" in shown
    assert "train@latent_1" in shown
    write_params(project, {"curriculum.cot.parent": "nobody"})
    failed = run(project, "python", "-m", "coconut", "plan", check=False)
    assert failed.returncode == 1
    assert "curriculum.cot.parent" in failed.stderr


def test_the_rest_of_a_night_counts_what_runs_by_its_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n  a: {cmd: a, outs: [x]}\n  b: {cmd: b, deps: [x], outs: [y]}\n  c: {cmd: c, deps: [x], outs: [z]}\n"
    )
    (tmp_path / "params.yaml").write_text("{}")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    times = Times({"a": 100.0, "b": 40.0, "c": 40.0}, 1, time.time())
    rows = [Row("a", "running"), Row("b", "waiting"), Row("c", "waiting")]
    assert seconds_left(rows, times, tmp_path) == 180
    folder = tmp_path / ".resume" / "a-0123456789abcdef"
    folder.mkdir(parents=True)
    progress = {"stage": "a", "update": 25, "num_updates": 100, "loss": 1.0, "eta_s": None, "resumed_from": None,
                "started": 1.0, "time": time.time(), "pid": 1}  # fmt: skip
    (folder / "progress.json").write_text(json.dumps(progress))
    assert seconds_left(rows, times, tmp_path) == 155
    done = [Row("a", "done"), Row("b", "waiting"), Row("c", "failed")]
    assert seconds_left(done, times, tmp_path) == 40
