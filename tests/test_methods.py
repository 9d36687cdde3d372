"""Which steps are gone at which stage by which method, what mixing draws, and the schedule of stepwise removal."""

import dataclasses
import json
import math
import random
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from arms import layout_of, writer_of
from coconut.checkpoints.meta import CheckpointMeta, read_meta
from coconut.config.methods import build_method
from coconut.config.params import parse_params
from coconut.config.schema import Entry, LatentConfig, Params
from coconut.data.layouts import ALL_STEPS, ALL_TOKENS, Layout
from coconut.data.views import MarkerIds
from coconut.methods.icot import draw_extra
from coconut.training.callbacks import Stopped
from coconut.training.loop import Trainer
from coconut.training.rows import training_rows
from marks import slow_but
from test_config import shipped_tree
from test_loop import FakeSet, Keeper, make_entry, make_trainer, untimed, weights

WRITER = writer_of(MarkerIds(60, 61, 62))


@pytest.fixture(scope="module")
def params() -> Params:
    return parse_params(shipped_tree())


def latent(**changes: Any) -> LatentConfig:
    values: dict[str, Any] = {
        "c_thought": 2,
        "max_latent_stage": 3,
        "pad_latent_to_max": True,
        "markers": True,
        "uniform_prob": 0.0,
        "thought": "hidden[-1]",
        "parallel_iterations": 0,
    }
    return LatentConfig(**(values | changes))


def icot_entry(params: Params, **changes: Any) -> Entry:
    values: dict[str, Any] = {
        "method": "icot",
        "latent_stage": 0,
        "icot_tokens_per_epoch": 2.5,
        "icot_smoothing": 4.0,
        "reset_optimizer": False,
    }
    return make_entry(params, **(values | changes))


# --- stages -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "layout"),
    [
        (0, Layout(0, 0, markers=True)),
        (1, Layout(1, 2, markers=True)),
        (3, Layout(3, 6, markers=True)),
        (4, Layout(ALL_STEPS, 6, markers=True)),
        (9, Layout(ALL_STEPS, 6, markers=True)),
    ],
)
def test_up_to_the_last_stage_k_steps_go_and_beyond_it_all(stage: int, layout: Layout) -> None:
    assert layout_of("coconut", stage, latent()) == layout


def test_without_padding_a_training_view_has_no_more_thoughts_than_steps() -> None:
    unpadded = latent(pad_latent_to_max=False)
    assert layout_of("coconut", 3, unpadded, num_steps=1).num_latents == 2
    assert layout_of("coconut", 3, unpadded, num_steps=0).num_latents == 0
    assert layout_of("coconut", 3, unpadded, num_steps=9).num_latents == 6
    assert layout_of("coconut", 3, latent(), num_steps=1).num_latents == 6


def test_at_evaluation_the_number_of_thoughts_never_depends_on_the_gold_solution() -> None:
    for pad in (True, False):
        meta = CheckpointMeta.of("coconut", 3, latent(pad_latent_to_max=pad), prompt="plain")
        assert meta.layout().num_latents == 6


def test_the_pause_arm_has_as_many_pause_tokens_as_coconut_has_thoughts_at_its_end() -> None:
    pause, end = layout_of("pause", 0, latent()), layout_of("coconut", 4, latent())
    assert dataclasses.replace(pause, slot="thought") == end


def test_pause_as_thought_differs_from_coconut_only_in_what_fills_the_slots() -> None:
    for stage in range(6):
        paused = layout_of("pause_as_thought", stage, latent())
        assert dataclasses.replace(paused, slot="thought") == layout_of("coconut", stage, latent())


def test_no_thoughts_differs_from_coconut_only_in_its_slots_and_markers() -> None:
    for stage in range(6):
        layout = layout_of("coconut", stage, latent())
        assert layout_of("no_thoughts", stage, latent()) == dataclasses.replace(layout, num_latents=0, markers=False)


# --- mixing -----------------------------------------------------------------------------------


def draw(entry: Entry, num_steps: int, key: object) -> Layout:
    return build_method(entry).draw_layout(num_steps, random.Random(f"{key}"), {})


