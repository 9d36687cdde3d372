"""What an update of each training method costs, beside one of Coconut with as many thoughts, and the memory it takes.

    python benchmarks/methods.py [METHOD ...] [--layers 12 --width 768 --rows 8 --thoughts 6 --repeats 5]

Updates run in turns within one process, so that the ratio holds when the machine's speed drifts; times are CPU seconds
of the process. Each method's peak memory is that of a process of its own that runs two updates.
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from accelerate import Accelerator

from coconut.config.methods import find_method
from coconut.config.schema import LatentConfig
from coconut.config.strict import parse
from coconut.data.encoding import EncodedExample
from coconut.data.views import MarkerIds, ViewWriter
from coconut.methods import DEFAULT, Method, Row
from coconut.model.feedback import Feedback
from coconut.report.tables import Table
from coconut.training.objective import Objective
from coconut.training.rows import TrainingRow
from workload import VOCAB_SIZE, build_gpt2

_NUM_STEPS = 3


class _Writer(ViewWriter):
    """Random ids have no text: the answer's wording is taken to be two tokens."""

    def column_before_answer(self, view: Any, example: EncodedExample, _layout: Any) -> int:
        return len(view.input_ids) - len(example.answer_ids) + 1


def build(name: str, num_thoughts: int) -> Method:
    """Return a method at the end of its curriculum, with so many thoughts."""
    kind = find_method(name)
    latent = LatentConfig(num_thoughts // _NUM_STEPS, _NUM_STEPS, True, True, 0.0, "hidden[-1]", 0)
    own = {"num_thoughts": num_thoughts} if "num_thoughts" in {field.name for field in fields(kind.Keys)} else {}
    return kind(_NUM_STEPS if kind.has_stages else 0, latent, parse({**kind.example_keys, **own}, kind.Keys, name))


def make_rows(method: Method, num_rows: int) -> list[TrainingRow]:
    """Lay out random rows of about the lengths of GSM8K-Aug: 48 to 64 columns of question, three steps of 9 to 13."""
    chance, rows = random.Random(0), []
    writer = _Writer(None, MarkerIds(VOCAB_SIZE - 3, VOCAB_SIZE - 2, VOCAB_SIZE - 1))  # type: ignore[arg-type]

    def ids(low: int, high: int) -> list[int]:
        return [chance.randrange(VOCAB_SIZE - 3) for _ in range(chance.randint(low, high))]

    for number in range(num_rows):
        example = EncodedExample(ids(48, 64), [ids(9, 13) for _ in range(_NUM_STEPS)], ids(5, 6))
        views = method.views(Row(example, random.Random(number), method.state_at(0, 1, {}), writer))
        rows.append(TrainingRow(example, views, number))
    return rows


class Trial:
    """One method, ready to compute gradients."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.model = build_gpt2("cpu", n_layer=options.layers, n_embd=options.width, n_head=options.width // 64)
        method = build(name, options.thoughts)
        self.rows = make_rows(method, options.rows)
        modules = method.build_modules(self.model, 0)
        self.objective = Objective(
            self.model, Feedback(), Accelerator(cpu=True), 0, options.rows, method, modules=modules
        )

    def update(self) -> float:
        """Compute one gradient; return its CPU seconds."""
        start = time.process_time()
        self.objective.accumulate(self.rows, dict(self.model.named_parameters()))
        return time.process_time() - start


def peak_mb(name: str, options: Sequence[str]) -> float:
    """Return the peak memory of a process that runs two updates of a method."""
    done = subprocess.run(
        [sys.executable, __file__, name, "--peak", *options], check=True, capture_output=True, text=True
    )
    return float(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD")
    for name, value in (("layers", 12), ("width", 768), ("rows", 8), ("thoughts", 6), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.methods or ["cot", "pause", "codi"]
    if options.peak:
        trial = Trial(names[0], options)
        trial.update(), trial.update()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    names = [DEFAULT, *(name for name in names if name != DEFAULT)]
    passed_on = [
        word for key in ("layers", "width", "rows", "thoughts") for word in (f"--{key}", str(getattr(options, key)))
    ]
    # Before any trial: a process begins with the peak of the one that it was forked from.
    peaks = {name: peak_mb(name, passed_on) for name in names}
    trials = {name: Trial(name, options) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(options.repeats + 1):
        for name, trial in trials.items():
            taken = trial.update()
            if number:  # The first one warms up.
                seconds[name].append(taken)
    table = []
    for name in names:
        ratios = sorted(own / other for own, other in zip(seconds[name], seconds[DEFAULT], strict=True))
        middle = statistics.median(seconds[name])
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        table.append([name, f"{middle:.2f}", spread, f"{peaks[name]:.0f}"])
    print(Table(["method", "CPU s an update", f"ratio to {DEFAULT}", "peak MB"], table).to_text())


if __name__ == "__main__":
    main()
