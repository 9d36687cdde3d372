"""Strict loading of params.yaml: every mistake is one message that names the key."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from coconut.config.params import REMOVED, load_params, parse_params
from coconut.config.strict import parse_yaml
from coconut.recipes import whole_params

SHIPPED = whole_params("arithmetic", Path(__file__).parents[1])


def shipped_tree() -> dict[str, Any]:
    """Return the values of a shipped file, as a copy that may be changed."""
    tree: dict[str, Any] = parse_yaml(SHIPPED, "arithmetic")
    return tree


@pytest.fixture
def tree() -> dict[str, Any]:
    return shipped_tree()


def put(tree: dict[str, Any], dotted_key: Any, value: Any) -> None:
    *path, last = dotted_key.split(".") if isinstance(dotted_key, str) else [dotted_key]
    for key in path:
        tree = tree[key]
    tree[last] = value


def test_the_shipped_file_loads(tree: dict[str, Any]) -> None:
    params = parse_params(tree)
    assert list(params.curriculum) == ["cot", "latent_1", "latent_2", "latent_3", "latent_4", "no_cot"]
    assert params.curriculum["latent_4"].train.schedule == "linear"
    assert params.curriculum["latent_3"].train.schedule == "constant"


@pytest.mark.parametrize("written", [1e-5, "1e-5", "1e-05", "0.00001"])
def test_a_number_is_a_number_however_it_is_written(tree: dict[str, Any], written: Any) -> None:
    tree["curriculum"]["cot"]["lr"] = written
    assert parse_params(tree).curriculum["cot"].lr == 1e-5


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.batchsize", 64, "train.batchsize: unknown key; known here: batch_size"),
        ("nonsense", 1, "nonsense: unknown key"),
        ("curriculum.cot.learning_rate", 1, "curriculum.cot.learning_rate: unknown key"),
        ("train.batch_size", 0, "train.batch_size: found 0, wanted at least 1"),
        ("curriculum.cot.batch_size", 0, "curriculum.cot.batch_size: found 0, wanted at least 1"),
        ("train.batch_size", "64", "train.batch_size: found '64' \\(text\\), wanted a whole number"),
        ("train.batch_size", 1.5, "train.batch_size: found 1.5 \\(a number\\), wanted a whole number"),
        ("train.batch_size", True, "train.batch_size: found True \\(true/false\\), wanted a whole number"),
        ("latent.markers", "yes", "latent.markers: found 'yes' \\(text\\), wanted true or false"),
        ("latent.uniform_prob", 1.2, "latent.uniform_prob: found 1.2, wanted between 0 and 1"),
        ("train.precision", "fp16", "train.precision: found 'fp16', wanted one of fp32, tf32, bf16, bf16-weights"),
        ("train.weight_decay", "nan", "train.weight_decay: found 'nan' \\(text\\), wanted a finite number"),
        ("curriculum.cot.lr", "fast", "curriculum.cot.lr: found 'fast' \\(text\\), wanted a finite number"),
        ("curriculum.cot.method", "cott", "curriculum.cot.method: found 'cott', wanted one of coconut, codi, cot"),
        (
            "curriculum.latent_1.parent",
            "nobody",
            "curriculum.latent_1.parent: found 'nobody', wanted 'base' or an entry",
        ),
        ("curriculum.cot.parent", "latent_4", "a cycle, cot <- latent_4 <- latent_3 <- latent_2 <- latent_1 <- cot"),
        ("curriculum.latent_2.latent_stage", 0, "curriculum.latent_2.latent_stage: found 0, wanted at least 1"),
        ("curriculum.cot.latent_stage", 2, "curriculum.cot.latent_stage: found 2, wanted 0 with method cot"),
        (
            "evaluate.expected",
            {"tset": 0.5},
            "evaluate.expected.tset: no such test set, wanted one of data.tests: test",
        ),
        ("curriculum", None, "curriculum: found null, wanted a mapping"),
        ("train", [1], "train: found a list, wanted a mapping"),
        ("data.generator", None, "data.train.format: found 'generated', but data.generator is none"),
        ("data.generator.task", "chess", "data.generator.task: found 'chess', wanted one of chained_arithmetic"),
        ("data.generator.hops", 3, "data.generator.hops: unknown key; known here: task, num_operations, modulus"),
        ("data.train.format", "gsm8k", "data.train: wanted exactly one of file"),
        ("data.train.file", "a.txt", "data.train: found a file or hub beside format 'generated'"),
        (
            "data.tests.test",
            {"format": "gsm8k", "file": "../a"},
            "data.tests.test.file: found '../a', wanted a path below data.raw",
        ),
        (
            "data.tests.test",
            {"format": "gsm8k", "file": "/a"},
            "data.tests.test.file: found '/a', wanted a path below data.raw",
        ),
        ("data.generator.task", ["chess"], "data.generator.task: found \\['chess'\\], wanted one of"),
        ("train.beta2", 1, "train.beta2: found 1.0, wanted between 0 and 0.999999"),
        ("train.lr_is", 1, "train.lr_is: unknown key"),
        ("train.validate_examples", 0, "train.validate_examples: found 0, wanted at least 1"),
        ("seed", 10**30, "seed: found 1000000000000000000000000000000, wanted between 0 and"),
        ("seed", -1, "seed: found -1, wanted between 0 and"),
        (
            "data.tests.test",
            {"format": "gsm8k", "hub": "openai/gsm8k"},
            "data.tests.test.hub_split: missing; name the split",
        ),
        ("data.train.rows", None, "data.train.rows: found all, wanted the number of examples"),
        ("data.raw_dir", 5, "data.raw_dir: found 5 \\(a number\\), wanted text"),
        ("data.raw_dir", " ", "data.raw_dir: found an empty text, wanted a folder, such as data/raw"),
        ("data.generator.modulus", 10**13, "data.generator.modulus: found 10000000000000, wanted between 3 and 1e.12"),
        (
            "data.generator.num_operations",
            10**9,
            "data.generator.num_operations: found 1000000000, wanted between 1 and",
        ),
        (
            "data.generator",
            {"task": "multiplication", "num_digits": 10**6},
            "data.generator.num_digits: found 1000000, wanted between 1 and 1000",
        ),
        ("runtime.micro_batch", 0, "runtime.micro_batch: found 0, wanted one of auto; or .*wanted at least 1"),
        ("train.weight_decay", float("nan"), "train.weight_decay: found nan \\(a number\\), wanted a finite number"),
        ("train.max_grad_norm", float("inf"), "train.max_grad_norm: found inf .*, wanted a finite number, or none"),
        ("train.weight_decay", 10**400, r"train.weight_decay: found 1(0{56})\.\.\. .*wanted a finite number"),
        ("train.weight_decay", True, "train.weight_decay: found True .true/false., wanted a finite number"),
        ("curriculum.cot.epochs", 1e3, "curriculum.cot.epochs: found 1000.0 .*; write it without a point .*: 1000"),
        ("curriculum.cot.epochs", 10**30, "curriculum.cot.epochs: found 10+, wanted at most 1e.09"),
        ("runtime.num_workers", 10**6, "runtime.num_workers: found 1000000, wanted between 1 and 1024, or auto"),
        ("data.max_train", "al", "data.max_train: found 'al' .text., wanted a whole number, or all"),
        ("data.max_train", 0, "data.max_train: found 0, wanted at least 1, or all"),
        ("runtime.fast", "yes", "runtime.fast: found 'yes' .text., wanted true or false"),
        ("model", 5, "model: found 5 .a number., wanted text; quote it if it is text"),
        ("latent.thought", ["hidden"], r"latent.thought: found \['hidden'\] .a list., wanted text; quote it"),
        (1, 5, "1: unknown key; known here: model"),
        ("a\x1b[31m", 5, r"'a\\x1b\[31m': unknown key; known here: model"),
        ("train.a\x1b[31m", 5, r"train.'a\\x1b\[31m': unknown key; known here: batch_size"),
        ("curriculum.a\x1b[31m", {}, r"curriculum.'a\\x1b\[31m': not a usable name"),
    ],
)
def test_a_mistake_is_one_message_that_names_the_key(tree: dict[str, Any], key: Any, value: Any, message: str) -> None:
    put(tree, key, value)
    with pytest.raises(ValueError, match=message):
        parse_params(tree)


@pytest.mark.parametrize("key", REMOVED)
def test_a_key_that_is_no_more_is_refused_in_the_work_tree_but_not_in_an_experiment_of_then(
    tree: dict[str, Any], key: str, tmp_path: Path
) -> None:
    now = parse_params(tree)
    put(tree, key, True)
    assert parse_params(tree) == now
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"params\.yaml: {re.escape(key)}: removed, .*; take it out$"):
        load_params(path)


@pytest.mark.parametrize(
    ("key", "value", "meant"),
    [
        ("train.batchsize", 64, "batch_size"),
        ("train.Batch-Size", 64, "batch_size"),
        ("latent.uniform_probability", 0.1, "uniform_prob"),
        ("curiculum", {}, "curriculum"),
        ("curriculum.cot.warmup_update", 5, "warmup_updates"),
        ("curriculum.latent_2.parent", "latent1", "latent_1"),
        ("curriculum.cot.parent", "Base", "base"),
        ("curriculum.cot.method", "COCONUT", "coconut"),
        ("data.train.format", "gsm8k-aug", "gsm8k_aug"),
        ("data.generator.task", "chained_arithmetics", "chained_arithmetic"),
        ("data.generator.num_operation", 4, "num_operations"),
        ("train.precision", "bf-16", "bf16"),
        ("train.schedule", "cosin", "cosine"),
        ("latent.thought", "hiden[-1]", "hidden[LAYER]"),
        ("latent.thought", "normalized", "normalised"),
    ],
)
def test_a_near_miss_is_told_what_was_meant(tree: dict[str, Any], key: str, value: Any, meant: str) -> None:
    put(tree, key, value)
    with pytest.raises(ValueError, match=f"; did you mean {re.escape(meant)}\\?$"):
        parse_params(tree)


@pytest.mark.parametrize(
    ("key", "word", "value"),
    [
        ("data.max_train", "all", 7),
        ("train.validate_examples", "all", 7),
        ("evaluate.max_examples", "all", 7),
        ("train.max_grad_norm", "none", 0.5),
        ("runtime.threads", "auto", 7),
        ("runtime.num_workers", "auto", 7),
        ("revision", "main", "v1.0"),
    ],
)
def test_a_word_stands_for_none_and_null_means_the_same(
    tree: dict[str, Any], key: str, word: str, value: int | float | str
) -> None:
    found = []
    for written in (word, None, value):
        put(tree, key, written)
        section: Any = parse_params(tree)
        for name in key.split("."):
            section = getattr(section, name)
        found.append(section)
    assert found == [None, None, value]


FILE = {"format": "canonical", "file": "x.jsonl"}
HUB = {"format": "gsm8k", "hub_split": "test"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"file": "data/raw/x.jsonl"}, r"file: found .*, which begins with data.raw_dir, .*; did you mean x.jsonl\?"),
        ({"file": "./data/raw/a/x.jsonl"}, r"file: found .*, which begins with .*; did you mean a/x.jsonl\?"),
        ({"file": "{here}/data/raw/x.jsonl"}, r"file: found .*, which begins with .*; did you mean x.jsonl\?"),
        ({"file": "{here}/x.jsonl"}, "file: found .*, wanted a path below data.raw_dir, which DVC watches"),
        ({"file": "a/../../x.jsonl"}, "file: found .*, wanted a path below data.raw_dir, which DVC watches"),
        (
            {"hub": "sets/gsm8k"},
            "hub: found 'sets/gsm8k', which is a file or folder here, .* DVC watches only",
        ),
        ({"hub": "{here}/sets/gsm8k"}, "hub: found .*, which is a file or folder here"),
        ({"hub": "script.py"}, "hub: found 'script.py', which is a file or folder here"),
        ({"hub": "../elsewhere"}, "hub: found '../elsewhere', wanted the id of a data set on the hub, such as openai"),
        ({"hub": "~/sets"}, "hub: found '~/sets', wanted the id of a data set on the hub"),
        ({"hub": "/no/such/folder"}, "hub: found '/no/such/folder', wanted the id of a data set on the hub"),
        ({"hub": "https://huggingface.co/datasets/openai/gsm8k"}, "hub: found .*, wanted the id of a data set on the"),
        ({"hub": ""}, "hub: found '', wanted the id of a data set"),
        ({"hub": "x" * 5000}, "hub: found 'x+...', wanted the id of a data set"),
        ({"hub": "~nobody-here/sets"}, "hub: found '~nobody-here/sets', wanted the id of a data set"),
        ({"hub": "a\0b"}, r"hub: found 'a\\x00b', wanted the id of a data set"),
        ({"file": "data/raw/" + "x" * 5000}, "file: found 'data/raw/x+...', which begins with data.raw_dir"),
    ],
)
def test_data_that_dvc_would_not_watch_is_refused(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: dict[str, str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sets/gsm8k").mkdir(parents=True)
    (tmp_path / "script.py").touch()
    source = {key: value.replace("{here}", str(tmp_path)) for key, value in source.items()}
    tree["data"]["tests"]["test"] = source | ({"format": "canonical"} if "file" in source else HUB)
    with pytest.raises(ValueError, match=f"^data.tests.test.{message}"):
        parse_params(tree)


def test_a_folder_below_raw_dir_may_have_its_name(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/raw/data/raw").mkdir(parents=True)
    (tmp_path / "data/raw/data/raw/x.jsonl").touch()
    tree["data"]["tests"]["test"] = {"format": "canonical", "file": "data/raw/x.jsonl"}
    assert parse_params(tree).data.tests["test"].file == "data/raw/x.jsonl"


@pytest.mark.parametrize("hub", ["gsm8k", "openai/gsm8k", "whynlp/gsm8k-aug", "a.b/c_d-1"])
def test_an_id_of_the_hub_is_taken(tree: dict[str, Any], hub: str) -> None:
    tree["data"]["tests"]["test"] = HUB | {"hub": hub}
    assert parse_params(tree).data.tests["test"].hub == hub


def test_any_file_is_below_the_repositorys_own_folder(tree: dict[str, Any]) -> None:
    tree["data"]["raw_dir"] = "."
    tree["data"]["tests"]["test"] = FILE
    assert parse_params(tree).data.tests["test"].file == "x.jsonl"


@pytest.mark.parametrize("key", ["model", "seed", "train", "latent", "curriculum", "train.beta1", "curriculum.cot.lr"])
def test_a_missing_key_is_named(tree: dict[str, Any], key: str) -> None:
    *path, last = key.split(".")
    section = tree
    for name in path:
        section = section[name]
    del section[last]
    with pytest.raises(ValueError, match=f"^{key}: missing"):
        parse_params(tree)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (1, "key 1 is a number, wanted text .DVC silently drops such entries.; quote it"),
        (True, "key True is true/false, wanted text"),
        ("1", "curriculum.1: not a usable name"),
        ("../up", "not a usable name"),
        ("base", "not a usable name"),
        (
            "Report",
            "curriculum.Report: not a usable name; .* not base, report, logs, code, evaluations, probes or overnight",
        ),
        ("COT", "curriculum.COT: differs from cot only in upper and lower case, wanted another name"),
        ("a b", "not a usable name"),
    ],
)
def test_a_curriculum_key_that_dvc_or_the_disk_would_trip_over_is_refused(
    tree: dict[str, Any], name: Any, message: str
) -> None:
    tree["curriculum"][name] = tree["curriculum"]["cot"]
    with pytest.raises(ValueError, match=message):
        parse_params(tree)


def test_an_entry_may_override_any_value_of_the_method_and_of_training(tree: dict[str, Any]) -> None:
    tree["curriculum"]["latent_1"] |= {"markers": True, "batch_size": 8, "uniform_prob": 0.0}
    entries = parse_params(tree).curriculum
    assert (entries["latent_1"].latent.markers, entries["latent_1"].train.batch_size) == (True, 8)
    assert (entries["latent_2"].latent.markers, entries["latent_2"].train.batch_size) == (False, 64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "not UTF-8 at byte 0"),
        (b"a: [1,", "not valid YAML"),
        (b"- 1", "the file: found a list, wanted a mapping"),
        (b"", "the file: found null, wanted a mapping"),
        (b"[" * 20_000, "line 1: nested deeper than 100 levels, wanted fewer; restore the file"),
        (b"a: 1\nseed: " + b"1" * 5000, r"line 2: found '1{37}\.\.\.', which is out of range, wanted a smaller number"),
        (b"a: 2026-13-01", "line 1: found the date '2026-13-01', wanted a number or text"),
        (b"a: {lr: 1,\n  lr: 2}", "line 2: key 'lr' stands already on line 1 of the same mapping, wanted it once"),
        (b"a: 1\nb: 2\na: 3", "line 3: key 'a' stands already on line 1 of the same mapping, wanted it once"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}: {message}"):
        load_params(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file; run from the repository's top folder"):
        load_params(tmp_path / "params.yaml")


def test_a_folder_in_place_of_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^{tmp_path}: found a folder, wanted a YAML file; name one in it$"):
        load_params(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    lr: 2.0e-3\n", "    lr: 2.0e-3\n    lr: 5\n", r"line \d+: key 'lr' stands already on line \d+ of"),
        ("  latent_1:", "  cot:", r"line \d+: key 'cot' stands already on line \d+ of"),
        ("encode:", "data:\n\nencode:", r"line \d+: key 'data' stands already on line \d+ of"),
    ],
    ids=["value", "entry", "section"],
)
def test_a_key_that_stands_twice_is_refused_where_yaml_would_take_the_last(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(SHIPPED.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"params\.yaml: {message}"):
        load_params(path)


def test_a_key_may_stand_in_two_mappings_and_an_alias_be_used_twice(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(
        SHIPPED.replace("  train:\n", "  train: &rows\n").replace(
            "  valid:\n    format: generated\n    rows: 1000\n", "  valid: *rows\n"
        )
    )
    data = load_params(path).data
    assert data.valid == data.train
