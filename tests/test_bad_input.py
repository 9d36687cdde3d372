"""Everything a user can get wrong: one message with place, found, wanted and cure, exit code 1, nothing lost."""

import csv
import html
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from coconut import files as guard
from coconut.data.examples import MARKERS, Example, read_examples
from coconut.training import entry as training_entry
from coconut.training import outputs as training_outputs
from inprocess import ROWS_FILE, canonical_splits, make_folder, stage, succeed, sums, write_rows
from project import ROOT, TINY, commit, environment, make_project, run, stages_run, write_params

pytestmark = pytest.mark.slow

CURRICULUM = {
    "cot": TINY["curriculum"]["cot"] | {"epochs": 1},
    "latent_1": TINY["curriculum"]["latent_1"],
}
PARAMS = canonical_splits() | {"curriculum": CURRICULUM}
STAGES = (
    *("digest_code", "params", "preprocess", "base", "encode", "train@cot", "evaluate@cot", "probe@cot"),
    *("train@latent_1", "evaluate@latent_1", "probe@latent_1", "evaluate@base", "probe@base", "report"),
)
CHECKPOINT = "outputs/cot/checkpoint"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which every stage has run."""
    project = make_folder(tmp_path_factory.mktemp("bad_input") / "project", PARAMS)
    write_rows(project, sums(80))
    succeed(project, *STAGES)
    return project


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished project for one test."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy, symlinks=True)
    return copy


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that training and evaluation have left."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted((folder / "outputs").rglob("*"))
        if path.is_file() and "logs" not in path.parts
    }


def replace(path: Path, content: bytes) -> None:
    """As an editor does: a new file in the place of the old one."""
    path.unlink()
    path.write_bytes(content)


def block(path: Path) -> None:
    """Put a file where a folder is wanted; a running test's user may be root, whom permissions do not stop."""
    shutil.rmtree(path)
    path.write_text("in the way", encoding="utf-8")


# --- params.yaml ----------------------------------------------------------------------------

GONE = object()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.batchsize", 64, "train.batchsize: unknown key; known here: batch_size, precision"),
        ("runtime.devise", "cpu", "runtime.devise: unknown key; known here: device, threads"),
        ("seed", GONE, "seed: missing; add the key, recipes/default.yaml shows every one of them"),
        ("curriculum.cot.lr", GONE, "curriculum.cot.lr: missing; add the key"),
        ("train.batch_size", "many", "train.batch_size: found 'many' (text), wanted a whole number"),
        ("train.batch_size", 0, "train.batch_size: found 0, wanted at least 1"),
        ("curriculum.cot.lr", "fast", "curriculum.cot.lr: found 'fast' (text), wanted a finite number"),
        ("curriculum.latent_1.parent", "nobody", "curriculum.latent_1.parent: found 'nobody', wanted 'base' or"),
        ("curriculum.cot.parent", "latent_1", "a cycle, cot <- latent_1 <- cot; let one of them start from base"),
        ("curriculum.cot.parent", "cot", "a cycle, cot <- cot; let one of them start from base"),
        ("curriculum.latent_2", CURRICULUM["latent_1"] | {"parent": "latent_1", "latent_stage": 0},
         "curriculum.latent_2.latent_stage: found 0, wanted at least 1, the stage of its parent 'latent_1'"),
        ("latent.thought", "hidden[last]", "thought: found 'hidden[last]', wanted one of hidden[LAYER]"),
        ("curriculum.3", CURRICULUM["cot"], "curriculum.3: not a usable name; wanted letters, digits"),
        ("curriculum.a b", CURRICULUM["cot"], "curriculum.a b: not a usable name"),
        ("curriculum.$(touch pwned)", CURRICULUM["cot"], "curriculum.$(touch pwned): not a usable name"),
        ("curriculum.base", CURRICULUM["cot"], "curriculum.base: not a usable name"),
    ],
)  # fmt: skip
def test_a_mistake_in_params_is_one_message_of_the_first_stage(
    project: Path, key: str, value: Any, message: str
) -> None:
    if value is GONE:
        path = project / "params.yaml"
        last = key.rpartition(".")[2]
        path.write_text(re.sub(rf"(?m)^ *{last}: 0(\.002)?\n", "", path.read_text(), count=1))
    else:
        write_params(project, {key: value})
    assert message in stage(project, "params").error


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("3", 'curriculum: key 3 is a number, wanted text .* quote it and start with a letter: "stage_3"'),
        ("true", "curriculum: key True is true/false, wanted text"),
        ("null", "curriculum: key None is null, wanted text"),
        ("2026-11-23", r"params.yaml: line \d+: found the date '2026-11-23', wanted a number or text; quote it"),
        ("../up", r"curriculum\.\.\./up: not a usable name; .* it becomes a folder below outputs/"),
    ],
)
def test_an_entry_name_that_dvc_or_the_disk_trips_over_is_refused(project: Path, name: str, message: str) -> None:
    path = project / "params.yaml"
    path.write_text(path.read_text().replace("  latent_1:\n", f"  {name}:\n"))
    assert re.search(message, stage(project, "params").error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed: 0 # \xe9\n", "params.yaml: not UTF-8 at byte 10; save the file as UTF-8"),
        (b"curriculum: [\n", "params.yaml: not valid YAML"),
        (b"", "params.yaml: the file: found null, wanted a mapping of keys to values"),
        (b"model: !!python/object/apply:os.system [touch pwned]\n", "params.yaml: line 1: found the tag 'tag:yaml.org"),
    ],
    ids=["not UTF-8", "cut short", "empty", "a tag that runs code"],
)
def test_a_params_file_that_cannot_be_read_is_named(project: Path, content: bytes, message: str) -> None:
    (project / "params.yaml").write_bytes(content)
    ended = stage(project, "params")
    assert ended.exit_code == 1
    assert message in ended.terminal
    assert "Traceback" not in ended.terminal
    assert not (project / "pwned").exists()


