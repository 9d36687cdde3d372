"""Tests of the preprocess stage: splits, overlap, statistics, and what is written when."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from coconut.config.params import load_params
from coconut.config.schema import DataConfig, Source
from coconut.data.examples import Example, read_examples
from coconut.data.generators.arithmetic import ChainedArithmetic
from coconut.data.generators.graphs import Graph
from coconut.data.preprocessing import preprocess
from coconut.data.streams import generate
from coconut.layout import SPLITS
from marks import slow_but
from test_sources import shared

REPOSITORY = Path(__file__).parents[1]


def generated(rows, **options):
    return Source(format="generated", rows=rows, **options)


def file(name, file_format="canonical", **options):
    return Source(format=file_format, file=name, **options)


@pytest.fixture
def data(tmp_path):
    """Three canonical files that overlap in every way."""
    questions = {
        "train": ["a", "a", "b", "in valid", "in  test ", "in both", "c", "d"],
        "valid": ["in valid", "in both", "v", "in both"],
        "test": ["in test", "in both", "t", "t"],
    }
    for split, texts in questions.items():
        rows = [{"question": q, "steps": ["s"] * (i % 3), "answer": "1"} for i, q in enumerate(texts)]
        (tmp_path / f"{split}.json").write_text(json.dumps(rows))
    return DataConfig(
        seed=0,
        raw_dir=str(tmp_path),
        train=file("train.json"),
        valid=file("valid.json"),
        tests={"test": file("test.json")},
        generator=ChainedArithmetic("chained_arithmetic", num_operations=2, modulus=11),
        skip_bad_rows=False,
        max_train=None,
    )


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def run(data, out):
    metrics = preprocess(data, out / "examples", out / "preprocess.json")
    assert json.loads((out / "preprocess.json").read_text()) == metrics
    return metrics, {split: read_examples(out / "examples" / f"{split}.jsonl") for split in SPLITS}


def test_what_two_splits_share_stays_only_in_the_more_held_out_one(data, out):
    metrics, examples = run(data, out)
    assert {split: [e.question for e in examples[split]] for split in SPLITS} == {
        "train": ["a", "a", "b", "c", "d"],
        "valid": ["in valid", "v"],
        "test": ["in test", "in both", "t", "t"],
    }
    assert metrics["overlap"] == {"train_valid": 0, "train_test": 0, "valid_test": 0}
    assert metrics["train"]["dropped"] == {"in_test": 2, "in_valid": 1}
    assert metrics["valid"]["dropped"] == {"in_test": 2}
    assert metrics["test"]["dropped"] == {}


def test_the_metrics_add_up_row_by_row(data, out):
    metrics, examples = run(replace(data, max_train=2), out)
    assert metrics["train"] == {
        "rows_read": 8,
        "kept": 2,
        "dropped": {"in_test": 2, "in_valid": 1, "beyond_max_train": 3},
        "empty_steps": 0,
        "repeated_questions": 1,
        "steps_mean": 0.5,
        "steps_per_example": {"0": 1, "1": 1},
    }
    assert metrics["test"]["repeated_questions"] == 1
    assert metrics["max_train"] == 2
    for split in SPLITS:
        numbers = metrics[split]
        assert numbers["rows_read"] == numbers["kept"] + sum(numbers["dropped"].values())
        assert numbers["kept"] == len(examples[split]) == sum(numbers["steps_per_example"].values())


def test_max_train_counts_after_duplicates_went(data, out):
    _, examples = run(replace(data, max_train=4), out)
    assert [e.question for e in examples["train"]] == ["a", "a", "b", "c"]


def test_skipped_rows_are_in_the_metrics_with_their_reason(data, out, tmp_path):
    rows = json.loads((tmp_path / "train.json").read_text())
    del rows[0]["answer"]
    rows[2]["question"] = "<|latent|>"
    (tmp_path / "train.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"train\.json: record 1: no answer among"):
        run(data, out)
    assert not out.exists(), "nothing is written before everything has succeeded"
    metrics, _ = run(replace(data, skip_bad_rows=True), out)
    assert metrics["train"]["dropped"] == {
        "malformed: marker": 1,
        "malformed: no answer": 1,
        "in_test": 2,
        "in_valid": 1,
    }
    assert metrics["train"]["rows_read"] == 8


def test_empty_steps_are_dropped_and_counted_and_their_rows_stay(data, out, tmp_path):
    """The reference's own preprocessing writes `[""]` for a solution without steps."""
    rows = [{"question": f"q{i}", "steps": steps, "answer": "1"} for i, steps in enumerate([[""], ["a", " ", "b"], []])]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    metrics, examples = run(data, out)
    assert [list(e.steps) for e in examples["test"]] == [[], ["a", "b"], []]
    assert (metrics["test"]["kept"], metrics["test"]["empty_steps"], metrics["train"]["empty_steps"]) == (3, 2, 0)


