"""Run by tests in a process of its own, which has the device `pretend:0`: what differs from the CPU, as JSON.

python tests/pretend_cases.py updates | bf16 | methods | training | memory | generation | opened | faults | waiting
    | launches
"""

import copy
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import pretend_device
from arms import make_method, rows_of, writer_of
from coconut import Example, Reasoner
from coconut.checkpoints.folder import save_checkpoint
from coconut.config.methods import method_names
from coconut.config.params import parse_params
from coconut.data import collator
from coconut.data.collator import collate
from coconut.data.encoding import EncodedExample
from coconut.data.tokenizer import build_word_tokenizer
from coconut.data.views import View
from coconut.model import feedback as feedback_module
from coconut.model.fast.thresholds import Thresholds
from coconut.model.feedback import build_feedback
from coconut.model.generation import generate
from coconut.model.passes import PassOptions
from coconut.model.sampling import Sampling, sample
from coconut.ranks import Ranks
from coconut.training import learner, objective
from coconut.training.callbacks import Stopped
from coconut.training.loop import Trainer
from coconut.training.objective import Objective
from families import build_family
from test_config import shipped_tree
from test_evaluator import make_evaluator
from test_generation import make_prompts, make_talkative
from test_loop import MARKERS, FakeSet, FakeValidation, Keeper, TwoRanks, make_entry, untimed
from update_of_ranks import make_views

ALWAYS = replace(Thresholds().on(pretend_device.NAME), min_width=0, min_weight_elements=0)
FAMILIES = ("gpt2", "llama", "qwen2", "qwen3", "mistral", "phi3", "gemma", "gemma2", "gemma3_text")
WAYS = {
    "plain": PassOptions(fast=False),
    "fast": PassOptions(),
    "store": PassOptions(thresholds=ALWAYS),
    "checkpoints": PassOptions(thresholds=ALWAYS, checkpoint_activations=True),
}
THOUGHTS = ("hidden[-1]", "hidden[-2]", "normalised", "projection", "suppressed[0.5]", "input+suppressed[0.5:]")
PRETEND, CPU = str(pretend_device.DEVICE), "cpu"


class Device:
    """What trainer and objective ask of accelerate, on any device."""

    num_processes, process_index, is_main_process = 1, 0, True

    def __init__(self, name: str, *, is_bf16: bool = False) -> None:
        self.device, self._is_bf16 = torch.device(name), is_bf16

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self._is_bf16 else nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def gradient(
    device: str,
    *,
    family: str = "gpt2",
    width: int = 64,
    way: str = "plain",
    thought: str = "hidden[-1]",
    rounds: int = 0,
    micro_batch: int = 99,
    is_bf16: bool = False,
    num_thoughts: int | None = None,
) -> Tensor:
    """One update's gradient as a vector on the CPU."""
    model = build_family(family, width).eval().to(device)  # No dropout: the device has none in attention.
    feedback = build_feedback(thought, model, parallel_iterations=rounds)
    one = Objective(model, feedback, Device(device, is_bf16=is_bf16), 0, micro_batch, make_method(), options=WAYS[way])  # type: ignore[arg-type]
    parameters = dict(model.named_parameters()) | {f"feedback.{n}": p for n, p in feedback.named_parameters()}
    one.accumulate(rows_of(make_views(num_thoughts=num_thoughts)), parameters)
    return torch.cat([p.grad.flatten().cpu() for p in parameters.values() if p.grad is not None])


def difference(**case: Any) -> float:
    found, wanted = gradient(PRETEND, **case), gradient(CPU, **case)
    return float((found - wanted).norm() / wanted.norm())


