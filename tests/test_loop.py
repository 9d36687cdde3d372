"""The training loop: what an update is, and that a stopped run goes on as if nothing had happened."""

import copy
import dataclasses
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from coconut.config.params import load_params
from coconut.config.schema import Entry, Params
from coconut.data.views import MarkerIds
from coconut.model.feedback import Feedback
from coconut.pipeline.signals import stop_on_signals
from coconut.training.loop import Score, Stopped, Trainer
from coconut.training.objective import Cost, check_finite
from coconut.training.optimizer import fits_optimizer, learning_rate
from coconut.training.rows import epoch_order, split_updates, training_views
from test_config import SHIPPED
from tiny_models import build_tiny_model

MARKERS = MarkerIds(60, 61, 62)


class FakeSet:
    """Forty encoded examples, indexed as an `EncodedSet` is."""

    def __init__(self, num_rows: int = 40) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(low: int, high: int) -> list[int]:
            length = int(torch.randint(low, high, (), generator=generator))
            return torch.randint(2, 60, (length,), generator=generator).tolist()

        self.rows = [(draw(2, 7), [draw(1, 4) for _ in range(3)], draw(2, 4)) for _ in range(num_rows)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: list[int]) -> dict[str, list[Any]]:
        columns = zip(*(self.rows[row] for row in rows), strict=True)
        return dict(zip(("question_ids", "steps_ids", "answer_ids"), columns, strict=True))


@pytest.fixture(scope="module")
def params() -> Params:
    return load_params(SHIPPED)


def make_entry(params: Params, **changes: Any) -> Entry:
    entry = params.curriculum["latent_2"]
    train = {"batch_size": 8, "warmup_updates": 3} | {k: v for k, v in changes.items() if hasattr(entry.train, k)}
    own = {"epochs": 2} | {k: v for k, v in changes.items() if k not in train}
    return dataclasses.replace(entry, **own, train=dataclasses.replace(entry.train, **train))


def make_trainer(params: Params, entry: Entry, *, seed: int = 0, **changes: Any) -> Trainer:
    runtime = dataclasses.replace(params.runtime, micro_batch=changes.pop("micro_batch", "auto"), save_every_s=0.0)
    model = build_tiny_model(changes.pop("family", "gpt2"))
    if changes.pop("dropout", False):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.2
    accuracies = iter(changes.pop("accuracies", [0.5] * 99))
    return Trainer(
        entry,
        model,
        Feedback(),
        FakeSet(),
        MARKERS,
        0,
        seed,
        runtime,
        Accelerator(cpu=True),
        validate=lambda: Score(1.0, next(accuracies)),
        **changes,
    )


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}


