"""`check_method` passes the methods that came with the package, and says what is wrong with broken ones."""

from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate import Accelerator

import coconut.methods
from arms import make_method, rows_of
from coconut import check_method
from coconut.config.methods import find_method, method_names
from coconut.data.views import View
from coconut.model.feedback import Feedback
from coconut.model.passes import PassOptions
from coconut.training.objective import Objective
from tiny_models import build_tiny_model

HEAD = """
import itertools, random
from dataclasses import replace
import torch
from coconut.data.views import IGNORED
from coconut.methods import Layout, Method, Part
from coconut.methods.coconut import Coconut
"""
BROKEN = {
    "mean_of_micro_batch": (
        """
class Mine(Coconut):
    def loss(self, reading):
        part = reading.nll()
        own = sum(view.num_supervised for view in reading.views)
        return {"nll": Part(part.total / own, 1)}
""",
        "the gradient depends on how the update is cut",
    ),
    "global_draw": (
        """
class Mine(Coconut):
    def loss(self, reading):
        part = reading.nll()
        return {"nll": part, "noise": reading.mean_over_rows(torch.rand(len(reading.views)) * part.total)}
""",
        "another state of the global random generators",
    ),
    "label_on_question": (
        """
class Mine(Coconut):
    def views(self, row):
        view = super().views(row)["row"]
        return {"row": replace(view, labels=view.input_ids[:1] + view.labels[1:])}
""",
        "a label on the question",
    ),
    "state_that_is_not_saved": (
        """
_COUNT = itertools.count()
class Mine(Coconut):
    def loss(self, reading):
        return {"nll": reading.nll(weight=1.0 + next(_COUNT))}
""",
        "kept outside of the resume state",
    ),
    "draw_in_views": (
        """
class Mine(Coconut):
    def views(self, row):
        return {"row": row.view(self.layout(random.randint(0, 2)))}
""",
        "another state of the global random generators",
    ),
    "thoughts_told_from_their_row": (
        """
class Mine(Coconut):
    def edit_thoughts(self, reading, draws):
        return lambda slot, vector_BD: vector_BD * (1 + torch.arange(len(vector_BD))[:, None])
""",
        "the gradient depends on how the update is cut",
    ),
    "other_names": (
        """
class Mine(Coconut):
    def views(self, row):
        return {"rows": row.view(self.layout(1))}
""",
        "make them the same",
    ),
}


@pytest.fixture
def write_method(tmp_path: Path) -> Callable[[str, str], str]:
    """Write a method into a folder that the package looks into; return its name."""
    coconut.methods.__path__.append(str(tmp_path))

    def write(name: str, text: str) -> str:
        (tmp_path / f"{name}.py").write_text(HEAD + text, encoding="utf-8")
        find_method.cache_clear()
        return name

    yield write
    coconut.methods.__path__.remove(str(tmp_path))
    find_method.cache_clear()


@pytest.mark.parametrize("name", method_names())
def test_the_methods_of_the_package_pass(name: str) -> None:
    said: list[str] = []
    check_method(name, say=said.append)
    assert len(said) == 8


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_method_is_told_what_is_wrong(name: str, write_method: Callable[[str, str], str]) -> None:
    text, message = BROKEN[name]
    with pytest.raises(ValueError, match=message):
        check_method(write_method(name, text))


def test_noise_that_is_keyed_by_the_row_passes(write_method: Callable[[str, str], str]) -> None:
    name = write_method(
        "noisy",
        """
class Mine(Coconut):
    def edit_thoughts(self, reading, draws):
        return lambda slot, vector_BD: vector_BD + 0.3 * draws.normal(slot, vector_BD.shape[1])
""",
    )
    check_method(name)


def test_a_module_of_training_only_is_trained_resumed_and_left_out(write_method: Callable[[str, str], str]) -> None:
    name = write_method(
        "helped",
        """
class Mine(Coconut):
    reads_thoughts = ("row",)
    def build_modules(self, model, seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return torch.nn.Linear(model.config.hidden_size, 1)
    def draw_layout(self, num_steps, draw, state):
        return self.layout(self.latent_stage)
    def loss(self, reading):
        aside = reading.modules(reading.thoughts).square().mean(dim=(1, 2))
        return {"nll": reading.nll(), "aside": reading.mean_over_rows(aside, 0.5)}
""",
    )
    check_method(name)


def test_an_exception_in_a_method_names_its_file_and_line(write_method: Callable[[str, str], str]) -> None:
    name = write_method(
        "failing", "class Mine(Coconut):\n    def loss(self, reading):\n        return reading.no_such\n"
    )
    with pytest.raises(ValueError, match=r"failing\.py:10: method failing cannot compute its loss: AttributeError"):
        check_method(name)


def test_an_unknown_method_is_told_which_there_are() -> None:
    with pytest.raises(ValueError, match="did you mean codi"):
        check_method("cody")


def test_the_thoughts_of_a_reading_are_those_of_slots_alone_however_often_a_batch_is_cut(
    write_method: Callable[[str, str], str],
) -> None:
    """Sharded processes read in step: a batch is cut into as many passes as the longest one of them needs."""
    name = write_method(
        "watching",
        """
class Mine(Coconut):
    reads_thoughts = ("row",)
    def loss(self, reading):
        return {"nll": reading.nll(), "fed": reading.mean_over_rows(reading.thoughts.square().sum(dim=(1, 2)))}
""",
    )
    model = build_tiny_model("gpt2").train()
    views = [View([5, 6, 7, 62, 62, 8, 9, 10], [-100] * 6 + [9, 10], prefix_length=3, num_slots=2, num_thoughts=2)]
    found = []
    for num_passes in (0, 3, 5):
        options = PassOptions(fast=False, num_passes=num_passes)
        objective = Objective(model, Feedback(), Accelerator(cpu=True), 0, 1, make_method(name), options=options)
        found.append(objective.accumulate(rows_of(views), dict(model.named_parameters())).parts["fed"][0])
    assert found == pytest.approx([found[0]] * 3)
