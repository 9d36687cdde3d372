"""Fixtures shared by all tests. Every test runs offline and on one thread."""

import gc
import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from loguru import logger

# Before any import of torch or transformers: many small operations are slower on two threads, and
# a test that asks the hub for something must fail at once instead of waiting.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# DVC runs stages by it. A person's bash would hide what goes wrong where cron or a service starts the night.
os.environ["SHELL"] = "/bin/sh"
# `make test` hands these on: a make that a test starts would print "Entering directory", and take its targets' options.
for _name in ("MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS", "GNUMAKEFLAGS"):
    os.environ.pop(_name, None)

# What a test starts inherits this. A shell's background jobs ignore SIGINT, and some supervisors block
# SIGTERM: tests that send them would wait for nothing.
for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)
if hasattr(signal, "pthread_sigmask"):
    signal.pthread_sigmask(signal.SIG_SETMASK, ())

if TYPE_CHECKING:
    from transformers import PreTrainedModel

gc.disable()  # Until all tests are collected.


def pytest_collection_finish() -> None:
    """Leave thousands of tests and what they have imported out of every later garbage collection."""
    gc.enable()
    gc.collect()
    gc.freeze()


def _build(family: str) -> "PreTrainedModel":
    # Imported late: tests that need no model start seconds earlier.
    from tiny_models import build_tiny_model

    return build_tiny_model(family)


@pytest.fixture
def tiny_gpt2() -> "PreTrainedModel":
    return _build("gpt2")


@pytest.fixture
def tiny_llama() -> "PreTrainedModel":
    return _build("llama")


@pytest.fixture
def tiny_qwen2() -> "PreTrainedModel":
    return _build("qwen2")


@pytest.fixture(params=["gpt2", "llama", pytest.param("qwen2", marks=pytest.mark.slow)])
def tiny_lm(request: pytest.FixtureRequest) -> "PreTrainedModel":
    """Each of three families in turn; what the third has, one of the first two has too."""
    return _build(request.param)


@pytest.fixture
def log_lines() -> Iterator[list[str]]:
    """What is logged from WARNING on while the test runs, one message an entry."""
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(str(message).rstrip("\n")), level="WARNING", format="{message}")
    yield lines
    logger.remove(sink)