def untimed(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timings = {"tokens_per_s", "ms_per_update", "seconds"}
    return [{key: value for key, value in row.items() if key not in timings} for row in history]


@pytest.mark.parametrize("num_validated", [0, 1, 2])
def test_a_request_to_stop_during_validation_saves_the_state_before_it(params: Params, num_validated: int) -> None:
    entry = make_entry(params, select="best")
    accuracies = [0.1, 0.7, 0.3]
    straight = make_trainer(params, entry, accuracies=accuracies)
    straight.fit()

    saved: list[tuple[dict[str, Tensor], dict[str, Any]]] = []
    first = make_trainer(params, entry, save=lambda *state: saved.append(copy.deepcopy(state)))
    with stop_on_signals() as stop:

        def validate() -> Score:
            if len(first.position.history) + (first.position.first is not None) == num_validated:
                signal.raise_signal(signal.SIGTERM)
                pytest.fail("validation went on")
            return Score(1.0, accuracies[len(first.position.history) + (first.position.first is not None)])

        first.validate, first.interrupting = validate, stop.interrupting
        with pytest.raises(Stopped, match=f"stopped at update {[0, 5, 10][num_validated]} of 10"):
            first.fit()
    second = make_trainer(params, entry, accuracies=accuracies[num_validated:])
    second.restore_state(*saved[-1])
    second.fit()
    for name, weight in weights(straight).items():
        assert torch.equal(weight, weights(second)[name]), name
    assert untimed(second.position.history) == untimed(straight.position.history)


@pytest.mark.parametrize("stop_at", [1, 4, 5, 7, 10])
@pytest.mark.parametrize("select", ["last", "best"])
def test_stopping_and_resuming_gives_the_weights_of_a_straight_run(params: Params, stop_at: int, select: str) -> None:
    entry = make_entry(params, select=select)
    accuracies = [0.1, 0.7, 0.3]
    straight = make_trainer(params, entry, dropout=True, accuracies=accuracies)
    straight.fit()

    saved: list[tuple[dict[str, Tensor], dict[str, Any]]] = []

    def keep(tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        saved.append(({name: tensor.clone() for name, tensor in tensors.items()}, record))

    first = make_trainer(params, entry, dropout=True, accuracies=accuracies, save=keep)
    first.should_stop = lambda: first.position.update == stop_at
    with pytest.raises(Stopped, match=f"stopped at update {stop_at} of 10"):
        first.fit()
    num_validated = 1 + len(first.position.history)
    second = make_trainer(params, entry, dropout=True, accuracies=accuracies[num_validated:])
    second.restore_state(*saved[-1])
    second.fit()

    for name, weight in weights(straight).items():
        assert torch.equal(weight, weights(second)[name]), name
    for name, moment in straight.optimizer_state().items():
        assert torch.equal(moment, second.optimizer_state()[name]), name
    assert untimed(second.position.history) == untimed(straight.position.history)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(params: Params) -> None:
    runs = [make_trainer(params, make_entry(params), seed=seed) for seed in (0, 0, 1)]
    for run in runs:
        run.fit()
    same, other = (
        [torch.equal(a, b) for a, b in zip(weights(runs[0]).values(), weights(run).values(), strict=True)]
        for run in runs[1:]
    )
    assert all(same)
    assert not any(other)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_accumulating_small_micro_batches_is_the_same_update(params: Params, micro_batch: int, family: str) -> None:
    entry = make_entry(params, epochs=1)
    whole, parts = (
        make_trainer(params, entry, family=family),
        make_trainer(params, entry, family=family, micro_batch=micro_batch),
    )
    views = training_views(whole.dataset, range(8), entry=entry, seed=0, epoch=0, markers=MARKERS)
    costs = [trainer.objective.accumulate(views, trainer.parameters) for trainer in (whole, parts)]
    assert abs(costs[0].loss - costs[1].loss) < 1e-6
    assert costs[0].num_tokens == costs[1].num_tokens == sum(view.num_supervised for view in views)
    for name, parameter in whole.parameters.items():
        assert parameter.grad is not None
        assert (parameter.grad - parts.parameters[name].grad).abs().max() < 1e-6, name  # type: ignore[operator]


def out_of_memory_above(num_rows: int) -> Callable[..., None]:
    def hook(_module: Any, _args: Any, kwargs: dict[str, Tensor]) -> None:
        if len(kwargs["inputs_embeds"]) > num_rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    return hook


def test_out_of_memory_halves_the_micro_batch_and_redoes_the_same_update(params: Params) -> None:
    entry = make_entry(params, epochs=1)
    plenty, little = make_trainer(params, entry), make_trainer(params, entry)
    little.model.base_model.register_forward_pre_hook(out_of_memory_above(3), with_kwargs=True)
    plenty.fit()
    little.fit()
    assert (little.objective.micro_batch, little.objective.num_oom_retries) == (2, 2)
    assert little.summary()["train_oom_retries"] == 2
    for name, weight in weights(plenty).items():
        assert (weight - weights(little)[name]).abs().max() < 5e-4, name  # Adam amplifies noise


def test_out_of_memory_with_one_row_is_an_error(params: Params) -> None:
    trainer = make_trainer(params, make_entry(params))
    trainer.model.base_model.register_forward_pre_hook(out_of_memory_above(0), with_kwargs=True)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.fit()


def test_other_runtime_errors_are_not_taken_for_out_of_memory(params: Params) -> None:
    trainer = make_trainer(params, make_entry(params))

    def fail(*_: Any) -> None:
        raise RuntimeError("a size mismatch")

    trainer.model.base_model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="a size mismatch"):
        trainer.fit()


def test_a_loss_that_is_not_finite_stops_before_the_update(params: Params) -> None:
    trainer = make_trainer(params, make_entry(params))
    trainer.should_stop = lambda: spoil_at(3)

    def spoil_at(update: int) -> bool:
        if trainer.position.update == update:
            with torch.no_grad():
                trainer.model.get_input_embeddings().weight.fill_(float("nan"))
            trainer.before = {n: t.clone() for n, t in trainer.optimizer_state().items()}  # type: ignore[attr-defined]
        return False

    with pytest.raises(
        ValueError, match=r"latent_2: loss nan, gradient norm nan in epoch 1, update 4, rows \d+, .*lower lr"
    ):
        trainer.fit()
    assert trainer.position.update == 3
    for name, moment in trainer.optimizer_state().items():
        assert torch.equal(moment, trainer.before[name])  # type: ignore[attr-defined]


def test_the_state_before_a_loss_that_is_not_finite_is_saved(params: Params) -> None:
    trainer = make_trainer(params, make_entry(params))
    trainer.runtime = dataclasses.replace(trainer.runtime, save_every_s=1e9)
    saved: list[int] = []
    trainer.save = lambda _tensors, record: saved.append(record["update"])
    trainer.should_stop = lambda: setattr(trainer.objective, "accumulate", not_finite) or False  # type: ignore[func-returns-value]

    def not_finite(*_: Any) -> Cost:
        return Cost(float("nan"), 1, 1, 0, 0)

    with pytest.raises(ValueError, match="loss nan"):
        trainer.fit()
    assert saved == [1]


def test_finite_numbers_pass() -> None:
    check_finite(Cost(1.0, 1, 1, 0, 0), 2.0, entry_name="cot", epoch=0, update=0, rows=[1])


def test_an_epoch_shows_every_row_once_in_an_order_of_its_own() -> None:
    orders = [epoch_order(10, seed=0, entry_name="cot", epoch=epoch).tolist() for epoch in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(10))
    assert orders[0] != orders[1]
    assert orders[0] == epoch_order(10, seed=0, entry_name="cot", epoch=0).tolist()
    assert [len(rows) for rows in split_updates(orders[0], 4)] == [4, 4, 2]


def test_a_rows_stage_does_not_depend_on_its_neighbours(params: Params) -> None:
    """Mixing draws by (seed, entry, epoch, row): the view of row 7 is the same in any update."""
    entry = dataclasses.replace(make_entry(params), latent=dataclasses.replace(params.latent, uniform_prob=0.5))
    dataset = FakeSet()

    def views(rows: list[int], epoch: int) -> list[Any]:
        return training_views(dataset, rows, entry=entry, seed=0, epoch=epoch, markers=MARKERS)

    assert views([3, 7, 1], 0)[1] == views([7], 0)[0]
    stages = {tuple(view.num_slots for view in views(list(range(20)), epoch)) for epoch in range(3)}
    assert len(stages) == 3, "other epochs draw other stages"


def test_the_shares_of_the_stages_are_those_of_uniform_prob(params: Params) -> None:
    entry = dataclasses.replace(make_entry(params), latent=dataclasses.replace(params.latent, uniform_prob=0.4))
    slots = [
        view.num_slots
        for epoch in range(50)
        for view in training_views(FakeSet(), range(40), entry=entry, seed=0, epoch=epoch, markers=MARKERS)
    ]
    shares = [slots.count(n) / len(slots) for n in range(4)]
    assert shares == pytest.approx([0.1, 0.1, 0.7, 0.1], abs=0.03)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5 * 5 / 6, 0.75 * 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("cosine", [0.25, 0.46650635, 0.5625, 0.5, 0.25, 0.0669873]),
    ],
)
def test_the_learning_rate_rises_over_the_warm_up_then_follows_its_schedule(
    params: Params, schedule: str, expected: list[float]
) -> None:
    entry = make_entry(params, schedule=schedule, warmup_updates=4, lr=1.0)
    rates = [learning_rate(entry, update=u, num_updates=6, optimizer_updates=u) for u in range(6)]
    assert rates == pytest.approx(expected)