def test_an_error_leaves_the_outputs_of_the_last_run_as_they_were(data, out, tmp_path):
    run(data, out)
    before = {path: path.read_bytes() for path in out.rglob("*.json*")}
    (tmp_path / "test.json").write_text("[")
    with pytest.raises(ValueError, match=r"test\.json:1: not valid JSON"):
        run(data, out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_one_file_for_valid_and_test_is_refused_with_the_cure(data, out):
    with pytest.raises(ValueError, match=r"data\.valid: no example left of 4 rows .*4 in_test.* use start and rows"):
        run(replace(data, valid=data.tests["test"]), out)
    assert not out.exists()


def test_generated_splits_share_no_question_and_test_does_not_change_with_train(data, out):
    splits = {"valid": generated(300), "tests": {"test": generated(200)}}
    metrics, few = run(replace(data, train=generated(1000), **splits), out)
    assert metrics["overlap"] == {"train_valid": 0, "train_test": 0, "valid_test": 0}
    assert sum(metrics[split]["kept"] for split in SPLITS) == 1500
    assert len({e.question for split in SPLITS for e in few[split]}) == 1500
    _, many = run(replace(data, train=generated(5000), **splits), out)
    assert (many["test"], many["valid"], many["train"][:1000]) == (few["test"], few["valid"], few["train"])


@pytest.fixture
def large(data):
    """A task in which questions of two streams hardly ever meet."""
    task = ChainedArithmetic("chained_arithmetic", num_operations=6, modulus=11)
    return replace(data, generator=task, train=generated(400), valid=generated(50), tests={"test": generated(50)})


def written(folder):
    return {split: (folder / "examples" / f"{split}.jsonl").read_bytes() for split in SPLITS}


@pytest.mark.parametrize(
    "changes",
    [
        {"tests": {"test": generated(10)}},
        {"tests": {"test": generated(90)}},
        {"tests": {"test": generated(40, start=30)}},
        {"tests": {"test": file("test.json")}},
    ],
    ids=["fewer rows", "more rows", "other rows", "a file"],
)
def test_another_test_split_changes_no_byte_of_train_and_valid(large, out, changes):
    run(large, out)
    before = written(out)
    run(replace(large, **changes), out)
    after = written(out)
    assert after["test"] != before["test"]
    assert (after["train"], after["valid"]) == (before["train"], before["valid"])


def test_another_valid_split_changes_no_byte_of_train_and_test(large, out):
    run(large, out)
    before = written(out)
    run(replace(large, valid=generated(80)), out)
    after = written(out)
    assert (after["train"], after["test"]) == (before["train"], before["test"])
    assert after["valid"].startswith(before["valid"])


def test_a_train_question_that_is_in_a_new_test_set_is_replaced_by_the_next_of_the_stream(large, out, tmp_path):
    _, before = run(large, out)
    rows = [{"question": f" {e.question} ", "steps": [], "answer": "1"} for e in before["train"][:300:100]]
    (tmp_path / "held_out.json").write_text(json.dumps(rows))
    held_out = file("held_out.json")
    for sources in ({"tests": {"test": held_out}}, {"valid": held_out}):
        metrics, after = run(replace(large, **sources), out)
        assert (metrics["train"]["kept"], metrics["train"]["dropped"]) == (400, {"in_test": 0, "in_valid": 0})
        assert after["train"][:397] == [e for i, e in enumerate(before["train"]) if i not in (0, 100, 200)]


def test_the_test_split_is_the_beginning_of_the_seeds_own_stream(large, out):
    assert run(large, out)[1]["test"] == generate(large.generator, 50, seed=0)


@pytest.mark.parametrize("num_train", [55 - 12 - 8, 55 - 12 - 8 + 1])
def test_a_small_task_is_used_to_its_last_question_also_beside_a_file(data, out, tmp_path, num_train):
    task = ChainedArithmetic("chained_arithmetic", num_operations=1, modulus=5)
    rows = [{"question": e.question, "steps": [], "answer": "1"} for e in generate(task, 12, seed=9)]
    (tmp_path / "held_out.json").write_text(json.dumps(rows))
    small = replace(
        data, generator=task, tests={"test": file("held_out.json")}, valid=generated(8), train=generated(num_train)
    )
    if num_train == 35:
        _, examples = run(small, out)
        assert len({e.question for split in SPLITS for e in examples[split]}) == 55
    else:
        message = r"data\.generator: 36 distinct questions asked for, but only 35 turned up .*; ask for fewer rows"
        with pytest.raises(ValueError, match=message):
            run(small, out)


def test_splits_together_may_not_ask_for_more_questions_than_exist(data, out):
    splits = {"train": generated(9000), "valid": generated(200)}
    assert run(replace(data, tests={"test": generated(51)}, **splits), out)[0]["train"]["kept"] == 9000
    with pytest.raises(ValueError, match=r"9252 distinct questions asked for all splits together.* has only 9251"):
        run(replace(data, tests={"test": generated(52)}, **splits), out)


def test_start_of_a_generated_split_skips_questions_of_the_stream(data, out):
    base = replace(data, valid=generated(10), train=generated(10))
    _, whole = run(replace(base, tests={"test": generated(9)}), out)
    _, rest = run(replace(base, tests={"test": generated(5, start=4)}), out)
    assert rest == whole | {"test": whole["test"][4:]}


def test_generated_and_read_splits_may_be_mixed(data, out):
    _, examples = run(replace(data, train=generated(20)), out)
    assert len(examples["train"]) == 20
    assert examples["valid"][-1] == Example("v", ["s", "s"], "1")


@pytest.mark.parametrize(
    "task", slow_but(["graph_symbols", "files"], ["chained_arithmetic", "graph_sentences", "graph_symbols", "files"])
)
def test_equal_parameters_and_files_give_equal_bytes_in_another_process(data, tmp_path, task):
    if task != "files":
        task_config = Graph(task, 23, 36, 3, 6) if task.startswith("graph") else data.generator
        sources = {"train": generated(60), "valid": generated(20), "tests": {"test": generated(20)}}
        data = replace(data, generator=task_config, **sources)
    code = (
        "import sys; from pathlib import Path; from coconut.config.schema import *;"
        "from coconut.data.generators.arithmetic import *; from coconut.data.generators.graphs import *;"
        "from coconut.data.preprocessing import preprocess;"
        f"preprocess({data!r}, Path(sys.argv[1]) / 'examples', Path(sys.argv[1]) / 'preprocess.json')"
    )
    contents = []
    for hash_seed in ("1", "2"):
        folder = tmp_path / f"run{hash_seed}"
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        subprocess.run([sys.executable, "-c", code, str(folder)], check=True, env=environment, capture_output=True)
        contents.append({p.name: p.read_bytes() for p in sorted(folder.rglob("*.json*"))})
    assert contents[0] == contents[1]
    assert list(contents[0]) == ["test.jsonl", "train.jsonl", "valid.jsonl", "preprocess.json"]


def test_graph_statistics_stand_beside_the_papers(data, out):
    sources = {"train": generated(200), "valid": generated(20), "tests": {"test": generated(20)}}
    metrics, _ = run(replace(data, generator=Graph("graph_sentences", 23, 36, 3, 6), **sources), out)
    assert metrics["graphs_in_paper"] == {"nodes": 23.0, "edges": 36.0, "path": 3.8, "shortest_paths": 1.6}
    assert metrics["train"]["graphs"].keys() == metrics["graphs_in_paper"].keys()
    assert metrics["train"]["graphs"]["nodes"] == 23


def test_an_output_folder_that_cannot_be_written_is_named(data, out):
    out.mkdir()
    (out / "examples").write_text("a file in the way")
    with pytest.raises(OSError, match=r"examples: cannot be written: .*make the folder writable"):
        run(data, out)
    assert not (out / "preprocess.json").exists()


def test_a_limit_on_the_size_of_files_is_named_with_its_cure(data, out):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=r"cannot be written: File too large; the limit .*ulimit -f unlimited"):
            run(replace(data, train=generated(2_000)), out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_real_sets_of_the_issue_give_train_without_the_aug_questions(data, out):
    shared("gsm8k_train.jsonl")
    aug = "gsm8k_aug_valid.txt"
    sources = {
        "train": file("gsm8k_train.jsonl", "gsm8k"),
        "valid": file(aug, "gsm8k_aug", rows=200),
        "tests": {"test": file(aug, "gsm8k_aug", start=200)},
    }
    metrics, examples = run(replace(data, raw_dir=str(shared(aug).parent), **sources), out)
    # GSM8K-Aug's validation questions were cut from GSM8K's training set: all 500 of them are in it.
    assert metrics["train"]["dropped"] == {"in_test": 300, "in_valid": 200}
    assert {split: len(examples[split]) for split in SPLITS} == {"train": 6973, "valid": 200, "test": 300}
    assert metrics["overlap"] == {"train_valid": 0, "train_test": 0, "valid_test": 0}


# --- a wrong format -------------------------------------------------------------------------


def write_lines(folder, name, lines):
    (folder / name).write_text("\n".join(lines))


def test_multiplication_read_as_gsm8k_aug_is_said_of_each_split(data, out, tmp_path, log_lines):
    write_lines(
        tmp_path, "train.txt", ["2 3 * 1 4||2 3 + 0 8 2 1 #### 2 1 3 1", "1 3 * 1 4||1 3 + 0 4 2 1 #### 1 7 2 1"]
    )
    run(replace(data, train=file("train.txt", "gsm8k_aug")), out)
    assert log_lines == [
        "train: not one step is a <<...>> note in train.txt as format gsm8k_aug reads it;"
        " if that is a surprise, correct data.train.format"
    ]


def test_gsm8k_rows_of_which_none_has_a_note_are_said_and_one_such_row_among_others_is_not(
    data, out, tmp_path, log_lines
):
    rows = [json.dumps({"question": f"q{i}", "answer": f"It is {i}\n#### {i}"}) for i in range(3)]
    write_lines(tmp_path, "train.jsonl", rows)
    run(replace(data, train=file("train.jsonl", "gsm8k")), out)
    assert log_lines == [
        "train: not one example has a step in train.jsonl as format gsm8k reads it;"
        " if that is a surprise, correct data.train.format"
    ]
    log_lines.clear()
    write_lines(tmp_path, "train.jsonl", [*rows, json.dumps({"question": "q", "answer": "<<1+1=2>>\n#### 2"})])
    run(replace(data, train=file("train.jsonl", "gsm8k")), out)
    assert log_lines == []


# --- the stage as a process -----------------------------------------------------------------


def stage(folder, params):
    (folder / "params.yaml").write_text(params)
    return subprocess.run(
        [sys.executable, REPOSITORY / "stages" / "preprocess.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_shipped_default_is_preprocessed_with_one_line_per_split(tmp_path):
    result = stage(tmp_path, (REPOSITORY / "params.yaml").read_text())
    assert result.returncode == 0, result.stderr
    data = load_params(REPOSITORY / "params.yaml").data
    for split in SPLITS:
        wanted = data.splits[split].rows
        assert len(read_examples(tmp_path / "data" / "examples" / f"{split}.jsonl")) == wanted
        assert f"INFO    | {split}: {wanted} rows read, {wanted} examples kept" in result.stderr
    assert (tmp_path / "outputs" / "preprocess.json").is_file()


def test_a_users_mistake_is_one_line_and_exit_code_1(tmp_path):
    text = (REPOSITORY / "params.yaml").read_text()
    params = re.sub(r"(?m)^  train:\n(    .*\n)+", "  train: {format: prosqa, file: prosqa_train.json}\n", text)
    assert params != text
    result = stage(tmp_path, params)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert "preprocess: data/raw/prosqa_train.json: no such file" in result.stderr
    assert not (tmp_path / "data").exists()


# --- make clean -----------------------------------------------------------------------------

STAYS = [
    ".dvc/cache/x",
    ".resume/train-cot/state",
    ".venv/bin/python",
    "data/.gitignore",
    "data/raw/a.json",
    "models/m/model.safetensors",
    "outputs/.gitignore",
    "outputs/cot/.gitignore",
    "outputs/cot/metrics.json",
    "outputs/encode.json",
    "outputs/evaluations/.gitignore",
    "outputs/preprocess.json",
]
GOES = [
    ".ruff_cache/x",
    "data/encoded/train.arrow",
    "data/examples/train.jsonl",
    "outputs/.preprocess.json.unfinished",
    "outputs/base/checkpoint/config.json",
    "outputs/base/predictions.jsonl",
    "outputs/cot/checkpoint/model.safetensors",
    "outputs/cot/checkpoint.partial/model.safetensors",
    "outputs/cot/history.csv",
    "outputs/cot/predictions.jsonl",
    "outputs/cot/predictions/svamp.jsonl",
    "outputs/cot/train.json",
    "outputs/evaluations/cot.json",
    "outputs/logs/train-cot.log",
    "outputs/overnight/journal.log",
    "outputs/params.checked",
    "outputs/report/report.html",
]


def test_make_clean_removes_what_the_pipeline_made_and_leaves_what_git_or_a_user_keeps(tmp_path):
    for name in (*STAYS, *GOES):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"Makefile", *STAYS}
