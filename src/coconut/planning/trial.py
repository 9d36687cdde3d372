"""How long stages take on this machine, measured on a few of their updates and questions.

A time does not depend on the values of the weights, so the untouched model stands for every entry's. Only how much it
would say does, so it is made to say as many tokens as the gold text has.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from coconut.config.methods import build_method
from coconut.config.schema import BASE, Entry, Params
from coconut.data.encoded import load_encoded
from coconut.data.examples import read_examples
from coconut.data.views import reasoning_ids
from coconut.devices import peak_memory_mb
from coconut.evaluation.evaluator import Evaluator
from coconut.layout import ENCODED_DIR, EXAMPLES_DIR, find_test_sets
from coconut.probing.entry import probe
from coconut.probing.subject import Subject
from coconut.training.loop import Trainer
from coconut.training.rows import epoch_order, split_updates
from coconut.training.schedule import Schedule
from coconut.training.setup import set_up

_ENOUGH_S = 2.0
"""Of updates; fewer of them where each takes long."""
_FEWEST, _MOST = 3, 40
_PROBED = (16, 64)
"""Questions of the two probes through which a line is drawn."""


@dataclass(frozen=True)
class EntryTimes:
    """What one entry's stages take, in seconds, without the start of their processes."""

    num_updates: int
    seconds_per_update: float
    validation: float
    """Of one, after an epoch."""
    training: float
    """Validations included."""
    evaluation: float
    probing: float
    num_bytes: int
    """Of the weights."""
    peak_mb: float


def measure(params: Params, entries: Sequence[Entry], say: Callable[[str], None]) -> dict[str, EntryTimes]:
    """Measure entries; what is alike in two of them is measured once.

    Raises:
        ValueError: if the model or the encoded data are missing or damaged, or an entry cannot be trained.
    """
    found: dict[str, EntryTimes] = {}
    known: dict[str, EntryTimes] = {}
    for entry in entries:
        kind = str(replace(entry, name="", parent="", epochs=1, lr=0.0, min_accuracy=None, max_updates=None,
                           train=replace(entry.train, schedule="constant", select="last")))  # fmt: skip
        if kind not in known:
            say(f"measuring {entry.name}: {entry.method}, stage {entry.latent_stage}")
            known[kind] = _measure(params, entry)
        found[entry.name] = _for_entry(known[kind], entry)
    return found


def _for_entry(alike: EntryTimes, entry: Entry) -> EntryTimes:
    """Return the times of an entry that is like a measured one but for its length."""
    schedule = Schedule(entry, len(load_encoded(ENCODED_DIR, "train")))
    training = schedule.num_updates * alike.seconds_per_update + (1 + schedule.num_epochs) * alike.validation
    return replace(alike, num_updates=schedule.num_updates, training=training)


def _measure(params: Params, entry: Entry) -> EntryTimes:
    """Measure what is the same for all entries of a kind; `_for_entry` adds the length."""
    # Whatever parent it has: the untouched model is there before any training is.
    trainer, _ = set_up(params, replace(entry, parent=BASE))
    seconds = _seconds_per_update(trainer)
    evaluator = _evaluator(trainer, params)
    sizes = [len(read_examples(EXAMPLES_DIR / f"{name}.jsonl")) for name in (*find_test_sets(), "valid")]
    num_scored = sum(min(size, params.evaluate.max_examples or size) for size in sizes)
    per_row = _seconds_per_row(evaluator)
    num_validated = min(sizes[-1], entry.train.validate_examples or sizes[-1])
    with_samples = 1 + params.evaluate.samples * (num_scored - sizes[-1]) / max(1, num_scored)
    return EntryTimes(
        num_updates=0,
        seconds_per_update=seconds,
        validation=num_validated * per_row,
        training=0.0,
        evaluation=num_scored * per_row * with_samples,
        probing=_probing_s(evaluator, params, entry),
        num_bytes=sum(p.numel() * p.element_size() for p in trainer.learner.parameters.values()),
        peak_mb=peak_memory_mb(),
    )


def _seconds_per_update(trainer: Trainer) -> float:
    """Return the median over a few updates, the first ones left out."""
    trainer.model.train()
    order = epoch_order(len(trainer.dataset), seed=trainer.seed, entry_name=trainer.entry.name, epoch=0)
    seconds: list[float] = []
    for rows in split_updates(order, trainer.entry.train.batch_size):
        start = time.monotonic()
        trainer.update(rows)
        seconds.append(time.monotonic() - start)
        if len(seconds) >= _MOST or (len(seconds) >= _FEWEST and sum(seconds[1:]) > _ENOUGH_S):
            break
    trainer.model.eval()
    return statistics.median(seconds[1:] or seconds)


def _evaluator(trainer: Trainer, params: Params) -> Evaluator:
    """Return the entry's evaluator, which says as much as the longest gold text has tokens."""
    evaluator: Evaluator = trainer.validation.evaluator  # type: ignore[attr-defined]
    entry = trainer.entry
    layout = build_method(entry).layout(entry.latent_stage)
    lengths = [
        len(reasoning_ids(example.steps_ids, layout)) + len(example.answer_ids)
        for example in load_encoded(ENCODED_DIR, "valid").examples()
    ]
    return replace(
        evaluator, layout=layout, max_new_tokens=min(params.evaluate.max_new_tokens, max(lengths, default=1))
    )


def _seconds_per_row(evaluator: Evaluator) -> float:
    """Return what generating and scoring take for a row, in batches as large as those of an evaluation."""
    encoded = load_encoded(ENCODED_DIR, "valid", 2 * evaluator.batch_size)
    examples = read_examples(EXAMPLES_DIR / "valid.jsonl")
    start = time.monotonic()
    evaluator.outcomes(encoded, examples)
    evaluator.loss(encoded)
    return (time.monotonic() - start) / max(1, len(encoded))


def _probing_s(evaluator: Evaluator, params: Params, entry: Entry) -> float:
    """Draw a line through the times of two small probes."""
    if not params.probe.enabled:
        return 0.0
    points = []
    for count in _PROBED:
        examples = read_examples(EXAMPLES_DIR / "test.jsonl")
        encoded = load_encoded(ENCODED_DIR, "test", min(count, params.probe.questions))
        indices = encoded[range(len(encoded))]["index"]
        asked = [examples[index] for index in indices]
        start = time.monotonic()
        subject = Subject(evaluator, asked, list(encoded.examples()), indices, params.encode.prompt)
        probe(
            subject, build_method(entry).thoughts_per_step(), count=min(params.probe.shown, count), top=params.probe.top
        )
        points.append((len(asked), time.monotonic() - start))
    (few, little), (many, long) = points
    slope = max(0.0, (long - little) / (many - few)) if many > few else 0.0
    return long + slope * max(0, params.probe.questions - many)