def test_an_optimiser_that_was_taken_over_is_warm_already(params: Params) -> None:
    entry = make_entry(params, warmup_updates=4, lr=1.0)
    assert learning_rate(entry, update=0, num_updates=6, optimizer_updates=900) == 1.0


def test_moments_taken_over_from_the_parent_go_on(params: Params) -> None:
    """Two entries in a row with the moments carried equal one entry of both their epochs, weight by weight."""
    entry = make_entry(params, epochs=1)
    parent = make_trainer(params, entry)
    parent.fit()
    child = make_trainer(params, entry)
    child._load_weights(weights(parent))
    child.take_over_optimizer(parent.optimizer_state())
    child.position.epoch, child.position.update = 1, 5
    child.entry = dataclasses.replace(entry, epochs=2)
    child.fit()
    both = make_trainer(params, dataclasses.replace(entry, epochs=2))
    both.fit()
    for name, weight in weights(both).items():
        assert torch.equal(weight, weights(child)[name]), name


@pytest.mark.parametrize(("before", "after"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_moments_of_a_parent_of_another_precision_take_this_ones(
    params: Params, before: torch.dtype, after: torch.dtype
) -> None:
    entry = make_entry(params, epochs=1)
    parent, child = make_trainer(params, entry), make_trainer(params, entry)
    parent.model.to(before)
    parent.fit()
    child.model.to(after)
    child.take_over_optimizer(parent.optimizer_state())
    child.fit()
    kinds = {tensor.dtype for name, tensor in child.optimizer_state().items() if "exp_avg" in name}
    assert kinds == {after}


def test_moments_of_eight_bit_adam_do_not_fit_adamw_and_the_reverse(params: Params) -> None:
    trainer = make_trainer(params, make_entry(params))
    eight_bit = {"num_updates": torch.tensor(3), "w/state1": torch.zeros(2), "w/step": torch.tensor(3)}
    assert not fits_optimizer(trainer.optimizer, eight_bit)
    assert fits_optimizer(trainer.optimizer, trainer.optimizer_state())
    stranger = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))])  # Of no class of AdamW, as bitsandbytes' is.
    assert not fits_optimizer(stranger, {"num_updates": torch.tensor(3), "w/exp_avg": torch.zeros(2)})


