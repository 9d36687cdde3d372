"""The training loop: what an update is, and that a stopped run goes on as if nothing had happened."""

import copy
import csv
import dataclasses
import signal
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from arms import writer_of
from coconut.config.methods import find_method
from coconut.config.params import parse_params
from coconut.config.schema import Entry, Params
from coconut.config.strict import parse
from coconut.data.encoding import EncodedExample
from coconut.data.views import MarkerIds
from coconut.methods import State
from coconut.model.feedback import build_feedback
from coconut.pipeline.signals import stop_on_signals
from coconut.ranks import Ranks
from coconut.training.callbacks import Callbacks, Stopped
from coconut.training.loop import Trainer
from coconut.training.objective import Cost, check_finite
from coconut.training.optimizer import fits_optimizer, learning_rate
from coconut.training.position import Score, history_csv
from coconut.training.rows import epoch_order, split_updates, training_rows
from test_config import shipped_tree
from tiny_models import build_tiny_model

MARKERS = MarkerIds(60, 61, 62)


class FakeSet:
    """Forty encoded examples, indexed as an `EncodedSet` is."""

    def __init__(self, num_rows: int = 40) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(low: int, high: int) -> list[int]:
            length = int(torch.randint(low, high, (), generator=generator))
            return torch.randint(2, 60, (length,), generator=generator).tolist()

        self.encoded = [EncodedExample(draw(2, 7), [draw(1, 4) for _ in range(3)], draw(2, 4)) for _ in range(num_rows)]

    def __len__(self) -> int:
        return len(self.encoded)

    def rows(self, rows: Sequence[int]) -> list[EncodedExample]:
        return [self.encoded[row] for row in rows]


class FakeValidation:
    """Gives these accuracies one after another."""

    num_oom_retries = 0

    def __init__(self, accuracies: Sequence[float]) -> None:
        self.accuracies = iter(accuracies)
        self.states: list[State] = []

    def score(self, state: State) -> Score:
        self.states.append(state)
        return Score(1.0, next(self.accuracies))


class Keeper(Callbacks):
    """Keeps copies of the states, and asks the run to stop after an update of this session."""

    def __init__(self, *, stop_after: int | None = None, is_save_due: bool = True) -> None:
        self.states: list[tuple[dict[str, Tensor], dict[str, Any]]] = []
        self.num_updates = 0
        self._stop_after, self._is_save_due = stop_after, is_save_due

    def save(self, update: int, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        assert update == record["update"]
        self.states.append(copy.deepcopy((tensors, record)))

    def is_save_due(self) -> bool:
        return self._is_save_due

    def should_stop(self) -> bool:
        self.num_updates += 1
        return self.num_updates == self._stop_after


@pytest.fixture(scope="module")
def params() -> Params:
    return parse_params(shipped_tree())


def make_entry(params: Params, **changes: Any) -> Entry:
    entry = params.curriculum["latent_2"]
    train = {"batch_size": 8, "warmup_updates": 3} | {k: v for k, v in changes.items() if hasattr(entry.train, k)}
    fields = {field.name for field in dataclasses.fields(entry)}
    own = {"epochs": 2} | {k: v for k, v in changes.items() if k in fields}
    keys = {k: v for k, v in changes.items() if k not in fields and k not in train}
    kind = find_method(own.get("method", entry.method))
    own["keys"] = parse({**kind.example_keys, **keys}, kind.Keys, "keys")
    return dataclasses.replace(entry, **own, train=dataclasses.replace(entry.train, **train))


def make_trainer(params: Params, entry: Entry, *, seed: int = 0, **changes: Any) -> Trainer:
    runtime = dataclasses.replace(params.runtime, micro_batch=changes.pop("micro_batch", "auto"))
    model = build_tiny_model(changes.pop("family", "gpt2"))
    if changes.pop("dropout", False):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.2
    thought = changes.pop("thought", "hidden[-1]")
    return Trainer(
        entry=entry,
        model=model,
        feedback=build_feedback(thought, model),
        dataset=FakeSet(),
        writer=writer_of(MARKERS),
        pad_id=0,
        seed=seed,
        runtime=runtime,
        accelerator=Accelerator(cpu=True),
        validation=FakeValidation(changes.pop("accuracies", [0.5] * 99)),
        **changes,
    )


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.learner.parameters.items()}


