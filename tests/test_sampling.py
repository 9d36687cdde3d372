"""Samples: each equals a slow reading of its own, whatever the batch, the order and the number of samples."""

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from coconut.data.collator import collate
from coconut.data.views import View
from coconut.evaluation.evaluator import sample_key
from coconut.evaluation.samples import Samples, majority, measure, pass_at, sizes
from coconut.evaluation.statistics import bootstrap_interval
from coconut.model.draws import normals, uniforms
from coconut.model.feedback import Feedback, build_feedback
from coconut.model.sampling import Sampling, draw_tokens, sample
from marks import slow_but
from test_generation import EOS_ID, make_prompts
from tiny_models import build_tiny_model
from ways import WAYS

NEVER = 999
_THOUGHTS = 1 << 32


@pytest.fixture(scope="module", params=["gpt2", "qwen2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build_tiny_model(request.param)


def draw(
    model: PreTrainedModel,
    prompts: Sequence[View],
    sampling: Sampling,
    *,
    seed: int = 0,
    feedback: Feedback | None = None,
    way: str = "store, own attention",
    eos_id: int = NEVER,
    batch_size: int = 100,
) -> list[list[list[int]]]:
    """The ids of every sample of every prompt."""
    found: list[list[list[int]]] = []
    for start in range(0, len(prompts), batch_size):
        chosen = prompts[start : start + batch_size]
        keys = torch.tensor([[sample_key(p.input_ids, n, seed) for n in range(sampling.num_samples)] for p in chosen])
        rows = sample(
            model,
            feedback or Feedback(),
            collate(chosen, pad_id=EOS_ID),
            keys,
            sampling,
            eos_ids=[eos_id],
            max_new_tokens=[8] * len(chosen),
            options=WAYS[way],
        )
        found += [[one.ids for one in samples] for samples in rows]
    return found


def slow_sample(
    model: PreTrainedModel, feedback: Feedback, prompt: View, key: int, sampling: Sampling, *, num_new: int = 8
) -> list[int]:
    """One sample of one prompt: no cache, no padding, everything read again for every column."""
    keys = torch.tensor([key])
    embed = model.get_input_embeddings()
    with torch.no_grad():
        columns = embed(torch.tensor([prompt.input_ids]))
        for slot in range(prompt.num_thoughts):
            column = prompt.prefix_length + slot
            output = model.base_model(inputs_embeds=columns[:, :column], output_hidden_states=True)
            thought = feedback(output, columns[:, column - 1])
            if sampling.noise == "gaussian":
                thought = thought + sampling.noise_scale * normals(keys, _THOUGHTS + slot, thought.shape[-1]).float()
            columns[:, column] = thought
        ids: list[int] = []
        while len(ids) < num_new:
            logits = model(inputs_embeds=columns).logits[:, -1]
            ids.append(int(draw_tokens(logits, keys, len(ids), temperature=sampling.temperature)))
            columns = torch.cat([columns, embed(torch.tensor([ids[-1:]]))], dim=1)
    return ids


SAMPLINGS = {
    "words": Sampling(3, 0.8),
    "gaussian": Sampling(4, 0.0, "gaussian", 60.0),
    "both": Sampling(3, 1.0, "gaussian", 0.3),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("num_latents", [0, 1, 3])
def test_a_sample_equals_a_slow_reading_of_its_own(
    model: PreTrainedModel, way: str, name: str, num_latents: int
) -> None:
    sampling = SAMPLINGS[name]
    prompts = make_prompts(num_latents, (5, 1, 9, 3), markers=True)
    found = draw(model, prompts, sampling, way=way)
    for prompt, samples in zip(prompts, found, strict=True):
        keys = [sample_key(prompt.input_ids, number, 0) for number in range(sampling.num_samples)]
        assert samples == [slow_sample(model, Feedback(), prompt, key, sampling) for key in keys]
    if num_latents or sampling.temperature:
        assert len({tuple(ids) for samples in found for ids in samples}) > len(prompts), "samples differ"


@pytest.mark.parametrize("thought", ["hidden[-2]", "normalised", "projection(hidden[0.5])", "input+suppressed[1:]"])
def test_every_form_of_thought_can_be_sampled(model: PreTrainedModel, thought: str) -> None:
    feedback = build_feedback(thought, model)
    prompts = make_prompts(3, (5, 2, 7))
    sampling = Sampling(2, 0.7, "gaussian", 0.2)
    for prompt, samples in zip(prompts, draw(model, prompts, sampling, feedback=feedback), strict=True):
        keys = [sample_key(prompt.input_ids, number, 0) for number in range(2)]
        assert samples == [slow_sample(model, feedback, prompt, key, sampling) for key in keys]


DRAWN = [*SAMPLINGS.values(), Sampling(3, 0.0, "dropout", 0.3), Sampling(3, 0.6, "dropout", 0.2)]


@pytest.mark.parametrize("sampling", slow_but(DRAWN[-1:], DRAWN), ids=lambda s: f"{s.noise}-{s.temperature}")
def test_neither_batch_nor_order_nor_the_number_of_samples_changes_one(sampling: Sampling) -> None:
    gpt2 = build_tiny_model("gpt2")
    prompts = make_prompts(3, (5, 1, 9, 3, 4, 4, 2), markers=True)
    whole = draw(gpt2, prompts, sampling)
    assert draw(gpt2, prompts, sampling, batch_size=1) == whole
    assert draw(gpt2, prompts[::-1], sampling, batch_size=3)[::-1] == whole
    more = draw(gpt2, prompts, Sampling(11, sampling.temperature, sampling.noise, sampling.noise_scale))
    assert [samples[: sampling.num_samples] for samples in more] == whole
    assert draw(gpt2, prompts, sampling, seed=1) != whole
    for way in WAYS:
        assert draw(gpt2, prompts, sampling, way=way) == whole


def test_rows_that_end_early_leave_the_others_as_they_are() -> None:
    gpt2 = build_tiny_model("gpt2")
    prompts = make_prompts(2, (5, 1, 9))
    whole = draw(gpt2, prompts, Sampling(5, 1.5))
    eos_id = Counter(token for samples in whole for ids in samples for token in ids).most_common(1)[0][0]
    cut = draw(gpt2, prompts, Sampling(5, 1.5), eos_id=eos_id)
    assert cut == [[list(itertools.takewhile(lambda t: t != eos_id, ids)) for ids in samples] for samples in whole]


def test_dropout_acts_in_the_passes_that_form_thoughts_and_nowhere_else() -> None:
    gpt2 = build_tiny_model("gpt2")
    with_thoughts, without = make_prompts(3, (5, 2)), make_prompts(0, (5, 2))
    greedy = draw(gpt2, with_thoughts, Sampling(1, 0.0, "gaussian", 0.0))
    assert draw(gpt2, with_thoughts, Sampling(1, 0.0, "dropout", 0.0)) == greedy
    dropped = draw(gpt2, with_thoughts, Sampling(8, 0.0, "dropout", 0.5))
    assert all(len({tuple(ids) for ids in samples}) > 1 for samples in dropped)
    nothing = draw(gpt2, without, Sampling(4, 0.0, "dropout", 0.5))
    assert all(len({tuple(ids) for ids in samples}) == 1 for samples in nothing)
    assert not any(module.training for module in gpt2.modules())
    assert {module.p for module in gpt2.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}


def test_what_cannot_be_drawn_is_refused_in_words() -> None:
    qwen2 = build_tiny_model("qwen2")
    prompts = make_prompts(2, (3,))
    with pytest.raises(ValueError, match="have no dropout modules; take gaussian noise"):
        draw(qwen2, prompts, Sampling(2, 0.0, "dropout", 0.1))
    with pytest.raises(ValueError, match="computes them all at once"):
        draw(qwen2, prompts, Sampling(2, 0.0, "gaussian", 0.1), feedback=Feedback(parallel_iterations=2))
    words = draw(qwen2, prompts, Sampling(2, 1.0), feedback=Feedback(parallel_iterations=5))
    assert words == draw(qwen2, prompts, Sampling(2, 1.0)), "as many rounds as thoughts give the same thoughts"


# --- draws ----------------------------------------------------------------------------------


def test_tokens_are_drawn_as_often_as_the_softmax_says() -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, -30.0])
    num_rows, temperature = 40_000, 0.7
    keys = torch.tensor([sample_key([1, 2], number, 7) for number in range(num_rows)])
    ids = draw_tokens(logits.expand(num_rows, -1), keys, 3, temperature=temperature)
    wanted = (logits.double() / temperature).softmax(dim=0)
    counts = torch.bincount(ids, minlength=5) / num_rows
    assert torch.allclose(counts.double(), wanted, atol=5 * math.sqrt(0.25 / num_rows))
    assert counts[4] == 0


def moments(values: Tensor) -> tuple[float, float, float]:
    return float(values.mean()), float(values.var()), float((values**4).mean())


def test_draws_are_uniform_and_normal_and_those_of_two_purposes_have_nothing_in_common() -> None:
    keys = torch.tensor([sample_key([5], number, 0) for number in range(2_000)])
    uniform, normal = uniforms(keys, 1, 50).flatten(), normals(keys, 1, 50).flatten()
    assert 0 <= float(uniform.min()) < float(uniform.max()) < 1
    assert moments(uniform) == pytest.approx((1 / 2, 1 / 12, 1 / 5), abs=0.005)
    assert moments(normal) == pytest.approx((0, 1, 3), abs=0.05)
    other = normals(keys, 2, 50).flatten()
    assert float((normal * other).mean()) == pytest.approx(0, abs=0.02)
    assert float((normal[1:] * normal[:-1]).mean()) == pytest.approx(0, abs=0.02)


# --- estimates ------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_samples", "num_right"), [(n, c) for n in range(1, 7) for c in range(n + 1)])
def test_pass_at_k_is_the_share_of_all_choices_that_hold_a_right_one(num_samples: int, num_right: int) -> None:
    flags = [True] * num_right + [False] * (num_samples - num_right)
    for k in range(1, num_samples + 1):
        choices = list(itertools.combinations(flags, k))
        wanted = Fraction(sum(map(any, choices)), len(choices))
        assert pass_at(k, num_samples=num_samples, num_right=num_right) == pytest.approx(float(wanted), abs=1e-12)


@pytest.mark.parametrize("seed", range(30))
def test_the_majority_is_the_most_frequent_answer_and_ties_go_to_the_first(seed: int) -> None:
    draw_from = random.Random(seed)
    answers: list[str | None] = [draw_from.choice(["1", "1.0", "2", "3", None]) for _ in range(9)]
    values = [float(answer) for answer in answers if answer is not None]
    counts = Counter(values)
    wanted = next((value for value in values if counts[value] == max(counts.values())), None)
    found = majority(answers)
    assert (None if found is None else float(found)) == wanted


def test_the_figures_of_a_set() -> None:
    samples = [
        Samples(0, "5", ["5", "4", "5.0", "7"], [True, False, True, False]),
        Samples(1, "1", ["2", "1", "2", "3"], [False, True, False, False]),
        Samples(2, "1", [None, None, None, None], [False] * 4),
    ]
    found = measure(samples, 4)
    assert found["num_samples"] == 4
    assert found["pass_at_1"] == pytest.approx((1 / 2 + 1 / 4 + 0) / 3)
    assert found["pass_at_4"] == pytest.approx(2 / 3)
    assert found["majority"] == pytest.approx(1 / 3)
    assert all(
        found[f"{key}_low"] <= found[key] <= found[f"{key}_high"] for key in ("pass_at_1", "pass_at_2", "majority")
    )
    assert sizes(1) == [1]
    assert sizes(16) == [1, 2, 4, 8, 16]


def test_a_bootstrap_covers_the_mean_as_often_as_it_says_and_never_degenerates() -> None:
    assert bootstrap_interval([1.0] * 20)[0] < 1
    assert bootstrap_interval([]) == (0.0, 1.0)
    covered = 0
    for seed in range(200):
        generator = random.Random(seed)
        low, high = bootstrap_interval([generator.random() ** 2 for _ in range(60)])
        covered += low <= 1 / 3 <= high
    assert 175 <= covered <= 200


def test_samples_are_drawn_with_many_questions_at_once(model: PreTrainedModel) -> None:
    prompts = make_prompts(2, tuple(range(1, 24)))
    sampling: Any = Sampling(6, 1.0)
    assert draw(model, prompts, sampling) == draw(model, prompts, sampling, batch_size=4)