def test_a_learning_rate_in_exponent_form_without_a_point_trains(project: Path) -> None:
    path = project / "params.yaml"
    # Ours, not safe_dump's: PyYAML reads this form as text.
    path.write_text(path.read_text().replace("    lr: 0.002\n", "    lr: 1e-5\n"))
    assert path.read_text().count("lr: 1e-5\n") == 2
    succeed(project, "params", "train@latent_1", "report")
    with (project / "outputs/latent_1/history.csv").open() as file:
        assert {float(row["lr"]) for row in csv.DictReader(file)} == {1e-5}


def test_a_layer_that_the_model_does_not_have_is_named_before_training(project: Path) -> None:
    write_params(project, {"latent.thought": "hidden[99]"})
    assert "thought: found layer 99, but the model has 3 layers; wanted 0 to 3" in stage(project, "train@cot").error


def test_a_device_that_is_not_there_is_named(project: Path) -> None:
    write_params(project, {"runtime.device": "cuda"})
    assert (
        "runtime.device: found cuda, but torch sees no GPU here; use auto or cpu" in stage(project, "train@cot").error
    )


@pytest.mark.parametrize("name", ["train@nobody", "evaluate@nobody", "evaluate@../.."])
def test_an_entry_that_is_not_in_the_curriculum_is_named(project: Path, name: str) -> None:
    assert re.search(r"curriculum\.\S+: no such entry, wanted .*cot, latent_1", stage(project, name).error)


# --- raw data -------------------------------------------------------------------------------