def mixed(params: Params, **changes: Any) -> Entry:
    entry = params.curriculum["latent_2"]
    return dataclasses.replace(entry, latent=latent(**({"uniform_prob": 1.0, "c_thought": 1} | changes)))


def test_mixing_draws_each_stage_from_none_to_all_steps_equally_often(params: Params) -> None:
    counts = Counter(draw(mixed(params), 3, key).num_dropped_steps for key in range(4000))
    assert [*sorted(counts)] == [0, 1, 2, 3]
    assert all(abs(count / 4000 - 0.25) < 0.03 for count in counts.values())


def test_mixing_beyond_the_last_stage_drops_all_steps_as_the_curriculum_does(params: Params) -> None:
    layouts = {draw(mixed(params), 5, key) for key in range(200)}
    expected = {(0, 0), (1, 1), (2, 2), (3, 3), (ALL_STEPS, 3)}
    assert {(layout.num_dropped_steps, layout.num_latents) for layout in layouts} == expected


def test_mixing_applies_to_the_methods_that_have_stages(params: Params) -> None:
    for method in ("coconut", "no_thoughts", "pause_as_thought"):
        entry = dataclasses.replace(mixed(params), method=method)
        assert len({draw(entry, 3, key) for key in range(50)}) == 4, method
    for method in ("cot", "no_cot", "pause"):
        entry = dataclasses.replace(mixed(params), method=method, latent_stage=0)
        assert len({draw(entry, 3, key) for key in range(50)}) == 1, method


def test_without_mixing_every_example_is_at_the_entrys_stage(params: Params) -> None:
    entry = mixed(params, uniform_prob=0.0)
    assert {draw(entry, 3, key) for key in range(50)} == {layout_of("coconut", 2, entry.latent)}


def test_the_generator_yields_the_same_afterwards_whatever_was_drawn(params: Params) -> None:
    after = []
    for probability in (0.0, 1.0):
        generator = random.Random("one key")
        build_method(mixed(params, uniform_prob=probability)).draw_layout(3, generator, {})
        after.append(generator.random())
    assert after[0] == after[1]


def test_num_thoughts_parts_the_thoughts_from_the_removed_steps() -> None:
    """Thoughts from the start: as many at every stage, and steps removed one by one."""
    found = [layout_of("coconut", stage, latent(), num_thoughts=6, num_steps=1) for stage in (0, 1, 3, 4)]
    assert [(layout.num_dropped_steps, layout.num_latents) for layout in found] == [
        (0, 6),
        (1, 6),
        (3, 6),
        (ALL_STEPS, 6),
    ]
    assert layout_of("pause_as_thought", 2, latent(), num_thoughts=5).num_latents == 5
    assert layout_of("pause", 0, latent(), num_thoughts=5).num_latents == 5


@pytest.mark.parametrize(("method", "stage"), [("coconut", 2), ("pause_as_thought", 2), ("pause", 0)])
def test_a_checkpoint_holds_num_thoughts_where_its_entry_has_it(
    params: Params, tmp_path: Path, method: str, stage: int
) -> None:
    plain = CheckpointMeta.of_entry(make_entry(params, method=method, latent_stage=stage), prompt="plain", state={})
    assert "num_thoughts" not in plain.to_json()
    entry = make_entry(params, method=method, latent_stage=stage, num_thoughts=5)
    meta = CheckpointMeta.of_entry(entry, prompt="plain", state={})
    for one, number in ((plain, 2 if stage else 4), (meta, 5)):
        (tmp_path / "coconut.json").write_text(json.dumps(one.to_json()))
        read = read_meta(tmp_path)
        assert read == one
        assert read.layout().num_latents == number
    assert meta.layout_at(0).num_latents == 5


# --- stepwise internalisation -------------------------------------------------------------------


def removed(entry: Entry, update: int, updates_per_epoch: int, start: int = 0) -> int:
    parent = {"num_removed_at_end": start}
    return build_method(entry).state_at(update, updates_per_epoch, parent)["num_removed_at_end"]


def test_the_count_of_removed_tokens_grows_evenly_over_the_updates(params: Params) -> None:
    entry = icot_entry(params, icot_tokens_per_epoch=2.0)
    counts = [removed(entry, update, 5) for update in range(11)]
    assert counts == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4]


