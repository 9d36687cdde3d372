"""Each arm's view, ids in and ids out, in training and in generation.

One example: question `1 2`, steps `10 11`, `20`, `30 31 32`, answer `7 0`; markers 90 (start), 91 (end), 92 (latent).
"""

import pytest

from arms import layout_of
from coconut.config.schema import LatentConfig
from coconut.data.layouts import ALL_STEPS, Layout
from coconut.data.views import MarkerIds, View, build_prompt, build_view

QUESTION, STEPS, ANSWER = [1, 2], [[10, 11], [20], [30, 31, 32]], [7, 0]
MARKERS = MarkerIds(start=90, end=91, latent=92)
LATENT = LatentConfig(
    c_thought=2,
    max_latent_stage=2,
    pad_latent_to_max=True,
    markers=True,
    uniform_prob=0.0,
    thought="hidden[-1]",
    parallel_iterations=0,
)
BARE = LatentConfig(2, 2, True, False, 0.0, "hidden[-1]", 0)

CASES: dict[str, tuple[str, int, LatentConfig, list[int], int, int]] = {
    # name: method, stage, switches, training ids, columns before the first label, thoughts
    "cot": ("cot", 0, LATENT, [1, 2, 10, 11, 20, 30, 31, 32, 7, 0], 2, 0),
    "no_cot": ("no_cot", 0, LATENT, [1, 2, 7, 0], 2, 0),
    "coconut-0": ("coconut", 0, LATENT, [1, 2, 90, 91, 10, 11, 20, 30, 31, 32, 7, 0], 4, 0),
    "coconut-1": ("coconut", 1, LATENT, [1, 2, 90, 92, 92, 91, 20, 30, 31, 32, 7, 0], 6, 2),
    "coconut-2": ("coconut", 2, LATENT, [1, 2, 90, 92, 92, 92, 92, 91, 30, 31, 32, 7, 0], 8, 4),
    "coconut-final": ("coconut", 3, LATENT, [1, 2, 90, 92, 92, 92, 92, 91, 7, 0], 8, 4),
    "coconut-bare-0": ("coconut", 0, BARE, [1, 2, 10, 11, 20, 30, 31, 32, 7, 0], 2, 0),
    "coconut-bare-1": ("coconut", 1, BARE, [1, 2, 92, 92, 20, 30, 31, 32, 7, 0], 4, 2),
    "coconut-bare-final": ("coconut", 3, BARE, [1, 2, 92, 92, 92, 92, 7, 0], 6, 4),
    "no_thoughts-1": ("no_thoughts", 1, LATENT, [1, 2, 20, 30, 31, 32, 7, 0], 2, 0),
    "no_thoughts-final": ("no_thoughts", 3, LATENT, [1, 2, 7, 0], 2, 0),
    "pause": ("pause", 0, LATENT, [1, 2, 90, 92, 92, 92, 92, 91, 7, 0], 8, 0),
    "pause-bare": ("pause", 0, BARE, [1, 2, 92, 92, 92, 92, 7, 0], 6, 0),
    "pause_as_thought-1": ("pause_as_thought", 1, LATENT, [1, 2, 90, 92, 92, 91, 20, 30, 31, 32, 7, 0], 6, 0),
    "pause_as_thought-final": ("pause_as_thought", 3, BARE, [1, 2, 92, 92, 92, 92, 7, 0], 6, 0),
}


@pytest.mark.parametrize("arm", CASES)
def test_the_training_view_of_an_arm(arm: str) -> None:
    method, stage, latent, ids, num_prompt, num_thoughts = CASES[arm]
    layout = layout_of(method, stage, latent, num_steps=3)
    view = build_view(QUESTION, STEPS, ANSWER, layout=layout, markers=MARKERS)
    assert view.input_ids == ids
    assert view.labels == [-100] * num_prompt + ids[num_prompt:]
    assert view.num_thoughts == num_thoughts
    assert view.num_slots == ids.count(92)
    assert view.num_supervised == len(ids) - num_prompt


@pytest.mark.parametrize("arm", CASES)
def test_the_prompt_of_an_arm_is_its_view_up_to_the_first_label(arm: str) -> None:
    method, stage, latent, ids, num_prompt, num_thoughts = CASES[arm]
    prompt = build_prompt(QUESTION, layout=layout_of(method, stage, latent), markers=MARKERS)
    assert prompt.input_ids == ids[:num_prompt]
    assert prompt.labels == [-100] * num_prompt
    assert prompt.num_thoughts == num_thoughts
    assert prompt.prefix_length == 2 + (90 in ids)


@pytest.mark.parametrize(
    ("num_removed", "ids"),
    [
        (0, [1, 2, 10, 11, 20, 30, 31, 32, 7, 0]),
        (1, [1, 2, 11, 20, 30, 31, 32, 7, 0]),
        (2, [1, 2, 20, 30, 31, 32, 7, 0]),
        (4, [1, 2, 31, 32, 7, 0]),
        (6, [1, 2, 7, 0]),
        (7, [1, 2, 7, 0]),
        (1_000_000, [1, 2, 7, 0]),
    ],
)
def test_icot_removes_reasoning_tokens_from_the_left(num_removed: int, ids: list[int]) -> None:
    layout = layout_of("icot", 0, LATENT, state={"num_removed_tokens": num_removed})
    view = build_view(QUESTION, STEPS, ANSWER, layout=layout, markers=MARKERS)
    assert view == View(ids, [-100, -100, *ids[2:]], prefix_length=2, num_slots=0, num_thoughts=0, layout=layout)
    prompt = build_prompt(QUESTION, layout=layout, markers=MARKERS)
    assert prompt == View([1, 2], [-100, -100], prefix_length=2, num_slots=0, num_thoughts=0, layout=layout)


def test_thoughts_stand_between_the_markers_and_nowhere_else() -> None:
    view = build_view(QUESTION, STEPS, ANSWER, layout=Layout(1, 3, markers=True), markers=MARKERS)
    slots = range(view.prefix_length, view.prefix_length + view.num_slots)
    assert [view.input_ids[column] for column in slots] == [92, 92, 92]
    assert (view.input_ids[slots[0] - 1], view.input_ids[slots[-1] + 1]) == (90, 91)


@pytest.mark.parametrize("steps", [[], [[]], [[10]]])
def test_an_example_with_fewer_steps_than_the_stage_goes_from_the_slots_to_the_answer(steps: list[list[int]]) -> None:
    view = build_view(QUESTION, steps, ANSWER, layout=layout_of("coconut", 2, LATENT, num_steps=1), markers=MARKERS)
    assert view.input_ids == [1, 2, 90, 92, 92, 92, 92, 91, 7, 0]


def test_beyond_the_last_stage_every_step_is_gone_however_many_there_are() -> None:
    layout = layout_of("coconut", 3, LATENT)
    assert layout.num_dropped_steps == ALL_STEPS
    view = build_view(QUESTION, [[5]] * 99, ANSWER, layout=layout, markers=MARKERS)
    assert view.input_ids == [1, 2, 90, 92, 92, 92, 92, 91, 7, 0]


def test_a_view_does_not_change_what_it_was_built_from() -> None:
    question, answer = [1, 2], [7, 0]
    view = build_view(question, STEPS, answer, layout=Layout(ALL_STEPS, 1, markers=True), markers=MARKERS)
    view.input_ids.append(99)
    view.labels.append(99)
    assert (question, answer) == ([1, 2], [7, 0])