ROW = {"question": "1 + 1 ?", "steps": ["2"], "answer": "2"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "rows.json: no such file, wanted the file of data.train.file below data.raw_dir"),
        (b"", "rows.json: no row in it, wanted at least one; restore the file"),
        (b" \n\n", "rows.json: no row in it, wanted at least one"),
        (b'[{"question": "caf\xe9"}]', "rows.json:1: byte 0xe9 at offset 18 is not UTF-8"),
        (json.dumps([ROW] * 9).encode()[:200], "rows.json:1: not valid JSON at column"),
        (json.dumps(ROW, indent=1).encode(), "rows.json: found a JSON object, wanted a list of them"),
        (f"{json.dumps(ROW)},\n{json.dumps(ROW)},".encode(), "rows.json: lines end with a comma"),
        (b"404: Not Found", "rows.json: found no line that is a JSON object"),
        (b'<?xml version="1.0"?><Error/>', "rows.json: found an XML document"),
        (json.dumps([ROW, {"question": "1 ?", "steps": []}]).encode(), "rows.json: record 2: no answer among"),
        (json.dumps([ROW | {"answer": ""}]).encode(), "rows.json: record 1: answer is empty, wanted text"),
        (json.dumps([ROW | {"answer": None}]).encode(), "rows.json: record 1: no answer among"),
        (json.dumps([ROW | {"steps": "2"}]).encode(), "rows.json: record 1: steps is text, wanted a list of text"),
        (json.dumps([ROW | {"question": "\ud800"}]).encode(), "holds half a character (a lone surrogate)"),
        (json.dumps(["a"]).encode(), "rows.json: record 1: "),
        (b"[" * 100_000, "rows.json: not usable JSON"),
        (b"\x1f\x8b\x08\x00" + bytes(50), "rows.json: found a gzip archive, wanted text in UTF-8; unpack it"),
        *((json.dumps([ROW | {"question": f"1 {marker} ?"}]).encode(),
           f"rows.json: record 1: question holds the marker {marker}, which only the pipeline may write")
          for marker in MARKERS),
    ],
    ids=lambda value: value.decode("utf-8", "replace")[:20] if isinstance(value, bytes) else None,
)  # fmt: skip
def test_a_raw_file_that_is_no_data_is_named_and_the_examples_stay(
    project: Path, content: bytes | None, message: str
) -> None:
    before = (project / "data/examples/train.jsonl").read_bytes()
    (project / ROWS_FILE).unlink()
    if content is not None:
        (project / ROWS_FILE).write_bytes(content)
    assert message in stage(project, "preprocess").error
    assert (project / "data/examples/train.jsonl").read_bytes() == before


@pytest.mark.parametrize("token", ["<eos>", "<pad>", "<unk>"])
@pytest.mark.parametrize("part", ["question", "steps", "answer"])
def test_text_that_spells_out_the_tokenizers_special_tokens_is_refused(project: Path, token: str, part: str) -> None:
    rows = sums(80)
    rows[3] |= {part: [f"2 {token}"] if part == "steps" else f"2 {token}"}
    write_rows(project, rows)
    succeed(project, "preprocess", "base")
    message = f"data/examples/train.jsonl:4: holds {token}, a special token of the model's tokenizer, wanted plain text"
    assert message in stage(project, "encode").error


# --- the model ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("Qwen/Qwen2.5-0.5B", "is neither a folder here nor in the local hub cache"),
        ("./models/none", "model: found './models/none', which is no folder here and no hub id"),
        ("$(touch pwned)", "model: found '$(touch pwned)', which is no folder here and no hub id"),
        ("data/raw", "model: data/raw has no config.json; wanted a Hugging Face folder, or one with a config.json"),
    ],
)
def test_a_model_that_cannot_be_reached_is_named(project: Path, model: str, message: str) -> None:
    before = contents(project)
    write_params(project, {"model": model})
    assert message in stage(project, "base").error
    assert contents(project) == before
    assert not (project / "pwned").exists()


def test_a_model_folder_with_damaged_weights_is_named(project: Path) -> None:
    shutil.copytree(project / "outputs/base/checkpoint", project / "model")
    replace(project / "model/model.safetensors", (project / "model/model.safetensors").read_bytes()[:3000])
    write_params(project, {"model": "model"})
    assert "model/model.safetensors: its safetensors file is damaged or cut short" in stage(project, "base").error


def test_too_few_positions_name_the_model_and_the_longest_example(project: Path) -> None:
    config = json.loads((ROOT / "models/tiny/config.json").read_text())
    (project / "small").mkdir()
    (project / "small/config.json").write_text(json.dumps(config | {"n_positions": 6}))
    write_params(project, {"model": "small"})
    succeed(project, "base")
    message = r"data/examples/train\.jsonl: 64 of 64 examples have views longer than the model's 6 positions"
    assert re.search(
        message + r" \(the longest has \d+ tokens\), .*; take a model with more", stage(project, "encode").error
    )


# --- what stages leave for each other -------------------------------------------------------


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2 - 5]  # Half of all lines would be a shorter file, not a damaged one.


def scramble(content: bytes) -> bytes:
    return random.Random(0).randbytes(len(content))


@pytest.mark.parametrize("name", ["train@latent_1", "evaluate@cot"])
@pytest.mark.parametrize("damage", [None, cut, scramble, lambda _content: b""], ids=["gone", "cut", "noise", "empty"])
@pytest.mark.parametrize("file", ["coconut.json", "config.json", "model.safetensors", "tokenizer.json"])
def test_a_checkpoint_that_is_not_whole_is_named(
    project: Path, file: str, damage: Callable[[bytes], bytes] | None, name: str
) -> None:
    path = project / CHECKPOINT / file
    if damage is None:
        path.unlink()
    else:
        replace(path, damage(path.read_bytes()))
    assert CHECKPOINT in stage(project, name).error