def test_icot_is_validated_with_what_was_removed_in_the_last_update(params: Params) -> None:
    trainer = make_trainer(
        params, make_entry(params, method="icot", latent_stage=0, epochs=2, icot_tokens_per_epoch=1.0)
    )
    seen: list[tuple[int, int]] = []
    score = trainer.validate

    def validate() -> Score:
        seen.append((trainer.num_removed_tokens_so_far, trainer.num_removed_tokens))
        return score()

    trainer.validate = validate
    trainer.fit()
    assert seen == [(0, 0), (0, 1), (1, 2)], "before the first update, and after each epoch"


def test_max_updates_ends_an_entry_early(params: Params) -> None:
    trainer = make_trainer(params, make_entry(params, epochs=4, max_updates=7))
    trainer.fit()
    assert trainer.position.update == 7
    assert [row["update"] for row in trainer.position.history] == [5, 7]


def test_best_keeps_the_weights_of_the_best_epoch(params: Params) -> None:
    one = make_trainer(params, make_entry(params, epochs=1))
    one.fit()
    best = make_trainer(params, make_entry(params, epochs=3, select="best"), accuracies=[0.0, 0.9, 0.5, 0.4])
    best.fit()
    for name, weight in weights(one).items():
        assert torch.equal(weight, weights(best)[name]), name
