"""Several test sets: files, metrics and predictions by name; a new one is scored alone, and nothing trains again."""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from coconut.config.params import find_former, load_params, parse_params
from coconut.data.examples import read_examples
from coconut.evaluation.answers import extract_answer, extract_last_number
from coconut.evaluation.outcomes import Outcome
from coconut.evaluation.scores import Scores
from coconut.files import digest_file
from inprocess import canonical_splits, make_folder, stage, succeed, sums, write_rows
from project import ROOT, make_project, run, stages_run, write_params

STAGES = ("digest_code", "params", "preprocess", "base", "encode", "train@cot", "evaluate@cot")
ONE_ENTRY = {"cot": {"parent": "base", "method": "cot", "latent_stage": 0, "epochs": 1, "lr": 2e-3}}
GENERATED = {"format": "generated", "rows": 12}


def tree_with(tests: Any) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())
    tree["data"]["tests"] = tests
    return tree


# --- params ---------------------------------------------------------------------------------


def test_the_first_set_has_the_plain_name_and_the_others_stand_below_tests() -> None:
    data = parse_params(tree_with({"gsm8k": GENERATED, "svamp": GENERATED, "far": GENERATED})).data
    assert list(data.splits) == ["train", "valid", "test", "tests/svamp", "tests/far"]
    assert [data.path_of(split) for split in ("train", "test", "tests/far")] == [
        "data.train",
        "data.tests.gsm8k",
        "data.tests.far",
    ]


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ({}, "data.tests: found no set, wanted at least one"),
        ([GENERATED], "data.tests: found a list, wanted a mapping"),
        ({"a/b": GENERATED}, "data.tests.a/b: not a usable name"),
        ({"valid": GENERATED}, "data.tests.valid: not a usable name"),
        ({1: GENERATED}, "data.tests.1: not a usable name"),
        ({"a": GENERATED, "A": GENERATED}, "data.tests.A: differs from a only in upper and lower case"),
        ({"a": GENERATED | {"format": "canonical"}}, "data.tests.a: wanted exactly one of file"),
        (
            {"a": GENERATED, "b": {"format": "gsm8k", "file": "/x"}},
            "data.tests.b.file: found '/x', wanted a path below",
        ),
        (
            {"a": {"format": "gsm8k", "file": "x", "generator": {"task": "multiplication", "num_digits": 2}}},
            "data.tests.a.generator: found beside format gsm8k",
        ),
    ],
)
def test_a_wrong_set_is_named_with_its_key(tests: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        parse_params(tree_with(tests))


def test_a_file_of_before_loads_as_it_did_and_is_told_how_to_write_it_now(tmp_path: Path) -> None:
    tree = tree_with({"test": GENERATED})
    tree["data"]["test"] = tree["data"].pop("tests")["test"]
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert load_params(path) == parse_params(tree_with({"test": GENERATED}))
    assert find_former(path) == [
        "data.test: one test set, as files were written before there were several; write `tests: {test: ...}` in its"
        " place, with the same values"
    ]
    assert find_former(ROOT / "params.yaml") == []
    tree["data"]["tests"] = {"test": GENERATED}
    with pytest.raises(ValueError, match=r"^data\.test: found beside data\.tests"):
        parse_params(tree)


# --- preprocessing and encoding -------------------------------------------------------------


def canonical(rows: list[dict[str, Any]], project: Path, name: str) -> dict[str, Any]:
    (project / f"data/raw/{name}.json").write_text(json.dumps(rows))
    return {"format": "canonical", "file": f"{name}.json"}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = make_folder(tmp_path / "project", canonical_splits() | {"curriculum": ONE_ENTRY})
    write_rows(folder, sums(80))
    return folder


def questions(project: Path, split: str) -> list[str]:
    return [example.question for example in read_examples(project / f"data/examples/{split}.jsonl")]


def test_train_and_valid_lose_what_stands_in_a_set_counted_set_by_set_and_sets_stay_whole(project: Path) -> None:
    rows = sums(80)
    one = canonical([rows[3], rows[5], rows[64], rows[72]], project, "one")
    two = canonical([rows[3], rows[7], rows[7]], project, "two")
    write_params(project, {"data.tests.one": one, "data.tests.two": two})
    succeed(project, *STAGES[:3])
    metrics = json.loads((project / "outputs/preprocess.json").read_text())
    assert metrics["train"]["dropped"] == {"in_test": 0, "in_one": 2, "in_two": 1, "in_valid": 0}
    assert metrics["valid"]["dropped"] == {"in_test": 0, "in_one": 1, "in_two": 0}
    assert [metrics["tests"][name]["kept"] for name in ("one", "two")] == [4, 3]
    assert questions(project, "tests/one") == [rows[n]["question"] for n in (3, 5, 64, 72)]
    assert len(questions(project, "train")) == 61
    overlap = metrics["overlap"]
    assert (overlap["test_one"], overlap["one_two"]) == (1, 1)
    assert all(count == 0 for key, count in overlap.items() if key.startswith(("train_", "valid_")))


def test_a_set_that_is_taken_out_leaves_no_file(project: Path) -> None:
    write_params(project, {"data.tests.one": canonical(sums(200)[90:100], project, "one")})
    succeed(project, *STAGES[:5])
    assert (project / "data/encoded/tests/one.arrow").is_file()
    write_params(project, canonical_splits() | {"data.tests": {"test": canonical(sums(80)[72:], project, "two")}})
    succeed(project, "preprocess", "encode")
    assert list(project.glob("data/*/tests/*")) == []


def test_a_generator_of_its_own_makes_a_set_of_harder_questions(project: Path) -> None:
    harder = {"task": "chained_arithmetic", "num_operations": 5, "modulus": 11}
    sources = {"data.train": GENERATED | {"rows": 64}, "data.valid": GENERATED, "data.tests.test": GENERATED}
    write_params(project, sources)
    succeed(project, *STAGES[:3])
    before = {split: digest_file(project / f"data/examples/{split}.jsonl") for split in ("train", "valid", "test")}
    write_params(project, {"data.tests.far": GENERATED | {"generator": harder}})
    succeed(project, "preprocess")
    assert {len(e.steps) for e in read_examples(project / "data/examples/tests/far.jsonl")} == {5}
    after = {split: digest_file(project / f"data/examples/{split}.jsonl") for split in before}
    assert after == before, "another set changes no byte of the splits that there were"


def test_a_vocabulary_of_words_does_not_grow_by_a_further_set_whose_unknown_rows_are_counted(project: Path) -> None:
    succeed(project, *STAGES[:5])
    before = digest_file(project / "outputs/base/checkpoint/model.safetensors")
    known = sums(200)[90:100]
    strange = {"question": "what is seven ?", "steps": [], "answer": "7"}
    write_params(project, {"data.tests.one": canonical([known[0], strange, *known[1:]], project, "one")})
    succeed(project, "preprocess", "base")
    assert digest_file(project / "outputs/base/checkpoint/model.safetensors") == before
    ended = stage(project, "encode")
    found = " ".join(ended.terminal.split())
    assert "1 of 11 examples hold words that the model's vocabulary lacks, such as " in found, found
    encoded = json.loads((project / "outputs/encode.json").read_text())["tests/one"]
    assert (encoded["num_examples"], encoded["num_unknown_words"]) == (10, 1)
    write_params(project, {"data.tests.one": canonical([strange] * 20, project, "one")})
    succeed(project, "preprocess")
    assert "wanted most of them to be known" in stage(project, "encode").error


# --- evaluation -----------------------------------------------------------------------------


@pytest.mark.slow
def test_every_set_is_scored_as_it_would_be_alone(project: Path) -> None:
    rows = sums(300)[90:120]
    write_params(project, {"data.tests.one": canonical(rows, project, "one")})
    succeed(project, *STAGES)
    metrics = json.loads((project / "outputs/cot/metrics.json").read_text())
    further = (project / "outputs/cot/predictions/one.jsonl").read_bytes()
    first = (project / "outputs/cot/predictions.jsonl").read_bytes()
    assert metrics["one.num_examples"] == 30
    assert metrics["num_examples"] == 8
    receipt = json.loads((project / "outputs/evaluations/cot.json").read_text())
    assert receipt["predictions/one.jsonl"] == digest_file(project / "outputs/cot/predictions/one.jsonl")
    tests = {"one": canonical(rows, project, "one"), "test": canonical_splits()["data.tests.test"]}
    write_params(project, {"data.tests": tests})
    succeed(project, "preprocess", "encode", "evaluate@cot")
    swapped = json.loads((project / "outputs/cot/metrics.json").read_text())
    for key in ("accuracy", "accuracy_low", "loss", "generated_tokens", "no_answer_share", "cot_match"):
        assert (swapped[key], swapped[f"test.{key}"]) == (metrics[f"one.{key}"], metrics[key])
    assert (project / "outputs/cot/predictions.jsonl").read_bytes() == further
    assert (project / "outputs/cot/predictions/test.jsonl").read_bytes() == first


@pytest.mark.slow
def test_a_set_may_be_scored_apart_by_the_kind_of_its_questions(project: Path) -> None:
    rows = [row | {"kind": f"kind {n % 2}" if n < 8 else None} for n, row in enumerate(sums(200)[90:102])]
    (project / "data/raw/kinds.json").write_text(json.dumps(rows))
    fields = {"question": "question", "answer": "answer", "group": "kind"}
    write_params(project, {"data.tests.kinds": {"format": "fields", "file": "kinds.json", "fields": fields}})
    succeed(project, *STAGES)
    lines = (project / "outputs/cot/predictions/kinds.jsonl").read_text().splitlines()
    assert [json.loads(line).get("group") for line in lines] == [*["kind 0", "kind 1"] * 4, *[None] * 4]
    assert "group" not in (project / "outputs/cot/predictions.jsonl").read_text()
    succeed(project, "probe@cot", "evaluate@base", "probe@base", "report")
    page = (project / "outputs/report/report.md").read_text()
    table = page.partition("## Accuracy by kind of question of kinds")[2]
    assert "kind 0 (4)" in table
    assert "no kind (4)" in table
    assert "## Accuracy by kind of question\n" not in page


@pytest.mark.slow
def test_a_set_may_be_read_by_another_rule_than_the_checkpoints(project: Path) -> None:
    rows = sums(300)[90:102]
    write_params(project, {f"data.tests.{name}": canonical(rows, project, name) for name in ("one", "two")})
    succeed(project, *STAGES)
    write_params(project, {"evaluate.answer_rules": {"two": "last_number"}, "evaluate.max_new_tokens": 1})
    succeed(project, "evaluate@cot")
    read = {
        name: [
            json.loads(line) for line in (project / f"outputs/cot/predictions/{name}.jsonl").read_text().splitlines()
        ]
        for name in ("one", "two")
    }
    assert [line["text"] for line in read["one"]] == [line["text"] for line in read["two"]]
    assert [line["answer"] for line in read["one"]] == [extract_answer(line["text"]) for line in read["one"]]
    assert [line["answer"] for line in read["two"]] == [extract_last_number(line["text"]) for line in read["two"]]
    assert [line["answer"] for line in read["one"]] != [line["answer"] for line in read["two"]]


@pytest.mark.slow
def test_a_tolerance_of_the_evaluation_counts_near_numbers_as_right(project: Path) -> None:
    succeed(project, *STAGES)
    before = json.loads((project / "outputs/cot/metrics.json").read_text())
    write_params(project, {"evaluate.tolerance": 1000.0})
    succeed(project, "evaluate@cot")
    after = json.loads((project / "outputs/cot/metrics.json").read_text())
    assert before["accuracy"] < after["accuracy"] == 1 - after["no_answer_share"]


@pytest.mark.slow
def test_samples_of_every_set_are_measured_and_leave_the_greedy_answers_as_they_are(project: Path) -> None:
    write_params(project, {"data.tests.one": canonical(sums(300)[90:102], project, "one")})
    succeed(project, *STAGES)
    before = {p.name: p.read_bytes() for p in (project / "outputs/cot").rglob("*.jsonl")}
    metrics = json.loads((project / "outputs/cot/metrics.json").read_text())
    write_params(project, {"evaluate.samples": 5, "evaluate.temperature": 1.5})
    succeed(project, "evaluate@cot")
    after = json.loads((project / "outputs/cot/metrics.json").read_text())
    assert {key: after[key] for key in ("accuracy", "loss", "one.accuracy")} == {
        key: metrics[key] for key in ("accuracy", "loss", "one.accuracy")
    }
    folder = project / "outputs/cot"
    assert (folder / "predictions.jsonl").read_bytes() == before["predictions.jsonl"]
    lines = [json.loads(line) for line in (folder / "predictions/samples/one.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(12))
    assert {len(line["answers"]) for line in lines} == {5}
    shares = [sum(line["right"]) / 5 for line in lines]
    assert after["one.pass_at_1"] == pytest.approx(sum(shares) / 12)
    assert after["one.pass_at_5"] == pytest.approx(sum(share > 0 for share in shares) / 12)
    assert after["pass_at_1"] <= after["pass_at_2"] <= after["pass_at_4"] <= after["pass_at_5"]
    receipt = json.loads((project / "outputs/evaluations/cot.json").read_text())
    assert receipt["predictions/samples.jsonl"] == digest_file(folder / "predictions/samples.jsonl")
    succeed(project, "probe@cot", "evaluate@base", "probe@base", "report")
    page = (project / "outputs/report/report.md").read_text()
    assert "## Samples of one" in page
    assert "pass@4 [95 %]" in page
    assert (project / "outputs/report/coverage-of-one.svg").is_file()
    write_params(project, {"evaluate.samples": 0})
    succeed(project, "evaluate@cot")
    assert {p.name: p.read_bytes() for p in folder.rglob("*.jsonl") if "thoughts" not in p.name} == before


OUTCOME = Outcome(3, 2, "5", None, False, True, 4, "text \u2028 \U0001f9e0")


def test_kept_scores_come_back_and_no_damage_is_taken_for_them() -> None:
    scores = Scores([OUTCOME], {"accuracy": 0.1 + 0.2, "cot_match": None})
    text = scores.to_json()
    assert Scores.from_json(text) == scores
    for place in range(len(text) - 1):
        with pytest.raises(ValueError, match=r"^"):
            Scores.from_json(text[:place])
        damaged = text[:place] + chr(ord(text[place]) ^ 1) + text[place + 1 :]
        with suppress(ValueError):
            assert Scores.from_json(damaged) == scores


@pytest.mark.long
def test_a_new_set_is_scored_alone_and_trains_nothing_under_the_real_pipeline(tmp_path: Path) -> None:
    root = make_project(tmp_path / "project", {"curriculum": ONE_ENTRY, "probe.enabled": False})
    run(root, "dvc", "repro")
    weights = digest_file(root / "outputs/cot/checkpoint/model.safetensors")
    first = (root / "outputs/cot/predictions.jsonl").read_bytes()
    write_params(root, {"data.tests.more": GENERATED | {"start": 400}})
    done = run(root, "dvc", "repro")
    assert stages_run(done) == ["params", "preprocess", "encode", "evaluate@cot", "evaluate_base", "report"]
    assert "train_seconds" in (root / "outputs/cot/costs.json").read_text()
    assert done.stdout.count("scored before, with the same checkpoint") + done.stderr.count("scored before, with") == 4
    metrics = json.loads((root / "outputs/cot/metrics.json").read_text())
    assert metrics["more.num_examples"] == 12
    assert (root / "outputs/cot/predictions.jsonl").read_bytes() == first
    assert digest_file(root / "outputs/cot/checkpoint/model.safetensors") == weights
    shown = run(root, "dvc", "metrics", "show", "outputs/cot/metrics.json")
    assert "more.accuracy" in shown.stdout
    assert "more" in (root / "outputs/report/report.html").read_text()
    assert "Data and pipelines are up to date." in run(root, "dvc", "repro").stdout
    run(root, "dvc", "checkout", "--force")
    assert stages_run(run(root, "dvc", "repro")) == []


@pytest.mark.slow
@pytest.mark.long
def test_a_kill_between_two_sets_loses_none_that_was_scored(tmp_path: Path) -> None:
    root = make_project(tmp_path / "project", {"curriculum": ONE_ENTRY, "probe.enabled": False})
    run(root, "dvc", "repro", "evaluate@cot")
    kept = sorted((root / ".resume/scores/cot").glob("*.json"))
    assert len(kept) == 2
    wanted = (root / "outputs/cot/predictions.jsonl").read_bytes()
    times = {path: path.stat().st_mtime_ns for path in kept}
    kept[0].write_text("junk")
    (root / ".resume/scores/cot/junk.json").write_text("junk")
    run(root, "dvc", "repro", "-f", "-s", "evaluate@cot")
    assert (root / "outputs/cot/predictions.jsonl").read_bytes() == wanted
    assert sorted((root / ".resume/scores/cot").glob("*.json")) == kept
    assert kept[1].stat().st_mtime_ns == times[kept[1]], "taken as it was"
    assert Scores.from_json(kept[0].read_text()), "scored again"
