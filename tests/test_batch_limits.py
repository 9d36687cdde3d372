"""What fits into memory, left behind by processes that could not go on, and heeded by those that begin again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coconut.config.params import load_params
from coconut.config.schema import RuntimeConfig
from coconut.pipeline.batch_limits import BatchLimits, note_batch_limits
from coconut.pipeline.resume import ResumeStore
from coconut.ranks import BatchTooLargeError, RankLostError, is_lost_rank
from project import ROOT


@pytest.fixture
def runtime() -> RuntimeConfig:
    return replace(load_params(ROOT / "params.yaml").runtime, micro_batch="auto", eval_batch=64)


def test_nothing_known_changes_nothing(runtime: RuntimeConfig, tmp_path: Path) -> None:
    assert BatchLimits.read(tmp_path / "missing") == BatchLimits.read(tmp_path) == BatchLimits()
    assert BatchLimits().limit(runtime, 16) == runtime


def test_the_least_that_any_process_has_learned_counts(runtime: RuntimeConfig, tmp_path: Path) -> None:
    note_batch_limits(tmp_path, 0, BatchTooLargeError("micro_batch", 16))
    note_batch_limits(tmp_path, 1, BatchTooLargeError("micro_batch", 8))
    note_batch_limits(tmp_path, 1, BatchTooLargeError("eval_batch", 32))
    assert BatchLimits.read(tmp_path) == BatchLimits(4, 16, 3)
    limited = BatchLimits.read(tmp_path).limit(runtime, 16)
    assert (limited.micro_batch, limited.eval_batch) == (4, 16)
    assert BatchLimits.read(tmp_path).limit(replace(runtime, micro_batch=2, eval_batch=8), 16) == replace(
        runtime, micro_batch=2, eval_batch=8
    ), "less was asked for"


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"micro_batch": 4}', '{"micro_batch": true, "eval_batch": -1, "num_retries": 0}'],
)
def test_a_damaged_file_counts_as_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "batch-0.json").write_text(content)
    (tmp_path / "batch-1.json").mkdir()
    assert BatchLimits.read(tmp_path) == BatchLimits()
    note_batch_limits(tmp_path, 0, BatchTooLargeError("eval_batch", 2))
    assert BatchLimits.read(tmp_path) == BatchLimits(None, 1, 1)


@given(st.binary(max_size=80))
def test_no_bytes_are_a_crash(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("room")
    (folder / "batch-0.json").write_bytes(content)
    assert BatchLimits.read(folder) == BatchLimits()


def test_it_stays_where_a_trainer_tidies_up(tmp_path: Path) -> None:
    folder = ResumeStore.folder_of("train@cot", "f" * 64, tmp_path)
    folder.mkdir(parents=True)
    note_batch_limits(folder, 3, BatchTooLargeError("micro_batch", 2))
    (folder / "batch-3.json.tmp").write_text("half")
    with ResumeStore.open("train@cot", "f" * 64, None, root=tmp_path):  # type: ignore[arg-type]
        assert json.loads((folder / "batch-3.json").read_text())["micro_batch"] == 1
        assert not (folder / "batch-3.json.tmp").exists()


def test_a_lost_process_is_known_in_whatever_its_error_is_wrapped() -> None:
    def wrapped(error: Exception) -> Exception:
        outer = ValueError("rows 1, 2: the model failed")
        outer.__cause__ = error
        return outer

    gloo = RuntimeError("[/a/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:53967")
    for lost in (RankLostError("x"), gloo, wrapped(gloo), wrapped(wrapped(gloo))):
        assert is_lost_rank(lost)
    for other in (None, RuntimeError("x"), ValueError("gloo"), wrapped(RuntimeError("CUDA error"))):
        assert not is_lost_rank(other)
