"""Experiments against each other: seeds, pairs, and the real `dvc exp` underneath."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import waiting
from coconut.report.compare import (
    compare,
    group_experiments,
    group_to_compare,
    pairs_table,
    read_experiment,
    seeds_table,
)
from coconut.report.overlay import compare_sections
from coconut.report.render import render_html, render_markdown
from fake_outputs import default_tree, write_entry

CURRICULUM = {
    "cot": {"parent": "base", "method": "cot", "latent_stage": 0, "epochs": 1, "lr": 0.002},
    "latent_1": {"parent": "cot", "method": "coconut", "latent_stage": 1, "epochs": 1, "lr": 0.002},
}


def experiment(folder: Path, name: str, *, cot: str, latent_1: str = "+", **changes):
    """Read an experiment of two entries; `cot` and `latent_1` are marks as in `write_entry`."""
    folder = folder / name
    write_entry(folder / "outputs", "cot", right=cot, method="cot")
    write_entry(folder / "outputs", "latent_1", right=latent_1)
    tree = default_tree(**{"curriculum": CURRICULUM, **changes})
    (folder / "params.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return read_experiment(name, lambda path: text_or_none(folder / path))


def text_or_none(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def letters(experiments):
    return {group.letter: [one.name for one in group.experiments] for group in group_experiments(experiments)}


def test_experiments_that_differ_in_the_seed_alone_are_one_group(tmp_path):
    experiments = [
        experiment(tmp_path, "a0", cot="+", seed=0),
        experiment(tmp_path, "b0", cot="+", seed=0, model="models/other"),
        experiment(tmp_path, "a1", cot="+", seed=1),
        experiment(tmp_path, "b1", cot="+", seed=1, model="models/other"),
    ]
    assert letters(experiments) == {"A": ["a0", "a1"], "B": ["b0", "b1"]}


def test_knobs_that_change_no_result_do_not_part_a_group(tmp_path):
    runtime = {**default_tree()["runtime"], "threads": 7}
    experiments = [
        experiment(tmp_path, "a", cot="+", seed=0),
        experiment(tmp_path, "b", cot="+", seed=1, runtime=runtime),
    ]
    assert letters(experiments) == {"A": ["a", "b"]}


def test_one_run_under_two_names_counts_once(tmp_path):
    experiments = [experiment(tmp_path, "HEAD", cot="+-"), experiment(tmp_path, "workspace", cot="+-")]
    assert letters(experiments) == {"A": ["HEAD"]}


def test_equal_params_and_seed_with_other_results_are_two_groups(tmp_path):
    experiments = [experiment(tmp_path, "HEAD", cot="+-"), experiment(tmp_path, "workspace", cot="-+")]
    assert letters(experiments) == {"A": ["HEAD"], "B": ["workspace"]}
    assert "B  the same params: workspace (seed 0)" in compare(group_to_compare(experiments))


def test_the_mean_over_seeds_has_its_interval_and_stays_a_share(tmp_path):
    groups = group_experiments(
        [
            experiment(tmp_path, "s2", cot="++++", latent_1="++++", seed=2),
            experiment(tmp_path, "s0", cot="+++-", latent_1="++++", seed=0),
            experiment(tmp_path, "other", cot="--+-", seed=0, model="models/other"),
        ]
    )
    assert seeds_table(groups).rows == [
        ["cot", "A", "0: 0.750  2: 1.000", "2", "0.875 [0.000, 1.000]"],
        ["cot", "B", "0: 0.250", "1", "0.250"],
        ["latent_1", "A", "0: 1.000  2: 1.000", "2", "1.000 [0.510, 1.000]"],
        ["latent_1", "B", "0: 1.000", "1", "1.000"],
    ]


def test_seeds_that_agree_do_not_make_an_accuracy_certain(tmp_path):
    experiments = [
        experiment(tmp_path, f"{name}{seed}", cot="-" * 20, seed=seed, model=name) for name in "ab" for seed in (0, 1)
    ]
    first, other = group_experiments(experiments)
    assert seeds_table([first]).rows[0] == ["cot", "A", "0: 0.000  1: 0.000", "2", "0.000 [0.000, 0.161]"]
    assert pairs_table(first, other).rows[0] == ["cot", "the same answers", "2", "+0.000 [-0.161, +0.161]"]


def test_entries_that_a_change_did_not_reach_share_a_row(tmp_path):
    first, other = group_experiments(
        [experiment(tmp_path, name, cot="+-+-", latent_1="++--", model=name) for name in ("a", "b")]
    )
    assert pairs_table(first, other).rows == [["cot, latent_1", "the same answers", "1", "+0.000"]]
    (changed,) = group_experiments([experiment(tmp_path, "c", cot="+-+-", latent_1="+++-", model="c")])
    assert [row[0] for row in pairs_table(first, changed).rows] == ["latent_1", "cot"]


def test_groups_are_paired_by_seed_and_by_example(tmp_path):
    first, other = group_experiments(
        [
            experiment(tmp_path, "a0", cot="++++++++++", seed=0),
            experiment(tmp_path, "a1", cot="+++++-----", seed=1),
            experiment(tmp_path, "a2", cot="----------", seed=2),
            experiment(tmp_path, "b0", cot="+++++++---", seed=0, model="models/other"),
            experiment(tmp_path, "b1", cot="-----+++++", seed=1, model="models/other"),
        ]
    )
    table = pairs_table(first, other)
    assert table.header == ["entry", "McNemar's p by seed", "seeds", "B - A [95 %]"]
    assert table.rows[0] == ["cot", "0: 0.250  1: 1.000", "2", "-0.150 [-1.000, +1.000]"]


def test_two_named_runs_that_differ_in_the_seed_alone_are_tested_against_each_other(tmp_path):
    experiments = [
        experiment(tmp_path, "one", cot="++++++++", seed=0),
        experiment(tmp_path, "two", cot="--------", seed=1),
    ]
    text = compare(group_to_compare(experiments))
    assert text == (
        "A  the first: one (seed 0)\n"
        "B  the same params: two (seed 1)\n"
        "\n"
        "entry     group  accuracy by seed  seeds  mean [95 %]\n"
        "cot       A      0: 1.000              1        1.000\n"
        "cot       B      1: 0.000              1        0.000\n"
        "latent_1  A      0: 1.000              1        1.000\n"
        "latent_1  B      1: 1.000              1        1.000\n"
        "\n"
        "B against A, paired by seed and by test example\n"
        "entry     McNemar's p by seed  seeds  B - A [95 %]\n"
        "cot       0.008                    1        -1.000\n"
        "latent_1  the same answers         1        +0.000\n"
    )


def test_the_changes_of_a_group_are_named(tmp_path):
    latent = {**default_tree()["latent"], "uniform_prob": 0.1}
    fewer = {"cot": CURRICULUM["cot"]}
    experiments = [
        experiment(tmp_path, "a", cot="+"),
        experiment(tmp_path, "b", cot="+", latent=latent, model="x"),
        experiment(tmp_path, "c", cot="+", curriculum=fewer),
    ]
    lines = compare(group_to_compare(experiments)).splitlines()
    assert lines[1] == "B  model=x, latent.uniform_prob=0.1: b (seed 0)"
    assert lines[2].startswith("C  no curriculum.latent_1.parent, no curriculum.latent_1.method, ")
    assert lines[2].endswith(" and 1 more: c (seed 0)")


def test_other_test_sets_have_no_paired_test(tmp_path):
    first, other = group_experiments(
        [experiment(tmp_path, "a", cot="++"), experiment(tmp_path, "b", cot="+++", model="x")]
    )
    assert pairs_table(first, other).rows[0] == ["cot", "0: -", "1", "+0.000"]


def test_an_experiment_whose_stages_failed_is_left_out_of_the_tables(tmp_path):
    whole = experiment(tmp_path, "a", cot="+")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "params.yaml").write_text(yaml.safe_dump(default_tree(curriculum=CURRICULUM, model="x")))
    failed = read_experiment("b", lambda path: text_or_none(tmp_path / "b" / path))
    assert [row[1] for row in seeds_table(group_experiments([whole, failed])).rows] == ["A", "A"]
    assert compare(group_to_compare([failed])).endswith("\n\n-\n")


def test_entries_of_the_workspace_that_are_not_up_to_date_are_left_out_and_named(tmp_path):
    experiment(tmp_path, "a", cot="+")
    marked = read_experiment(
        "workspace", lambda path: text_or_none(tmp_path / "a" / path), marks={"evaluate@cot": "of another run"}
    )
    text = compare(group_to_compare([marked]))
    assert text.splitlines()[:2] == [
        "A  the first: workspace (seed 0)",
        "left out: workspace: cot (of another run)",
    ]
    assert [row[0] for row in seeds_table(group_experiments([marked])).rows] == ["latent_1"]


def test_the_page_draws_one_line_for_every_run_and_pairs_the_groups(tmp_path):
    groups = group_experiments(
        [
            experiment(tmp_path, "a0", cot="++--", seed=0),
            experiment(tmp_path, "a1", cot="+++-", seed=1),
            experiment(tmp_path, "<b>", cot="----", seed=0, model="models/other"),
        ]
    )
    sections = compare_sections(groups)
    text = render_markdown("t", "", sections)
    assert [section.title for section in sections] == [
        *("Experiments", "Accuracy over seeds", "B against A", "Training, to the last latent entry"),
    ]
    charts = {chart.title: chart for section in sections for chart in section.charts}
    assert [line.label for line in charts["Accuracy by entry"].shown] == ["A, seed 0", "A, seed 1", "B, seed 0"]
    assert [point.y for point in charts["Accuracy by entry"].shown[0].points] == [0.5, 1.0]
    # Eight updates of cot, then eight of latent_1, counted from the untouched model.
    assert [point.x for point in charts["Training loss"].shown[2].points] == list(range(1, 17))
    assert "model=models/other" in text
    assert "<b>" not in render_html("t", "", sections)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (None, "a: holds no params.yaml; name an experiment of this pipeline"),
        ("model: [", "a: params.yaml: not valid YAML: line 2, column 1: "),
        ("model: x", "a: params.yaml: revision, seed, .*: missing"),
        ("", "a: params.yaml: the file: found null, wanted a mapping"),
    ],
)
def test_a_revision_that_is_no_run_of_this_pipeline_is_named(params, message):
    with pytest.raises(ValueError, match=message):
        read_experiment("a", {"params.yaml": params}.get)


EVALUATE = """
import json, sys
from pathlib import Path
import yaml
params = yaml.safe_load(Path("params.yaml").read_text())
seed = params["seed"]
assert params["model"] != "fails"
out = Path("outputs") / sys.argv[1]
out.mkdir(parents=True, exist_ok=True)
right = [index >= seed for index in range(4)]
(out / "metrics.json").write_text(json.dumps({"accuracy": sum(right) / 4, "num_examples": 4}))
rows = [{"index": i, "num_steps": 1, "gold": "1", "answer": "1", "right": r, "text": "x"} for i, r in enumerate(right)]
(out / "predictions.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
"""

PIPELINE = """
stages:
  evaluate:
    foreach: ${curriculum}
    do:
      cmd: python evaluate.py ${key}
      deps: [evaluate.py]
      params: [seed, model]
      outs: ["outputs/${key}/predictions.jsonl"]
      metrics: [{"outputs/${key}/metrics.json": {cache: false}}]
"""


@pytest.fixture
def run(tmp_path):
    """Run a command in a fresh repository with DVC's pipeline above in it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "GIT_"))}
    environment |= {"DVC_NO_ANALYTICS": "1", "HOME": str(tmp_path / "home")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    for role in ("AUTHOR", "COMMITTER"):
        environment |= {f"GIT_{role}_NAME": "n", f"GIT_{role}_EMAIL": "n@example.org"}
    folder = tmp_path / "repository"
    folder.mkdir()

    def run_command(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)

    (folder / "evaluate.py").write_text(EVALUATE)
    (folder / "dvc.yaml").write_text(PIPELINE)
    (folder / "params.yaml").write_text(json.dumps(default_tree(curriculum=CURRICULUM)))
    for command in ("git init -q", "dvc init -q", "dvc repro -q", "git add -A", "git commit -qm run"):
        done = run_command(*command.split())
        assert done.returncode == 0, done.stderr
    return run_command


@pytest.mark.slow
def test_experiments_are_read_through_dvc_from_its_cache(run):
    for name, changes in {"s1": "seed=1", "s2": "seed=2", "other": "model=x"}.items():
        seed = [] if "seed" in changes else ["-S", "seed=0"]
        done = run("dvc", "exp", "run", "-q", "-n", name, "-S", changes, *seed)
        assert done.returncode == 0, done.stderr
    done = run(sys.executable, "-m", "coconut", "compare")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["A  the first: HEAD (seed 0), s1 (seed 1), s2 (seed 2)", "B  model=x: other (seed 0)"]
    assert "cot       A      0: 1.000  1: 0.750  2: 0.500      3  0.750 [0.000, 1.000]" in lines
    named = run(sys.executable, "-m", "coconut", "compare", "s2", "HEAD")
    *_, cot, _, empty, path = named.stdout.splitlines()
    assert (cot, empty) == ("cot       0.500                    1        +0.500", "")
    assert path == "outputs/comparison/report.html"
    page = run("cat", path).stdout
    assert "2 runs in 2 groups." in page
    assert ">s2</td>" in page


@pytest.mark.slow
def test_a_commit_that_was_never_run_has_no_figures(run):
    assert run("sed", "-i", 's/"model": "[^"]*"/"model": "x"/', "params.yaml").returncode == 0
    assert run("git", "commit", "-qam", "never run").returncode == 0
    done = run(sys.executable, "-m", "coconut", "compare", "HEAD", "HEAD~1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "A  the first: HEAD~1 (seed 0)"
    assert "left out: HEAD: all of it (model changed)" in done.stdout.splitlines()
    assert "cot       A      0: 1.000              1        1.000" in done.stdout.splitlines()
    assert "left out: HEAD: all of it (model changed)" in run("cat", "outputs/comparison/report.md").stdout


@pytest.mark.slow
def test_experiments_of_other_commits_are_named_and_not_compared(run):
    assert run("dvc", "exp", "run", "-q", "-n", "before", "-S", "seed=1").returncode == 0
    assert run("git", "checkout", "-q", "--", ".").returncode == 0
    assert run("git", "commit", "-q", "--allow-empty", "-m", "later").returncode == 0
    lines = run(sys.executable, "-m", "coconut", "compare").stdout.splitlines()
    assert "A  the first: HEAD (seed 0)" in lines
    (line,) = [line for line in lines if "before" in line]
    assert re.fullmatch(r"not compared unless named: 1 experiment of commit \w{7}: before", line)
    named = run(sys.executable, "-m", "coconut", "compare", "HEAD", "before").stdout.splitlines()
    assert "B  the same params: before (seed 1)" in named


@pytest.mark.slow
def test_committed_figures_that_the_recorded_run_did_not_leave_are_left_out(run):
    assert run("sh", "-c", "echo >> outputs/cot/metrics.json").returncode == 0
    assert run("git", "commit", "-qam", "edited").returncode == 0
    done = run(sys.executable, "-m", "coconut", "compare", "HEAD")
    assert "left out: HEAD: cot (outputs/cot/metrics.json is not what its run left)" in done.stdout.splitlines()
    assert "latent_1  A      0: 1.000              1        1.000" in done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.long
def test_experiments_of_the_queue_that_failed_are_named(run):
    for name, change in {"s1": "seed=1", "bad": "model=fails"}.items():
        assert run("dvc", "exp", "run", "-q", "--queue", "-n", name, "-S", change).returncode == 0
    done = run(sys.executable, "-m", "coconut", "compare")
    assert "2 of the queue have not ended and are not in the table: s1, bad" in done.stdout.splitlines()
    assert run("dvc", "queue", "start").returncode == 0
    waiting.wait_for(
        lambda: "Running" not in (text := run("dvc", "queue", "status").stdout) and "Queued" not in text, 60
    )
    done = run(sys.executable, "-m", "coconut", "compare")
    assert done.returncode == 0, done.stderr
    assert "A  the first: HEAD (seed 0), s1 (seed 1)" in done.stdout.splitlines()
    assert "1 of the queue failed and is not in the table: bad" in done.stdout.splitlines()


@pytest.mark.slow
def test_an_unknown_experiment_is_one_line_and_exit_code_1(run):
    done = run(sys.executable, "-m", "coconut", "compare", "nope")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("coconut: nope: unknown Git revision 'nope'; `dvc exp list` and `git log` show")
    assert "Traceback" not in done.stderr