def untimed(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timings = {"tokens_per_s", "ms_per_update", "seconds", "cpu_seconds", "load"}
    return [{key: value for key, value in row.items() if key not in timings} for row in history]


@pytest.mark.parametrize("num_validated", [0, 1, 2])
def test_a_request_to_stop_during_validation_saves_the_state_before_it(params: Params, num_validated: int) -> None:
    entry = make_entry(params, select="best")
    accuracies = [0.1, 0.7, 0.3]
    straight = make_trainer(params, entry, accuracies=accuracies)
    straight.fit()

    with stop_on_signals() as stop:

        class Interrupting(Keeper):
            def interrupting(self) -> AbstractContextManager[None]:
                return stop.interrupting()

        class Interrupted(FakeValidation):
            def score(self, state: State) -> Score:
                if len(self.states) == num_validated:
                    signal.raise_signal(signal.SIGTERM)
                    pytest.fail("validation went on")
                return super().score(state)

        callbacks = Interrupting()
        first = make_trainer(params, entry, callbacks=callbacks)
        first.validation = Interrupted(accuracies)
        with pytest.raises(Stopped, match=f"stopped at update {[0, 5, 10][num_validated]} of 10"):
            first.fit()
    second = make_trainer(params, entry, accuracies=accuracies[num_validated:])
    second.restore_state(*callbacks.states[-1])
    second.fit()
    for name, weight in weights(straight).items():
        assert torch.equal(weight, weights(second)[name]), name
    assert untimed(second.position.history) == untimed(straight.position.history)


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [1, 4, 5, 7, 10])
@pytest.mark.parametrize("select", ["last", "best"])
def test_stopping_and_resuming_gives_the_weights_of_a_straight_run(params: Params, stop_at: int, select: str) -> None:
    entry = make_entry(params, select=select)
    accuracies = [0.1, 0.7, 0.3]
    straight = make_trainer(params, entry, dropout=True, accuracies=accuracies)
    straight.fit()

    callbacks = Keeper(stop_after=stop_at)
    first = make_trainer(params, entry, dropout=True, accuracies=accuracies, callbacks=callbacks)
    with pytest.raises(Stopped, match=f"stopped at update {stop_at} of 10"):
        first.fit()
    num_validated = 1 + len(first.position.history)
    second = make_trainer(params, entry, dropout=True, accuracies=accuracies[num_validated:])
    second.restore_state(*callbacks.states[-1])
    second.fit()

    for name, weight in weights(straight).items():
        assert torch.equal(weight, weights(second)[name]), name
    for name, moment in straight.learner.optimizer_state().items():
        assert torch.equal(moment, second.learner.optimizer_state()[name]), name
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
    rows = training_rows(whole.dataset, range(8), entry=entry, seed=0, epoch=0, writer=writer_of(MARKERS))
    costs = [trainer.objective.accumulate(rows, trainer.learner.parameters) for trainer in (whole, parts)]
    assert abs(costs[0].loss - costs[1].loss) < 1e-6
    counts = [cost.parts["nll"][1] for cost in costs]
    assert counts == [sum(row.views["row"].num_supervised for row in rows)] * 2
    for name, parameter in whole.learner.parameters.items():
        assert parameter.grad is not None
        assert (parameter.grad - parts.learner.parameters[name].grad).abs().max() < 1e-6, name  # type: ignore[operator]


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
    assert little.num_oom_retries == 2
    for name, weight in weights(plenty).items():
        assert (weight - weights(little)[name]).abs().max() < 5e-4, name  # Adam amplifies noise


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
            "out of memory with one row .* take a smaller",
        ),
        (RuntimeError("CUDA error: out of memory"), "out of memory with one row"),
        (
            RuntimeError("a size mismatch\nat line 3"),
            "RuntimeError: a size mismatch; the traceback stands in outputs/logs",
        ),
        (IndexError("index out of range in self"), "IndexError: index out of range in self; "),
    ],
)
def test_a_model_that_fails_in_an_update_is_named_with_its_rows_and_the_state_before_is_saved(
    params: Params, error: Exception, message: str
) -> None:
    callbacks = Keeper(is_save_due=False)
    trainer = make_trainer(params, make_entry(params), callbacks=callbacks)

    def fail(*_: Any) -> None:
        if trainer.position.update == 2:
            raise error

    trainer.model.base_model.register_forward_pre_hook(fail)
    with pytest.raises(
        ValueError, match=rf"curriculum\.latent_2, epoch 1, update 3, rows \d+, .*: the model failed: {message}"
    ):
        trainer.fit()
    ((tensors, record),) = callbacks.states
    assert record["update"] == 2
    for name, weight in weights(trainer).items():
        assert torch.equal(weight, tensors[f"weight:{name}"]), name