@pytest.mark.parametrize("damage", [None, cut, scramble, lambda _content: b""], ids=["gone", "cut", "noise", "empty"])
def test_moments_that_are_not_whole_are_named(project: Path, damage: Callable[[bytes], bytes] | None) -> None:
    path = (project / CHECKPOINT).with_name("optimizer.safetensors")
    if damage is None:
        path.unlink()
    else:
        replace(path, damage(path.read_bytes()))
    assert f"{path.relative_to(project)}: " in stage(project, "train@latent_1").error


def test_a_parents_trained_network_that_is_gone_is_named(project: Path) -> None:
    """And not drawn afresh, which is right only after a parent that trained none."""
    write_params(project, {"latent.thought": "projection"})
    succeed(project, "train@cot")
    (project / CHECKPOINT / "thought.safetensors").unlink()
    message = f"{CHECKPOINT}/thought.safetensors: the weights of thought 'projection' cannot be read"
    assert message in stage(project, "train@latent_1").error


@pytest.mark.parametrize("name", ["train@latent_1", "evaluate@cot"])
def test_a_checkpoint_that_is_gone_is_named(project: Path, name: str) -> None:
    shutil.rmtree(project / CHECKPOINT)
    assert CHECKPOINT in stage(project, name).error


@pytest.mark.parametrize("damage", [None, cut, scramble, lambda _content: b""], ids=["gone", "cut", "noise", "empty"])
@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("data/examples/train.jsonl", "base"),
        ("data/examples/train.jsonl", "encode"),
        ("data/examples/valid.jsonl", "train@cot"),
        ("data/examples/test.jsonl", "evaluate@cot"),
        ("data/encoded/train.arrow", "train@cot"),
        ("data/encoded/valid.arrow", "train@cot"),
        ("data/encoded/test.arrow", "evaluate@cot"),
        ("outputs/cot/train.json", "evaluate@cot"),
        ("outputs/cot/metrics.json", "report"),
        ("outputs/cot/predictions.jsonl", "report"),
        ("outputs/preprocess.json", "report"),
    ],
)
def test_a_damaged_intermediate_file_is_named(
    project: Path, file: str, name: str, damage: Callable[[bytes], bytes] | None
) -> None:
    path = project / file
    if damage is None:
        path.unlink()
    else:
        replace(path, damage(path.read_bytes()))
    if name == "report" and (damage is None or (file.endswith(".jsonl") and not path.read_bytes())):
        succeed(project, "report")  # It says that the entry is not there.
        return
    if file.startswith("data/examples") and name != "encode" and damage is not None and not path.read_bytes():
        return  # Empty, not damaged: encode refuses it, and nothing after encode can run.
    assert file in stage(project, name).error


# --- outputs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("data/examples", "preprocess"),
        ("data/encoded", "encode"),
        ("outputs/base", "base"),
        ("outputs/cot", "train@cot"),
        ("outputs/evaluations", "evaluate@cot"),
        ("outputs/report", "report"),
        (".resume", "train@cot"),
    ],
)
def test_a_file_in_the_place_of_an_output_folder_is_named(project: Path, folder: str, name: str) -> None:
    block(project / folder)
    ended = stage(project, name)
    assert folder in ended.error
    assert "epoch" not in ended.terminal, "said before anything was trained"


def test_a_log_that_cannot_be_written_stops_nothing(project: Path) -> None:
    block(project / "outputs/logs")
    ended = stage(project, "preprocess")
    assert ended.exit_code == 0
    assert "WARNING: outputs/logs/preprocess.log: the log file lacks lines from here on: " in ended.terminal


@pytest.fixture
def mount() -> Iterator[Callable[[Path, str], None]]:
    """Mount a small disk over a folder, or change the options of one that is mounted."""
    mounted: list[Path] = []

    def mount_tmpfs(folder: Path, options: str) -> None:
        change = ["-o", f"remount,{options}"] if folder in mounted else ["-o", options]
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", *change, "tmpfs", folder], capture_output=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode().strip()}")
        if folder not in mounted:
            mounted.append(folder)

    assert shutil.which("mount"), "Linux has it"
    yield mount_tmpfs
    for folder in reversed(mounted):
        subprocess.run(["umount", folder], check=True)


