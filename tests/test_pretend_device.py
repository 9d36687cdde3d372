"""The whole path on a device that is not the CPU, without a GPU; its limits stand in `pretend_device.py`."""

import json
import subprocess
import sys
from typing import Any

import pytest

from coconut.config.methods import method_names
from project import ROOT, environment

pytestmark = pytest.mark.long


def run_case(name: str) -> dict[str, Any]:
    """Run it in a process of its own: the device changes torch for good."""
    paths = {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}"}
    command = [sys.executable, "tests/pretend_cases.py", name]
    done = subprocess.run(command, cwd=ROOT, env=environment(ROOT) | paths, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_every_update_is_that_of_the_cpu() -> None:
    found = run_case("updates")
    assert len(found) >= 40
    assert {case: error for case, error in found.items() if not error < 1e-6} == {}


def test_in_bf16_only_rounding_differs() -> None:
    found = run_case("bf16")
    assert {case: error for case, error in found.items() if not error < 2e-2} == {}
    assert max(found.values()) > 1e-4, "bf16 is on: it rounds in other places than the CPU's"


def test_every_method_has_the_gradient_of_the_cpu() -> None:
    found = run_case("methods")
    assert found.keys() == set(method_names())
    assert {case: error for case, error in found.items() if not error < 1e-6} == {}


def test_a_training_that_is_stopped_goes_on_to_the_same_bytes() -> None:
    found = run_case("training")
    assert found["equal bytes"]
    assert found["equal history"]
    assert found["devices"] == ["pretend"], "weights and moments are on the device again"
    assert found["best is on"] == ["cpu"], "the best epoch's copy takes none of its memory"
    assert "loss nan, gradient norm nan, wanted finite numbers" in found["not finite"]


def test_out_of_memory_is_known_by_each_of_cudas_texts() -> None:
    found = run_case("memory")
    assert len(found) == 4
    assert max(found.values()) < 1e-6, "the same gradient, in smaller pieces"


def test_texts_and_samples_are_those_of_the_cpu() -> None:
    found = run_case("generation")
    assert [case for case, is_equal in found.items() if not is_equal] == []


def test_a_checkpoint_that_is_opened_there_thinks_and_is_evaluated_as_on_the_cpu() -> None:
    found = run_case("opened")
    assert found == dict.fromkeys(("texts", "thoughts", "losses", "evaluated answers"), True)


def test_an_update_waits_for_the_device_once_and_a_token_once() -> None:
    """Once for loss and norm together, however it is cut. On the plain way transformers' own masks ask more."""
    found = run_case("waiting")
    updates = {case: waits for case, waits in found.items() if case.startswith("update")}
    assert len(updates) == 8
    assert {case: waits for case, waits in updates.items() if sum(waits.values()) != 1} == {}
    assert found["generation: rounds=0"] == {"first two tokens": 2, "five more": 5}
    assert found["generation: rounds=2"] == {"first two tokens": 2, "five more": 5}


BUDGET = {
    "gpt2, fp32": {"thought": (29, 373), "token": (12, 153)},
    "gpt2, bf16": {"thought": (35, 445), "token": (14, 178)},
    "qwen2, fp32": {"thought": (54, 1325), "token": (22, 544)},
    "qwen2, bf16": {"thought": (68, 1661), "token": (26, 641)},
}
"""Operations of one more thought, forward and backward, and of one more token: of one layer, and of the models as they
are published."""


def test_a_thought_and_a_token_stay_within_their_operations() -> None:
    """Where an accelerator is bound by launches they are what thoughts cost; lower a number that you improve."""
    found = run_case("launches")
    assert found.keys() == BUDGET.keys()
    for case, budget in BUDGET.items():
        for what, wanted in budget.items():
            for number, limit in zip(found[case][what], wanted, strict=True):
                assert 0 < number <= limit, (case, what, found[case][what])


def test_six_faults_that_a_cpu_hides_are_caught() -> None:
    assert run_case("faults") == dict.fromkeys(
        (
            "a batch that stays on the host",
            "a part of it that does",
            "a thought from the host",
            "a thought without gradient",
            "positions of other columns",
            "moments that stay on the host",
        ),
        True,
    )