def updates() -> dict[str, float]:
    """Every family, way and form of thought, ragged rows, cut into pieces, all at once, in bf16."""
    cases: list[dict[str, Any]] = [{"family": family, "way": way} for family in FAMILIES for way in ("plain", "store")]
    cases += [{"way": way, "width": 256} for way in WAYS]
    cases += [{"thought": thought, "way": way} for thought in THOUGHTS for way in ("plain", "store")]
    cases += [{"family": family, "micro_batch": 2, "way": "store"} for family in ("gpt2", "llama")]
    cases += [{"family": family, "rounds": 2, "way": way} for family in ("gpt2", "llama") for way in ("plain", "fast")]
    cases += [{"num_thoughts": 0, "way": way} for way in ("plain", "store")]
    return {json.dumps(case): difference(**case) for case in cases}


def bf16() -> dict[str, float]:
    """The same in bf16, which CUDA's autocast rounds in other places than the CPU's."""
    cases = [
        {"family": family, "way": way, "is_bf16": True} for family in ("gpt2", "llama") for way in ("plain", "store")
    ]
    return {json.dumps(case): difference(**case) for case in cases}


def methods() -> dict[str, float]:
    """The gradient of an update of each method."""
    found = {}
    for method in method_names():
        both = []
        for device in (CPU, PRETEND):
            trainer = make_trainer(device, method=method)
            trainer.update([0, 1, 2, 3])
            gradients = [p.grad for p in trainer.learner.parameters.values()]
            both.append(torch.cat([g.flatten().cpu() for g in gradients if g is not None]))
        found[method] = float((both[1] - both[0]).norm() / both[0].norm())
    return found