@pytest.mark.parametrize("tokens_per_epoch", [0.1, 0.7, 1.0, 2.5, 8.0])
def test_at_an_epochs_end_the_count_is_exactly_what_was_asked(params: Params, tokens_per_epoch: float) -> None:
    """With 313 updates an epoch the original removes one token every 39, so 8.03 in an epoch and 80 in ten."""
    entry = icot_entry(params, icot_tokens_per_epoch=tokens_per_epoch)
    for updates_per_epoch in (3, 313, 3000):
        found = removed(entry, 10 * updates_per_epoch, updates_per_epoch)
        assert found == round(10 * tokens_per_epoch)


def test_rounding_takes_no_token_from_the_count(params: Params) -> None:
    entry = icot_entry(params, icot_tokens_per_epoch=2.3)
    assert 3130 * 2.3 / 313 < 23
    assert removed(entry, 3130, 313) == 23


def test_from_the_given_count_on_all_reasoning_is_gone(params: Params) -> None:
    entry = icot_entry(params, icot_tokens_per_epoch=1.0, icot_remove_all_at=3)
    assert [removed(entry, u, 1) for u in range(5)] == [0, 1, 2, ALL_TOKENS, ALL_TOKENS]


def test_a_child_goes_on_where_its_parent_stopped(params: Params) -> None:
    entry = icot_entry(params, icot_tokens_per_epoch=1.0)
    assert removed(entry, 2, 1, start=5) == 7
    assert removed(entry, 2, 1, start=ALL_TOKENS) == ALL_TOKENS


def test_other_methods_keep_no_state(params: Params) -> None:
    assert build_method(make_entry(params)).state_at(10**6, 1, {"num_removed_at_end": 3}) == {}


def test_smoothing_draws_from_the_exponential_of_the_original() -> None:
    generator = random.Random(0)
    draws = Counter(draw_extra(1.0, generator) for _ in range(20_000))
    for extra in range(4):
        expected = (1 - math.exp(-1)) * math.exp(-extra)
        assert draws[extra] / 20_000 == pytest.approx(expected, abs=0.01)


def test_with_the_originals_rate_nearly_every_row_keeps_to_the_schedule() -> None:
    generator = random.Random(0)
    share = sum(draw_extra(4.0, generator) == 0 for _ in range(20_000)) / 20_000
    assert share == pytest.approx(0.982, abs=0.003)


def test_extra_tokens_are_drawn_by_row_and_epoch_alone(params: Params) -> None:
    entry = icot_entry(params, icot_smoothing=0.5)

    def views(rows: list[int], epoch: int) -> list[Any]:
        state = {"num_removed_at_end": 1}
        shown = training_rows(FakeSet(), rows, entry=entry, seed=0, epoch=epoch, writer=WRITER, state=state)  # type: ignore[arg-type]
        return [row.views["row"] for row in shown]

    assert views([3, 7, 1], 0)[1] == views([7], 0)[0]
    assert views(list(range(20)), 0) != views(list(range(20)), 1)


def test_a_row_loses_the_scheduled_tokens_and_its_extra_ones(params: Params) -> None:
    dataset = FakeSet()
    entry = icot_entry(params, icot_smoothing=1.0)
    for row in range(20):
        (example,) = dataset.rows([row])
        reasoning = [*chain.from_iterable(example.steps_ids)]
        generator = random.Random(f"view/0/{entry.name}/0/{row}")
        extra = build_method(entry).draw_layout(3, generator, {"num_removed_at_end": 0}).num_dropped_tokens
        state = {"num_removed_at_end": 2}
        (shown,) = training_rows(dataset, [row], entry=entry, seed=0, epoch=0, writer=WRITER, state=state)  # type: ignore[arg-type]
        wanted = example.question_ids + reasoning[2 + extra :] + example.answer_ids
        assert shown.views["row"].input_ids == wanted


def icot_run(params: Params, **changes: Any) -> Trainer:
    trainer = make_trainer(params, icot_entry(params, epochs=3, **changes))
    trainer.fit()
    return trainer