class Spoiling(Keeper):
    """Makes the weights infinite after the third update."""

    trainer: Trainer

    def should_stop(self) -> bool:
        stops = super().should_stop()
        if self.num_updates == 3:
            with torch.no_grad():
                self.trainer.model.get_input_embeddings().weight.fill_(float("nan"))
            self.moments = copy.deepcopy(self.trainer.learner.optimizer_state())
        return stops


def test_a_loss_that_is_not_finite_stops_before_the_update(params: Params) -> None:
    callbacks = Spoiling(is_save_due=False)
    callbacks.trainer = trainer = make_trainer(params, make_entry(params), callbacks=callbacks)
    with pytest.raises(
        ValueError, match=r"latent_2, epoch 1, update 4, rows \d+, .*: loss nan, gradient norm nan, .*lower lr"
    ):
        trainer.fit()
    assert trainer.position.update == 3
    assert callbacks.states == [], "spoiled weights are no state to go on from"
    for name, moment in trainer.learner.optimizer_state().items():
        assert torch.equal(moment, callbacks.moments[name])


def test_a_gradient_that_is_not_finite_stops_before_the_update_and_the_state_before_it_is_saved(
    params: Params,
) -> None:
    """The loss is finite: only the gradient's norm tells."""
    callbacks = Keeper(is_save_due=False)
    trainer = make_trainer(params, make_entry(params), callbacks=callbacks)

    def spoil(gradient: Tensor) -> Tensor:
        return gradient * float("inf") if trainer.position.update == 1 else gradient

    trainer.model.get_input_embeddings().weight.register_hook(spoil)
    with pytest.raises(ValueError, match=r"update 2, rows .*: loss \d.*, gradient norm (nan|inf), wanted finite"):
        trainer.fit()
    ((_, record),) = callbacks.states
    assert record["update"] == 1


def test_the_end_of_training_is_saved_even_where_no_save_is_due(params: Params) -> None:
    callbacks = Keeper(is_save_due=False)
    trainer = make_trainer(params, make_entry(params), callbacks=callbacks)
    trainer.fit()
    ((_, record),) = callbacks.states
    assert (record["update"], record["epoch"]) == (10, 2)


@pytest.mark.parametrize("limit", [1e-3, 0.5])
def test_clipping_counts_and_scales_the_projections_gradients_too(params: Params, limit: float) -> None:
    trainer = make_trainer(params, make_entry(params, max_grad_norm=limit), thought="projection")
    step, norms = trainer.learner.optimizer.step, []

    def measure() -> None:
        gradients = [parameter.grad for parameter in trainer.learner.parameters.values() if parameter.grad is not None]
        own = [parameter.grad for parameter in trainer.feedback.parameters()]
        assert any(gradient is not None and gradient.any() for gradient in own)
        norms.append(float(torch.stack([gradient.norm() for gradient in gradients]).norm()))
        step()

    trainer.learner.optimizer.step = measure  # type: ignore[method-assign, assignment]
    trainer.fit()
    assert norms == pytest.approx([limit] * 10, rel=1e-3)


class TwoRanks(Ranks):
    """The first of two processes, of which the other one has the same rows."""

    def __init__(self) -> None:
        super().__init__(rank=0, count=2)

    def own(self, num_rows: int) -> range:
        return range(num_rows)

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            tensor.mul_(2)

    def sum_on_host(self, numbers: Sequence[float]) -> list[float]:
        return [2 * number for number in numbers]


def test_a_weight_that_no_process_reaches_gets_no_gradient_of_zeros_which_adamw_would_decay(params: Params) -> None:
    """A view without thoughts never reads the projection; in one process its weights stay as they are."""
    entry = make_entry(params, method="cot", latent_stage=0, weight_decay=0.5)
    trainer = make_trainer(params, entry, thought="projection")
    trainer.objective.ranks = TwoRanks()
    before = weights(trainer)
    trainer.update([0, 1, 2, 3])
    for name, weight in weights(trainer).items():
        assert torch.equal(weight, before[name]) == name.startswith("feedback."), name


def test_finite_numbers_pass() -> None:
    check_finite(Cost({"nll": (1.0, 1, 1.0)}, 1, 0, 0, grad_norm=2.0), place="curriculum.cot")


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
        shown = training_rows(dataset, rows, entry=entry, seed=0, epoch=epoch, writer=writer_of(MARKERS))
        return [row.views["row"] for row in shown]

    assert views([3, 7, 1], 0)[1] == views([7], 0)[0]
    stages = {tuple(view.num_slots for view in views(list(range(20)), epoch)) for epoch in range(3)}
    assert len(stages) == 3, "other epochs draw other stages"


