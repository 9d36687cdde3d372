"""What a stage's processes leave for `coconut overnight` and `coconut status`, and how damage to it is read."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from loguru import logger

from coconut.files import system_error
from coconut.pipeline.events import Run, events_path, last_run
from coconut.pipeline.failures import describe
from coconut.pipeline.stage import run_stage

STAGE = "train@cot"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_here(main: Callable[[], None]) -> Run:
    """Run a stage to its end, and return what its events say."""
    try:
        run_stage(main, STAGE)
    except BaseException:  # noqa: BLE001 - whatever ends it: what counts is what it leaves
        pass
    finally:
        logger.remove()
    run = last_run(STAGE, Path())
    assert run is not None
    assert run.pid == os.getpid()
    return run


def fail_with(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


@pytest.mark.usefixtures("here")
def test_a_stage_says_that_it_began_was_resumed_and_ended() -> None:
    def main() -> None:
        seen.append(last_run(STAGE, Path()))
        logger.bind(event="resumed", update=7).info("resumed at update 7")
        seen.append(last_run(STAGE, Path()))

    seen: list[Run | None] = []
    run = run_here(main)
    assert [(one.end, one.resumed_at) for one in seen if one] == [("", None), ("", 7)]
    assert (run.end, run.resumed_at, run.message) == ("ended", 7, "train@cot ended")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("error", "end", "message", "can_pass"),
    [
        (ValueError("params.yaml: seed: a mistake"), "failed", "train@cot: params.yaml: seed: a mistake", False),
        (system_error(28, "outputs: full"), "failed", "train@cot: outputs: full", True),
        (KeyError("a defect"), "failed", "train@cot: KeyError: 'a defect'", False),
        (SystemExit(143), "stopped", "train@cot stopped: SystemExit(143)", False),
        (KeyboardInterrupt(), "stopped", "train@cot stopped: KeyboardInterrupt()", False),
    ],
    ids=["mistake", "full disk", "defect", "SIGTERM", "SIGINT"],
)
def test_a_stage_says_how_it_ended(error: BaseException, end: str, message: str, can_pass: bool) -> None:
    run = run_here(fail_with(error))
    assert (run.end, run.message, run.can_pass) == (end, message, can_pass)


@pytest.mark.usefixtures("here")
def test_what_a_killed_process_left_is_followed_by_the_next_one() -> None:
    code = (
        "import os; from coconut.pipeline.stage import run_stage\n"
        "run_stage(lambda: os.kill(os.getpid(), 9), 'train@cot')"
    )
    killed = subprocess.Popen([sys.executable, "-c", code])
    assert killed.wait() == -9
    run = last_run(STAGE, Path())
    assert run is not None
    assert (run.pid, run.end) == (killed.pid, "")
    assert run_here(lambda: None).end == "ended"


@pytest.mark.usefixtures("here")
def test_a_line_that_was_cut_off_hides_no_later_event() -> None:
    run_here(lambda: None)
    path = events_path(STAGE)
    path.write_bytes(path.read_bytes()[:-20])
    assert run_here(fail_with(ValueError("x"))).message == "train@cot: x"


@pytest.mark.usefixtures("here")
def test_no_damage_gives_anything_but_a_run_or_nothing() -> None:
    run_here(fail_with(ValueError("x")))
    path, draw = events_path(STAGE), random.Random(0)
    whole = path.read_bytes()
    for _ in range(500):
        content = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(content[: draw.randint(0, len(content))])
        run = last_run(STAGE, Path())
        assert run is None or (run.pid > 0 and isinstance(run.message, str))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("value", [None, "x", 1e400, -1, [], {}], ids=repr)
@pytest.mark.parametrize("key", ["event", "pid", "time", "message", "update"])
def test_an_event_with_a_value_of_another_kind_is_not_read(key: str, value: object) -> None:
    event = {"event": "begun", "pid": 7, "time": 1e9, "message": "", "update": 1}
    events_path(STAGE).parent.mkdir(parents=True)
    events_path(STAGE).write_text(json.dumps(event | {key: value}))
    run = last_run(STAGE, Path())
    assert run is None or (run.pid, run.begun_at, run.message, run.resumed_at) == (7, 1e9, "", None)


def test_events_and_logs_that_cannot_be_written_cost_one_warning(here: Path) -> None:
    """Both are links to a device that is always full."""
    (here / "outputs/logs").mkdir(parents=True)
    for name in ("train-cot.log", "train-cot.events.jsonl"):
        (here / "outputs/logs" / name).symlink_to("/dev/full")
    code = (
        "from loguru import logger; from coconut.pipeline.stage import run_stage\n"
        "run_stage(lambda: [logger.info('line {}', n) for n in range(50)], 'train@cot')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    assert len([line for line in lines if "line" in line and "INFO" in line]) == 50
    assert [line for line in lines if "INFO" not in line] == [
        "WARNING: outputs/logs/train-cot.log: the log file lacks lines from here on:"
        " No space left on device; make room on its disk and run `dvc repro` again"
    ]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("junk", ["a file in place of the folder", "a folder in place of the file"])
def test_junk_in_place_of_the_logs_does_not_end_the_stage(junk: str) -> None:
    if junk == "a file in place of the folder":
        Path("outputs").write_text("")
    else:
        (events_path(STAGE) / "below").mkdir(parents=True)
    ran = []
    run_stage(lambda: ran.append(1), STAGE)
    logger.remove()
    assert ran == [1]
    assert last_run(STAGE, Path()) is None


# --- one message for what a user can cure ---


@pytest.mark.parametrize(
    ("error", "cure"),
    [
        (MemoryError(), "set runtime.micro_batch or runtime.eval_batch lower"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "set runtime.micro_batch"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), "micro_batch"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "the GPU or its driver failed"),
        (RuntimeError("unable to open shared memory object </torch_1> in read-write mode"), "/dev/shm"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "runtime.num_workers lower"),
    ],
)
def test_a_failure_of_the_machine_is_one_message_with_the_cure(error: BaseException, cure: str) -> None:
    message = describe(error)
    assert message is not None
    assert cure in message
    assert "\n" not in message


def test_an_error_in_a_models_own_code_names_its_line() -> None:
    """At widths that do not fit: what torch says of it names neither model nor place."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=11))
    with pytest.raises(RuntimeError) as raised:
        model(inputs_embeds=torch.zeros(1, 2, 7))
    message = describe(raised.value)
    assert message is not None
    assert message.startswith("the model's own code failed at transformers/models/llama/modeling_llama.py:")
    assert "set runtime.fast: false" in message


def test_a_defect_of_ours_keeps_its_traceback() -> None:
    assert describe(RuntimeError("dictionary changed size during iteration")) is None
    assert describe(KeyError("x")) is None