@pytest.mark.parametrize("stop_at", slow_but([1, 7], [1, 6, 7, 11]))
@pytest.mark.parametrize("reset", [False, True], ids=["one-optimizer", "reset"])
def test_stopping_and_resuming_gives_the_weights_of_a_straight_run(params: Params, stop_at: int, reset: bool) -> None:
    straight = icot_run(params, reset_optimizer=reset)
    entry = icot_entry(params, epochs=3, reset_optimizer=reset)
    callbacks = Keeper(stop_after=stop_at)
    first = make_trainer(params, entry, callbacks=callbacks)
    with pytest.raises(Stopped):
        first.fit()
    second = make_trainer(params, entry)
    second.restore_state(*callbacks.states[-1])
    second.fit()
    for name, weight in weights(straight).items():
        assert torch.equal(weight, weights(second)[name]), name
    assert untimed(second.position.history) == untimed(straight.position.history)


def test_the_optimizer_is_reset_when_a_token_goes_and_only_while_reasoning_is_left(params: Params) -> None:
    resets = []
    trainer = make_trainer(params, icot_entry(params, epochs=8, icot_tokens_per_epoch=2.5, reset_optimizer=True))
    step = trainer.learner.optimizer.step

    def count_steps() -> None:
        step()
        steps = {int(state["step"]) for state in trainer.learner.optimizer.state.values()}
        if steps == {1} and trainer.position.update > 0:
            resets.append(trainer.position.update)

    trainer.learner.optimizer.step = count_steps  # type: ignore[method-assign, assignment]
    trainer.fit()
    # 5 updates an epoch, 2.5 tokens: one token every second update. No chain has more than 9 tokens.
    longest = max(sum(map(len, example.steps_ids)) for example in FakeSet().encoded)
    assert longest == 9
    assert resets[:4] == [2, 4, 6, 8]
    assert max(resets) <= 2 * longest


def test_without_reset_optimizer_the_moments_go_on(params: Params) -> None:
    trainer = icot_run(params, reset_optimizer=False)
    assert {int(state["step"]) for state in trainer.learner.optimizer.state.values()} == {15}


def test_training_rows_lose_their_tokens_as_the_schedule_says(params: Params) -> None:
    """One token an epoch and no smoothing: in epoch e the 40 rows hold what is left of chains cut by e tokens."""
    entry = icot_entry(params, epochs=4, icot_tokens_per_epoch=1.0, icot_smoothing=1e9)
    trainer = make_trainer(params, entry)
    trainer.fit()
    rows = FakeSet().encoded
    lengths = [(len(question) + len(answer), sum(map(len, steps))) for question, steps, answer in rows]
    expected = [sum(rest + max(0, chain - removed) for rest, chain in lengths) for removed in range(4)]
    assert [row["tokens"] for row in trainer.position.history] == expected


def test_at_the_end_every_token_that_was_scheduled_is_gone(params: Params) -> None:
    trainer = icot_run(params)
    state = trainer.schedule.state_at(trainer.position.update)
    assert state == {"num_removed_tokens": 7, "num_removed_at_end": 7}
    meta = CheckpointMeta.of_entry(trainer.entry, prompt="plain", state=state)
    assert meta.layout() == Layout(num_dropped_tokens=7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"icot_tokens_per_epoch": 8}, "only for method icot, found method cot; take it out"),
        ({"icot_remove_all_at": 39}, "only for method icot, found method cot"),
        (
            {"num_thoughts": 5},
            "num_thoughts: only for method coconut or codi or pause or pause_as_thought or sim_codi or sim_cot, found",
        ),
        ({"method": "icot"}, "curriculum.cot.icot_tokens_per_epoch: missing"),
        (
            {"method": "icot", "icot_tokens_per_epoch": 8, "icot_smoothing": 4, "select": "best"},
            "select: found 'best', wanted 'last' with method icot",
        ),
        ({"method": "icot", "icot_tokens_per_epoch": 0, "icot_smoothing": 4}, "icot_tokens_per_epoch: found 0"),
    ],
)
def test_keys_that_do_not_go_with_the_method_are_named(changes: dict[str, Any], message: str) -> None:
    tree = shipped_tree()
    tree["curriculum"]["cot"] |= changes
    with pytest.raises(ValueError, match=message):
        parse_params(tree)