@pytest.mark.skipif(os.name != "posix" or sys.platform != "linux", reason="mounts a tmpfs")
@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("data/examples", "preprocess"),
        ("outputs/base", "base"),
        ("data/encoded", "encode"),
        ("outputs/cot", "train@cot"),
        ("outputs/evaluations", "evaluate@cot"),
        ("outputs/report", "report"),
    ],
)
@pytest.mark.parametrize("options", ["ro", "size=4k"], ids=["read-only", "full"])
def test_a_disk_that_takes_nothing_is_named(
    project: Path, folder: str, name: str, options: str, mount: Callable[[Path, str], None]
) -> None:
    mount(project / folder, options)
    if options != "ro":
        (project / folder / "ballast").write_bytes(bytes(4096))
    error = stage(project, name).error
    assert re.search(rf"{folder}.*: .*(Read-only file system|No space left|free on its disk)", error), error


@pytest.mark.parametrize("name", ["preprocess", "base", "encode", "train@cot", "evaluate@cot", "report"])
def test_a_disk_that_is_too_small_is_found_before_the_work(
    project: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = [
        path for folder in ("data/examples", "data/encoded", "outputs") for path in (project / folder).rglob("*")
    ]
    before = {path: path.stat().st_mtime_ns for path in outputs if path.is_file() and path.parent.name != "logs"}
    shutil.rmtree(project / ".resume")
    monkeypatch.setattr(guard.shutil, "disk_usage", lambda _: SimpleNamespace(free=99))
    error = stage(project, name).error
    wanted = r"(data|outputs|\.resume).*: 99 bytes free on its disk, [\d.]+ ([kM]B|bytes) wanted for what the stage"
    assert re.search(wanted, error), error
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_train_json_names_versions_and_load(finished: Path) -> None:
    summary = json.loads((finished / "outputs/cot/train.json").read_text())
    assert summary["versions"] == {"torch": torch.__version__, "transformers": transformers.__version__}
    assert {"train_cpu_seconds", "train_load"} <= summary.keys()
    assert summary["passes"] == "fast"


def test_a_state_of_other_versions_goes_on_with_a_warning(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = (project / "outputs/cot/checkpoint/model.safetensors").read_bytes()
    shutil.rmtree(project / "outputs/cot/checkpoint")
    monkeypatch.setattr(training_entry, "versions", lambda: {"torch": torch.__version__, "transformers": "99.0"})
    ended = stage(project, "train@cot")
    assert ended.exit_code == 0, ended.terminal
    assert re.search(r"WARNING \| cot: the resume state was saved with transformers \S+ \(here 99.0\)", ended.terminal)
    assert (project / "outputs/cot/checkpoint/model.safetensors").read_bytes() == weights


def test_questions_that_do_not_fit_are_counted(finished: Path) -> None:
    assert json.loads((finished / "outputs/cot/metrics.json").read_text())["num_left_out"] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_disk_that_is_full_at_the_last_moment_costs_no_training(
    project: Path, mount: Callable[[Path, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = "outputs/cot/checkpoint/model.safetensors"
    before = (project / weights).read_bytes()
    shutil.rmtree(project / "outputs/cot")
    shutil.rmtree(project / ".resume")
    mount(project / "outputs/cot", "size=1m")
    monkeypatch.setattr(training_outputs, "check_free_space", lambda _needs: None)
    ended = stage(project, "train@cot")
    assert re.search(
        r"outputs/cot: cannot be written \(.*; the finished training is kept in .resume: make room", ended.error
    )
    mount(project / "outputs/cot", "size=64m")
    again = stage(project, "train@cot")
    assert again.exit_code == 0, again.terminal
    assert "resumed at update 4" in again.terminal
    assert "epoch 1" not in again.terminal, "nothing is trained again"
    assert (project / weights).read_bytes() == before


# --- hostile text ---------------------------------------------------------------------------

HOSTILE = [
    "$(touch pwned)", "`touch pwned`", "; touch pwned #", "| tee pwned", "' || touch pwned '", "&& touch pwned",
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</td></table><h1>up", "&lt;b&gt;",
    "\"><svg/onload=x>",
    "{}", "{0}", "{self.__class__}", "{{}}", "%s%n", "%(name)s", "${seed}", "<red>red</red>", "<level>", "\\<x>",
    "../../etc/passwd", "/etc/passwd", "C:\\Windows", "~/.ssh", "file:///etc/passwd", "a/b", ".", "..", "-rf",
    "\x1b[31mred\x1b[0m", "\x00nul", "\x07", "\u202egnirts", "\ufeffbom", "e\u0301", "\U0001f9e0", "\u2028line",
    "| a | b |", "](javascript:alert(1))", "**bold**", "```", "# head", "$\\frac{1}{0}$", "\\input{x}", "_$_^",
    "'; DROP TABLE runs; --", "__import__('os').system('touch pwned')", "!!python/object:os.system", "=cmd()", "NaN",
]  # fmt: skip


HOSTILE_ELEMENTS = ("img", "iframe", "link", "object", "embed", "form", "x", "level", "red", "b", "foreignobject")


class Elements(HTMLParser):
    """What a browser would make of a page: its elements, and the scripts that it would run."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.all: list[tuple[str, dict[str, str]]] = []
        self.code: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.all.append((tag, {key: value or "" for key, value in attrs}))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script" and self.all[-1][1].get("type") != "application/json":
            self.code.append(data)


def test_hostile_text_flows_from_the_raw_file_to_the_report_unharmed(finished: Path, tmp_path: Path) -> None:
    rows = [
        {"question": f"{n} {text} ?", "steps": [f"{text} {n}", text], "answer": f"{text} {n % 3}"}
        for n in range(3)
        for text in HOSTILE
    ]
    project = make_folder(tmp_path / "hostile", canonical_splits(train=100, held_out=22) | {"curriculum": CURRICULUM})
    write_rows(project, rows)
    for name in STAGES:
        ended = stage(project, name)
        assert ended.exit_code == 0, ended.terminal
        assert not set("\x00\x07\x1b\u202e") & set(ended.terminal), "a terminal would obey"
    examples = [
        e for split in ("train", "valid", "test") for e in read_examples(project / f"data/examples/{split}.jsonl")
    ]
    wanted = [Example(row["question"], row["steps"], row["answer"]) for row in rows[: len(examples)]]
    assert [strip(example) for example in examples] == [strip(example) for example in wanted]
    predictions = (project / "outputs/cot/predictions.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    golds = [json.loads(line)["gold"] for line in predictions]
    assert golds == [example.answer for example in examples[-22:]]
    page = (project / "outputs/report/report.html").read_text(encoding="utf-8")
    assert html.escape(golds[0]) in page
    found, ours_alone = Elements(page), Elements((finished / "outputs/report/report.html").read_text("utf-8"))
    assert {*HOSTILE_ELEMENTS} & {name for name, _ in found.all} == set()
    assert [name for name, _ in found.all].count("h1") == 1
    assert [key for _, attributes in found.all for key in attributes if key.startswith("on")] == []
    links = [attributes["href"] for _, attributes in found.all if "href" in attributes]
    assert links
    assert all(re.fullmatch(r"#[\w-]+|\.\./\w+/\w+\.(csv|jsonl)", link) for link in links)
    assert "".join(found.code) == "".join(ours_alone.code) != "", "text added no script"
    markdown = (project / "outputs/report/report.md").read_text(encoding="utf-8")
    assert not re.search(r"<(script|img|svg|h1|/td)", markdown)
    assert "](javascript" not in markdown
    ours = {path.name for path in finished.rglob("*")} | {path.name for path in project.rglob("*.log")}
    strangers = {
        p.name for p in project.rglob("*") if p.name not in ours and not re.match(r"train@|state-|lock", p.name)
    }
    assert strangers == set(), "text named no file and ran no command"


def strip(example: Example) -> tuple[str, tuple[str, ...], str]:
    return example.question.strip(), tuple(step.strip() for step in example.steps), example.answer.strip()


# --- processes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("preprocess", {"data.train.file": "none.json"}, "preprocess: data/raw/none.json: no such file, wanted"),
        ("train@cot", {"runtime.device": "cuda"}, "train@cot: runtime.device: found cuda, but torch sees no GPU"),
    ],
)
def test_a_stage_that_fails_ends_with_exit_code_1_and_its_traceback_in_the_log(
    project: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    write_params(project, changes)
    script, *arguments = name.split("@")
    done = subprocess.run(
        [sys.executable, f"stages/{script}.py", *arguments],
        cwd=project,
        env=environment(project),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert "Traceback" in (project / f"outputs/logs/{name.replace('@', '-')}.log").read_text()


@pytest.fixture(scope="module")
def repository(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished project under git and DVC, as if `dvc repro` had run it."""
    folder = make_project(tmp_path_factory.mktemp("repository") / "project", PARAMS)
    for name in ("data/examples", "data/encoded", "data/raw", "outputs", ".resume"):
        shutil.copytree(finished / name, folder / name, dirs_exist_ok=True)
    run(folder, "dvc", "commit", "--force")
    commit(folder)
    assert stages_run(run(folder, "dvc", "repro")) == []
    return folder


def repro(project: Path) -> tuple[int, list[str], str]:
    done = run(project, "dvc", "repro", check=False)
    assert "Traceback" not in done.stdout + done.stderr
    return done.returncode, stages_run(done), done.stdout + done.stderr


def break_value(project: Path) -> None:
    write_params(project, {"train.batch_size": 0})


def break_key(project: Path) -> None:
    path = project / "params.yaml"
    path.write_text(path.read_text().replace("  latent_1:\n", "  1:\n"))


@pytest.mark.parametrize(
    ("break_params", "message"),
    [(break_value, "train.batch_size: found 0"), (break_key, "curriculum: key 1 is a number, wanted text")],
    ids=["a value", "a bare number as a key, which DVC drops"],
)
def test_a_mistake_in_params_costs_nothing(
    repository: Path, break_params: Callable[[Path], None], message: str
) -> None:
    before = contents(repository)
    params = (repository / "params.yaml").read_bytes()
    try:
        break_params(repository)
        exit_code, ran, said = repro(repository)
        assert (exit_code != 0, ran) == (True, ["params"])
        assert message in said
        assert (
            contents(repository).items() >= {k: v for k, v in before.items() if k != "outputs/params.checked"}.items()
        )
    finally:
        (repository / "params.yaml").write_bytes(params)
    exit_code, ran, _ = repro(repository)
    assert (exit_code, ran) == (0, [])
    assert contents(repository) == before


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("seed: 0\n", "seed: 0 # \xe9\n", "'params.yaml', is not valid utf-8"),
        ("curriculum:\n", "curriculum: [\n", "'params.yaml', YAML file structure is corrupted"),
        ("    epochs: 1\n", "    epochs: 1\n    epochs: 2\n", 'found duplicate key "epochs"'),
        ("    parent: base\n", "    parent: latent_1\n", "both a dependency and an output in stages: train@"),
        (
            "    parent: base\n",
            "",
            "failed to parse 'stages.train@cot.desc' in 'dvc.yaml': Could not find 'item.parent'",
        ),
    ],
    ids=["not UTF-8", "not YAML", "a key twice", "a cycle", "no parent"],
)
def test_what_dvc_itself_refuses_costs_nothing(repository: Path, old: str, new: str, found: str) -> None:
    before, path = contents(repository), repository / "params.yaml"
    params = path.read_text()
    try:
        path.write_text(params.replace(old, new, 1), encoding="latin-1")
        exit_code, ran, said = repro(repository)
        assert (exit_code != 0, ran) == (True, [])
        assert found in said
    finally:
        path.write_text(params)
    assert contents(repository) == before


def test_a_damaged_raw_file_costs_nothing(repository: Path) -> None:
    before, rows = contents(repository), (repository / ROWS_FILE).read_bytes()
    replace(repository / ROWS_FILE, rows[:500])
    exit_code, ran, said = repro(repository)
    assert (exit_code != 0, ran) == (True, ["preprocess"])
    assert "data/raw/rows.json:1: not valid JSON at column" in said
    replace(repository / ROWS_FILE, rows)
    exit_code, ran, _ = repro(repository)
    assert (exit_code, ran) == (0, [])
    assert contents(repository) == before


def test_what_was_damaged_between_stages_comes_back_from_the_cache(repository: Path) -> None:
    before = contents(repository)
    (repository / CHECKPOINT / "coconut.json").unlink()
    replace(repository / CHECKPOINT / "model.safetensors", b"noise")
    replace(repository / "data/encoded/train.arrow", b"noise")
    shutil.rmtree(repository / "outputs/evaluations")
    exit_code, ran, said = repro(repository)
    assert (exit_code, ran) == (0, []), said
    assert contents(repository) == before