class HostKeeper(Keeper):
    """Keeps states on the CPU, as files do."""

    def save(self, update: int, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        assert update == record["update"]
        self.states.append(
            ({name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}, copy.deepcopy(record))
        )


def make_trainer(
    device: str,
    accuracies: Sequence[float] = (0.1, 0.7, 0.3),
    *,
    family: str = "gpt2",
    is_bf16: bool = False,
    rounds: int = 0,
    **changes: Any,
) -> Trainer:
    params = parse_params(shipped_tree())
    model = build_family(family, 64).eval().to(device)
    return Trainer(
        entry=make_entry(params, select="best", **changes),
        model=model,
        feedback=build_feedback("projection", model, parallel_iterations=rounds),
        dataset=FakeSet(),
        writer=writer_of(MARKERS),
        pad_id=0,
        seed=0,
        runtime=params.runtime,
        accelerator=Device(device, is_bf16=is_bf16),  # type: ignore[arg-type]
        validation=FakeValidation([*accuracies, *[0.5] * 99]),
    )


def training() -> dict[str, Any]:
    """Train on the device; stop in the middle, take the state through the CPU, and go on."""
    ends = []
    for stop_after in (None, 4):
        # What is left of the accuracies after the one before the first update.
        trainer = make_trainer(PRETEND, (0.7, 0.3)) if stop_after else make_trainer(PRETEND)
        if stop_after:
            first = make_trainer(PRETEND)
            first.callbacks = keeper = HostKeeper(stop_after=stop_after)
            with pytest.raises(Stopped):
                first.fit()
            tensors, record = keeper.states[-1]
            trainer.restore_state(tensors, json.loads(json.dumps(record)))
        trainer.fit()
        weights = torch.cat([p.detach().flatten().cpu() for p in trainer.learner.parameters.values()])
        devices = {p.device.type for p in trainer.learner.parameters.values()}
        devices |= {t.device.type for name, t in trainer.learner.optimizer_state().items() if name.endswith("exp_avg")}
        best = {tensor.device.type for tensor in trainer.learner._best.values()}
        ends.append((weights, untimed(trainer.position.history), devices, best))
    (one, history, devices, best), (other, other_history, other_devices, other_best) = ends
    broken = make_trainer(PRETEND)
    with torch.no_grad():
        next(iter(broken.learner.parameters.values()))[0, 0] = float("nan")
    try:
        broken.update([0, 1])
        message = ""
    except ValueError as error:
        message = str(error)
    return {
        "equal bytes": torch.equal(one, other),
        "equal history": history == other_history,
        "devices": sorted(devices | other_devices),
        "best is on": sorted(best | other_best),
        "not finite": message,
    }


def waiting() -> dict[str, Any]:
    """Count what CUDA would wait for: in an update, cut into pieces too, and for each further generated token."""
    found: dict[str, Any] = {}
    for family, way, micro_batch, is_bf16, rounds, ranks in (
        *(("gpt2", way, 99, False, 0, Ranks()) for way in ("store", "checkpoints")),
        ("llama", "store", 99, True, 0, TwoRanks()),
        ("qwen2", "checkpoints", 2, True, 0, Ranks()),
        ("mistral", "store", 2, False, 0, Ranks()),
        ("gpt2", "store", 1, True, 0, Ranks()),
        ("gpt2", "fast", 2, False, 0, TwoRanks()),  # So narrow that the library's cache is read.
        ("llama", "fast", 99, True, 2, Ranks()),
    ):
        trainer = make_trainer(PRETEND, family=family, is_bf16=is_bf16, rounds=rounds)
        trainer.model.train()
        trainer.objective.options, trainer.objective.micro_batch = WAYS[way], micro_batch
        trainer.objective.ranks = ranks
        trainer.update([0, 1, 2], [3, 4, 5])  # The first one makes the moments.
        with pretend_device.counting() as counts:
            trainer.update([3, 4, 5], [6, 7])
        found[
            f"update: {family}, {way}, micro-batches of {micro_batch}, {is_bf16=}, {rounds=}, processes={ranks.count}"
        ] = waits_of(counts)
    for rounds in (0, 2):
        model = build_family("gpt2", 64).eval().to(PRETEND)
        feedback = build_feedback("hidden[-1]", model, parallel_iterations=rounds)
        batch = collate([prompt_of(view) for view in make_views(num_thoughts=3)], pad_id=0).to(PRETEND)
        options, seen = WAYS["fast" if rounds else "store"], []
        for max_new_tokens in (2, 7):
            with pretend_device.counting() as counts:
                generate(model, feedback, batch, eos_ids=[], max_new_tokens=max_new_tokens, options=options)
            seen.append(counts["synchronisations"])
        found[f"generation: {rounds=}"] = {"first two tokens": seen[0], "five more": seen[1] - seen[0]}
    return found


def waits_of(counts: Counter[str]) -> dict[str, int]:
    return {name: number for name, number in counts.items() if name.startswith("waits")}


PUBLISHED: dict[str, tuple[int, int, dict[str, Any]]] = {
    "gpt2": (12, 768, {"n_head": 12}),
    "qwen2": (24, 896, {"num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864}),
}
"""Layers and width of GPT-2 and of Qwen2.5-0.5B, and what else their operations depend on."""


def launches() -> dict[str, dict[str, tuple[float, float]]]:
    """Count operations on the device for one more thought and one more token: in a layer, and in the whole model."""
    return {
        f"{family}, {'bf16' if is_bf16 else 'fp32'}": {
            "thought": more(partial(think, family, is_bf16), family, 2),
            "token": more(partial(speak, family, is_bf16), family, 3),
        }
        for family in PUBLISHED
        for is_bf16 in (False, True)
    }


def more(count: Callable[[int, int], int], family: str, number: int) -> tuple[float, float]:
    """Return what one thought, or token, more costs in a layer, half of what two layers add, and in all layers."""
    two, four = (count(num_layers, number + 1) - count(num_layers, number) for num_layers in (2, 4))
    of_layer = (four - two) / 2
    return of_layer, two + (PUBLISHED[family][0] - 2) * of_layer


def deep(family: str, num_layers: int) -> PreTrainedModel:
    kinds = {"layer_types": ["full_attention"] * num_layers} if family == "qwen2" else {}
    _, width, sizes = PUBLISHED[family]
    return build_family(family, width, num_hidden_layers=num_layers, **sizes, **kinds)


def think(family: str, is_bf16: bool, num_layers: int, num_thoughts: int) -> int:
    """Count the operations of an update with these thoughts."""
    model = deep(family, num_layers).to(PRETEND)
    device, feedback = Device(PRETEND, is_bf16=is_bf16), build_feedback("hidden[-1]", model)
    one = Objective(model, feedback, device, 0, 99, make_method())  # type: ignore[arg-type]
    with pretend_device.counting() as counts:
        one.accumulate(rows_of(make_views(num_thoughts=num_thoughts)), dict(model.named_parameters()))
    return counts["operations"]


def speak(family: str, is_bf16: bool, num_layers: int, num_tokens: int) -> int:
    """Count the operations of generating these tokens."""
    model = deep(family, num_layers).eval().to(PRETEND)
    batch = collate([prompt_of(view) for view in make_views(num_thoughts=2)], pad_id=0).to(PRETEND)
    feedback = build_feedback("hidden[-1]", model)
    with pretend_device.counting() as counts, Device(PRETEND, is_bf16=is_bf16).autocast():
        generate(model, feedback, batch, eos_ids=[], max_new_tokens=num_tokens)
    return counts["operations"]


TEXTS = (
    "CUDA out of memory. Tried to allocate 2.00 GiB.",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
)


def memory() -> dict[str, Any]:
    """Run out of memory above two rows, in each of CUDA's texts: the same gradient, in smaller pieces."""
    wanted = gradient(CPU)
    found = {}
    for text in TEXTS:
        real = objective.read_columns

        def limited(passes: Any, feedback: Any, batch: Any, text: str = text, real: Any = real) -> Any:
            if len(batch.input_ids_BT) > 2:
                raise RuntimeError(text)
            return real(passes, feedback, batch)

        with mock.patch.object(objective, "read_columns", limited):
            got = gradient(PRETEND)
        found[text] = float((got - wanted).norm() / wanted.norm())
    return found


def prompt_of(view: View) -> View:
    length = view.prefix_length + view.num_slots
    return View(view.input_ids[:length], view.labels[:length], view.prefix_length, view.num_slots, view.num_thoughts)


def generation() -> dict[str, bool]:
    """Generate and sample: the ids of the CPU."""
    found = {}
    for family in ("gpt2", "llama", "qwen2", "gemma2"):
        texts, samples = [], []
        for device in (CPU, PRETEND):
            model = build_family(family, 64).eval().to(device)
            feedback = build_feedback("hidden[-1]", model)
            batch = collate([prompt_of(view) for view in make_views(num_thoughts=3)], pad_id=0).to(device)
            rows = generate(model, feedback, batch, eos_ids=[1, 2, 3], max_new_tokens=8, options=WAYS["store"])
            texts.append([row.ids for row in rows])
            keys_BN = torch.arange(3 * len(texts[-1])).view(-1, 3)
            sampling, options = Sampling(3, 0.7, "gaussian", 0.1), WAYS["store"]
            drawn = sample(
                model,
                feedback,
                batch,
                keys_BN,
                sampling,
                eos_ids=[1],
                max_new_tokens=[6] * len(keys_BN),
                options=options,
            )
            samples.append([[one.ids for one in row] for row in drawn])
        found[f"{family}: texts"], found[f"{family}: samples"] = texts[0] == texts[1], samples[0] == samples[1]
    return found


class ListedSet(FakeSet):
    """As an evaluation reads it."""

    def examples(self) -> Iterator[EncodedExample]:
        return iter(self.encoded)


def opened() -> dict[str, bool]:
    """Open a checkpoint on the device, and evaluate there: the texts, thoughts and losses of the CPU."""
    examples = [Example("1 + 2 + 3 ?", ["3", "6"], "6"), Example("2 + 2 + 1 + 1 ?", ["4", "5", "6"], "6")]
    words = [text for one in examples for text in (one.question, *one.steps, f"### {one.answer}")]
    texts, vectors, losses, answers = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        model = build_family("llama", 64)
        make_talkative(model)
        save_checkpoint(Path(folder) / "model", model, build_word_tokenizer(words), None)
        for device in (CPU, PRETEND):
            torch.manual_seed(0)
            reasoner = Reasoner.from_pretrained(
                Path(folder) / "model", c_thought=1, max_latent_stage=2, markers=True, device=device
            )
            assert reasoner.model.device.type == torch.device(device).type
            questions = [one.question for one in examples]
            texts.append([one.text for one in reasoner.solve(questions, max_new_tokens=8)])
            thinkings = reasoner.think(questions, max_new_tokens=2)
            vectors.append(torch.stack([thought.vector.cpu() for one in thinkings for thought in one.thoughts]))
            evaluator = make_evaluator(reasoner.model, batch_size=3)
            losses += [float(reasoner.nll(examples, 2)[0].detach()), evaluator.loss(ListedSet())]  # type: ignore[arg-type]
            prompts = make_prompts(2, (5, 2, 9, 3, 7, 4, 4))
            answers.append([row.ids for row in evaluator.decode(prompts)])
    return {
        "texts": texts[0] == texts[1] and any(texts[0]),
        "thoughts": bool((vectors[0] - vectors[1]).abs().max() < 1e-4),
        "losses": losses[:2] == pytest.approx(losses[2:], rel=1e-5),
        "evaluated answers": answers[0] == answers[1] and all(answers[0]),
    }


def caught(check: Callable[[], float]) -> bool:
    """Say whether a fault is an error, or makes the numbers others."""
    try:
        return not check() < 1e-6
    except RuntimeError:
        return True


def faults() -> dict[str, bool]:
    """Put one mistake after another into the code, each of them invisible on a CPU."""
    real_put, real_to = feedback_module.Feedback.forward, collator.Batch.to

    def stays(self: Any, _device: Any) -> Any:
        return self

    def half(self: Any, device: Any) -> Any:
        return self._replace(
            **{n: getattr(self, n).to(device) for n in ("input_ids_BT", "attention_mask_BT", "is_latent_BT")}
        )

    def from_host(self: Any, *arguments: Any) -> Tensor:
        return real_put(self, *arguments).cpu()

    def detached(self: Any, *arguments: Any) -> Tensor:
        thought = real_put(self, *arguments)
        return thought.detach() if thought.device.type != "cpu" else thought

    def shifted(self: Any, device: Any) -> Any:
        there = real_to(self, device)
        is_there = there.position_ids_BT.device.type != "cpu"
        return there._replace(position_ids_BT=there.position_ids_BT.roll(1, 1)) if is_there else there

    def left_there(optimizer: Any, parameters: Any, tensors: Any) -> int:
        number = int(tensors["num_updates"])
        for name, parameter in parameters.items():
            state = {k.removeprefix(f"{name}/"): v for k, v in tensors.items() if k.startswith(f"{name}/")}
            if state:
                optimizer.state[parameter] = {k: v.clone() for k, v in state.items()}
        return number

    found = {}
    patches = {
        "a batch that stays on the host": mock.patch.object(collator.Batch, "to", stays),
        "a part of it that does": mock.patch.object(collator.Batch, "to", half),
        "a thought from the host": mock.patch.object(feedback_module.Feedback, "forward", from_host),
        "a thought without gradient": mock.patch.object(feedback_module.Feedback, "forward", detached),
        "positions of other columns": mock.patch.object(collator.Batch, "to", shifted),
    }
    for name, patch in patches.items():
        with patch:
            found[name] = caught(lambda: difference(way="store"))
    with mock.patch.object(learner, "restore_optimizer", left_there):
        found["moments that stay on the host"] = caught(lambda: 0.0 if training()["equal bytes"] else 1.0)
    return found


if __name__ == "__main__":
    every = (updates, bf16, methods, training, memory, generation, opened, faults, waiting, launches)
    cases = {one.__name__: one for one in every}
    sys.stdout.write(json.dumps(cases[sys.argv[1]]()) + "\n")
