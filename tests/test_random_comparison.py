"""Random models, batches and ways of reading, against one row at a time without a cache.

`COCONUT_COMPARE_S=1800 pytest -m slow tests/test_random_comparison.py` goes on for half an hour, and
`COCONUT_COMPARE_SEED` chooses other cases. A failure names the seed of its case: `case(SEED)` is that case alone.
"""

import copy
import os
import random
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from coconut.data.collator import collate
from coconut.data.views import IGNORED, View
from coconut.model.feedback import Feedback, States, build_feedback
from coconut.model.generation import generate
from coconut.model.latent import latent_nll
from coconut.model.passes import PassOptions
from families import build_family
from ways import WAYS

SECONDS = float(os.environ.get("COCONUT_COMPARE_S", "30"))
SEED = int(os.environ.get("COCONUT_COMPARE_SEED", "0"))
FAMILIES = ("gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "olmo", "cohere", "opt")
OVERRIDES: dict[str, list[dict[str, Any]]] = {
    "mistral": [{}, {"sliding_window": 4}],
    "gemma3_text": [{}, {"sliding_window": 4}],
    "olmo": [{}, {"clip_qkv": 0.5}],
    "qwen2": [{}, {"tie_word_embeddings": True}],
    "gpt2": [{"tie_word_embeddings": tied, "resid_pdrop": 0.0} for tied in (False, True)],
}
THOUGHTS = (
    "hidden[-1]",
    "hidden[-2]",
    "hidden[0.5]",
    "suppressed[1:]",
    "input+suppressed[1:]",
    "normalised(hidden[-2])",
)
START, END, LATENT, EOS = 90, 91, 92, 1


def read_row(model: PreTrainedModel, feedback: Feedback, view: View) -> Tensor:
    """Logits of one row: everything is read again for every thought, without padding and without a cache."""
    own_1TD = model.get_input_embeddings()(torch.tensor([view.input_ids]))
    embeds_1TD = own_1TD
    for column in range(view.prefix_length, view.prefix_length + view.num_thoughts):
        read_1SD = embeds_1TD[:, :column]
        output = model.base_model(inputs_embeds=read_1SD, use_cache=False, output_hidden_states=True)
        layers = [layer_1SD[:, -1] for layer_1SD in output.hidden_states] if feedback.needs_all_layers else []
        thought_1D = feedback.source(States(layers, output.last_hidden_state[:, -1], read_1SD[:, -1]))
        thought_1D = thought_1D if feedback.finish is None else feedback.finish(thought_1D)
        embeds_1TD = torch.cat([read_1SD, thought_1D[:, None], own_1TD[:, column + 1 :]], dim=1)
    return model(inputs_embeds=embeds_1TD, use_cache=False).logits[0]


def random_view(source: random.Random, num_slots: int, *, markers: bool, has_thoughts: bool) -> View:
    question = [source.randrange(3, START) for _ in range(source.randint(1, 9))] + [START] * markers
    target = [source.randrange(3, START) for _ in range(source.randint(1, 9))] + [EOS]
    ids = question + [LATENT] * num_slots + [END] * markers
    return View(
        ids + target,
        [IGNORED] * len(ids) + target,
        prefix_length=len(question),
        num_slots=num_slots,
        num_thoughts=num_slots if has_thoughts else 0,
    )


def prompt_of(view: View) -> View:
    length = len(view.labels) - view.num_supervised
    return replace(view, input_ids=view.input_ids[:length], labels=view.labels[:length])


def gradients(modules: list[nn.Module]) -> dict[str, Tensor]:
    named = [(f"{place}.{name}", p) for place, module in enumerate(modules) for name, p in module.named_parameters()]
    found = {name: p.grad for name, p in named if p.grad is not None}
    for module in modules:
        module.zero_grad()
    return found


def read_alone(model: PreTrainedModel, feedback: Feedback, views: list[View]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the rows, each on its own, and its gradients."""
    nll = torch.zeros(())
    for view in views:
        targets, logits = torch.tensor(view.labels[1:]), read_row(model, feedback, view)[:-1]
        nll = nll + functional.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)
    nll.backward()
    return nll.detach(), gradients([model, feedback])


def worst_difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference of a weight's gradient, relative to all gradients together."""
    norm = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    return max(float((found.get(name, 0 * gradient) - gradient).norm() / norm) for name, gradient in wanted.items())


def case(seed: int) -> str:
    """Try one case; return what it was."""
    source = random.Random(seed)
    family, width = source.choice(FAMILIES), source.choice([64, 64, 256])
    overrides = source.choice(OVERRIDES.get(family, [{}]))
    model = build_family(family, width, seed, **overrides)
    way, rounds = source.choice(sorted(WAYS)), source.choice([0, 0, 0, 9])  # 9: as many as thoughts, at most.
    thought = source.choice(THOUGHTS)
    options = replace(WAYS[way], checkpoint_activations=source.random() < 0.3)
    c_thought, markers = source.choice([1, 2, 3]), source.random() < 0.7
    num_slots = [c_thought * source.randint(0, 3) for _ in range(source.randint(1, 5))]
    dtype = source.choice([torch.float32, torch.float32, torch.bfloat16])
    micro_batch = source.randint(1, len(num_slots))
    told = f"seed {seed}: {family} {overrides} {width}, {way}, {thought}, slots {num_slots} by {micro_batch}, {dtype}"
    feedback = build_feedback(thought, model, parallel_iterations=rounds)
    views = [random_view(source, number, markers=markers, has_thoughts=source.random() < 0.9) for number in num_slots]
    wanted, of_alone = read_alone(model, feedback, views)
    found = torch.zeros(())
    for start in range(0, len(views), micro_batch):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            nll, _ = latent_nll(model, feedback, collate(views[start : start + micro_batch], pad_id=0), options)
        nll.backward()
        found = found + nll.detach()
    of_batch = gradients([model, feedback])
    tolerance, of_gradients = (1e-5, 1e-5) if dtype == torch.float32 else (0.1, 0.5)
    if dtype == torch.bfloat16 and "suppressed" in thought:
        of_gradients = float("inf")  # Rounding turns signs on which they depend, from thought to thought.
    of_loss, difference = float(abs(found - wanted) / wanted), worst_difference(of_batch, of_alone)
    is_equal = of_loss <= tolerance and difference <= of_gradients
    if not is_equal:
        own_of_loss, own = rounding_alone(model, thought, rounds, views, (wanted, of_alone))
        told += f": loss {of_loss:.1e}, gradients {difference:.1e}; rounding alone {own_of_loss:.1e}, {own:.1e}"
        assert dtype == torch.float32, told
        assert of_loss <= max(tolerance, 4 * own_of_loss), told
        assert difference <= max(of_gradients, 4 * own), told
    if is_equal and dtype == torch.float32:
        compare_decoding(model, feedback, views, options, told)
    return told


def rounding_alone(
    model: PreTrainedModel, thought: str, rounds: int, views: list[View], found: tuple[Tensor, dict[str, Tensor]]
) -> tuple[float, float]:
    """How far rounding alone can move the loss and the gradients of rows that are read alone, by float64.

    A gradient jumps where a ReLU, or a coordinate of `suppressed[...]`, is close to its kink. So weights that differ
    by as much as float32 rounds are tried as well as the rows read in float32.
    """
    exact = copy.deepcopy(model).double()
    feedback = build_feedback(thought, exact, parallel_iterations=rounds)
    nll, of_exact = read_alone(exact, feedback, views)
    of_loss, of_gradients = float(abs(found[0] - nll) / nll), worst_difference(found[1], of_exact)
    weights = {name: weight.clone() for name, weight in exact.named_parameters()}
    for seed in range(12):
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in exact.named_parameters():
                step = 4 * torch.finfo(torch.float32).eps * torch.randn(weight.shape, generator=noise)
                weight.copy_(weights[name] * (1 + step))
        moved, of_moved = read_alone(exact, feedback, views)
        of_loss = max(of_loss, float(abs(moved - nll) / nll))
        of_gradients = max(of_gradients, worst_difference(of_moved, of_exact))
    return of_loss, of_gradients


@torch.no_grad()
def compare_decoding(
    model: PreTrainedModel, feedback: Feedback, views: list[View], options: PassOptions, told: str
) -> None:
    """Prompts of a batch end in the same column, so rows with the same number of slots are asked together."""
    prompts = [prompt_of(view) for view in views if view.num_slots == views[0].num_slots]
    decoded = generate(model, feedback, collate(prompts, pad_id=0), eos_ids=[EOS], max_new_tokens=5, options=options)
    for row, prompt in zip(decoded, prompts, strict=True):
        ids: list[int] = []
        for _ in range(5):
            view = replace(prompt, input_ids=prompt.input_ids + ids)
            ids.append(int(read_row(model, feedback, view)[-1].argmax()))
            if ids[-1] == EOS:
                break
        assert row.ids == [token for token in ids if token != EOS], told


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 600)
def test_random_cases_are_those_of_rows_alone() -> None:
    stop, num_cases = time.monotonic() + SECONDS, 0
    while time.monotonic() < stop:
        case(SEED + num_cases)
        num_cases += 1
    assert num_cases > 0
    print(f"{num_cases} cases from seed {SEED}")  # noqa: T201 - shown by pytest -s