def test_the_shares_of_the_stages_are_those_of_uniform_prob(params: Params) -> None:
    entry = dataclasses.replace(make_entry(params), latent=dataclasses.replace(params.latent, uniform_prob=0.4))
    slots = [
        row.views["row"].num_slots
        for epoch in range(50)
        for row in training_rows(FakeSet(), range(40), entry=entry, seed=0, epoch=epoch, writer=writer_of(MARKERS))
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


def test_an_optimizer_that_was_taken_over_is_warm_already(params: Params) -> None:
    entry = make_entry(params, warmup_updates=4, lr=1.0)
    assert learning_rate(entry, update=0, num_updates=6, optimizer_updates=900) == 1.0


def test_moments_taken_over_from_the_parent_go_on(params: Params) -> None:
    """Two entries in a row with the moments carried equal one entry of both their epochs, weight by weight."""
    entry = make_entry(params, epochs=1)
    parent = make_trainer(params, entry)
    parent.fit()
    parent_tensors = parent.learner.tensors()
    child = make_trainer(params, dataclasses.replace(entry, epochs=2))
    child.learner.restore(parent_tensors)
    child.position.epoch, child.position.update = 1, 5
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
    child.learner.take_over(parent.learner.optimizer_state())
    child.fit()
    kinds = {tensor.dtype for name, tensor in child.learner.optimizer_state().items() if "exp_avg" in name}
    assert kinds == {after}


def test_moments_of_eight_bit_adam_do_not_fit_adamw_and_the_reverse(params: Params) -> None:
    trainer = make_trainer(params, make_entry(params))
    eight_bit = {"num_updates": torch.tensor(3), "w/state1": torch.zeros(2), "w/step": torch.tensor(3)}
    assert not fits_optimizer(trainer.learner.optimizer, eight_bit)
    assert fits_optimizer(trainer.learner.optimizer, trainer.learner.optimizer_state())
    stranger = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))])  # Of no class of AdamW, as bitsandbytes' is.
    assert not fits_optimizer(stranger, {"num_updates": torch.tensor(3), "w/exp_avg": torch.zeros(2)})


def test_icot_is_validated_with_what_was_removed_in_the_last_update(params: Params) -> None:
    trainer = make_trainer(
        params, make_entry(params, method="icot", latent_stage=0, epochs=2, icot_tokens_per_epoch=1.0)
    )
    trainer.fit()
    assert isinstance(trainer.validation, FakeValidation)
    shown = [state["num_removed_tokens"] for state in trainer.validation.states]
    assert shown == [0, 0, 1], "before the first update, and after each epoch"
    assert trainer.schedule.state_at(trainer.position.update)["num_removed_at_end"] == 2


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


@pytest.mark.parametrize("stop_after", [None, 12])
def test_best_hands_down_the_moments_of_the_best_epoch(params: Params, stop_after: int | None) -> None:
    """The next entry goes on from the best epoch's weights: the last epoch's moments belong to others."""
    one = make_trainer(params, make_entry(params, epochs=1))
    one.fit()
    accuracies = [0.0, 0.9, 0.5, 0.4]
    entry = make_entry(params, epochs=3, select="best", reset_optimizer=False)
    callbacks = Keeper(stop_after=stop_after)
    best = make_trainer(params, entry, accuracies=accuracies, callbacks=callbacks)
    if stop_after is not None:
        with pytest.raises(Stopped):
            best.fit()
        best = make_trainer(params, entry, accuracies=accuracies[3:])
        best.restore_state(*callbacks.states[-1])
    best.fit()
    assert best.learner.num_updates == one.learner.num_updates == 5
    found = best.learner.optimizer_state()
    for name, moment in one.learner.optimizer_state().items():
        assert torch.equal(moment, found[name]), name


def test_cpu_seconds_and_load_stand_in_the_last_columns_and_go_on_over_sessions(params: Params) -> None:
    callbacks = Keeper()
    first = make_trainer(params, make_entry(params), callbacks=callbacks)
    first.fit()
    rows = list(csv.DictReader(history_csv(first.position.history).splitlines()))
    assert list(rows[0])[-3:] == ["seconds", "cpu_seconds", "load"]
    assert 0 < float(rows[0]["cpu_seconds"]) < float(rows[1]["cpu_seconds"])
    assert float(rows[0]["load"]) >= 0
    second = make_trainer(params, make_entry(params))
    second.restore_state(*callbacks.states[-1])
    assert second.watch.cpu_seconds >= float(rows[1]["cpu_seconds"])
