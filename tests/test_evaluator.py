"""Scoring: order, limits, out-of-memory, and what a metric counts."""

import pytest
import torch
from transformers import PreTrainedModel

from arms import writer_of
from coconut.data.examples import Example
from coconut.data.layouts import ALL_STEPS, Layout
from coconut.evaluation.entry import summarise
from coconut.evaluation.evaluator import Evaluator
from coconut.evaluation.outcomes import Outcome, chain_matches, judge
from coconut.evaluation.outputs import warnings_about_results
from coconut.model.feedback import Feedback
from coconut.model.generation import Decoded
from test_generation import MARKERS, make_prompts, make_talkative


class PlainTokenizer:
    """What the evaluator asks of a tokenizer; ids are words."""

    pad_token_id = 0
    eos_token_id = 1

    def batch_decode(self, rows: list[list[int]], *, skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return [" ".join(map(str, row)) for row in rows]


def make_evaluator(model: PreTrainedModel, *, batch_size: int = 4, num_latents: int = 2) -> Evaluator:
    layout = Layout(0, num_latents)
    evaluator = Evaluator(model, Feedback(), PlainTokenizer(), layout, max_new_tokens=8, batch_size=batch_size)  # type: ignore[arg-type]
    evaluator.writer = writer_of(MARKERS)
    return evaluator


def refuse_more_rows_than(model: PreTrainedModel, num_rows: int) -> None:
    def hook(_module: object, _args: object, kwargs: dict[str, torch.Tensor]) -> None:
        if len(kwargs["inputs_embeds"]) > num_rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model.base_model.register_forward_pre_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_batch_size_changes_no_answer_and_no_order(tiny_gpt2: PreTrainedModel, batch_size: int) -> None:
    make_talkative(tiny_gpt2)
    prompts = make_prompts(2, (5, 2, 9, 3, 7, 4, 4))
    alone = [make_evaluator(tiny_gpt2).decode([prompt])[0].ids for prompt in prompts]
    found = make_evaluator(tiny_gpt2, batch_size=batch_size).decode(prompts)
    assert [row.ids for row in found] == alone


def test_out_of_memory_halves_the_batch_and_changes_no_answer(tiny_gpt2: PreTrainedModel) -> None:
    make_talkative(tiny_gpt2)
    prompts = make_prompts(2, (5, 2, 9, 3, 7, 4, 4))
    expected = [row.ids for row in make_evaluator(tiny_gpt2, batch_size=8).decode(prompts)]
    refuse_more_rows_than(tiny_gpt2, 2)
    evaluator = make_evaluator(tiny_gpt2, batch_size=8)
    assert [row.ids for row in evaluator.decode(prompts)] == expected
    assert (evaluator.batch_size, evaluator.num_oom_retries) == (1, 2)


def test_out_of_memory_with_one_row_is_an_error(tiny_gpt2: PreTrainedModel) -> None:
    refuse_more_rows_than(tiny_gpt2, 0)
    with pytest.raises(ValueError, match=r"rows [01]: the model failed: out of memory with one row at a time"):
        make_evaluator(tiny_gpt2).decode(make_prompts(0, (3, 3)))


def test_nothing_is_generated_beyond_the_models_positions(tiny_gpt2: PreTrainedModel) -> None:
    prompts = make_prompts(2, (124, 3))
    rows = make_evaluator(tiny_gpt2).decode(prompts)
    assert (rows[0].num_tokens, rows[0].truncated) == (2, True)


def outcome(text: str, *, gold: str = "9", truncated: bool = False) -> Outcome:
    example = Example("q", ["0", "6", "9"], gold)
    return judge(0, example, Decoded([1, 2], 3, truncated), text)


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("0 6 9 ### 9", "9", True),
        ("### 9.0", "9.0", True),
        ("### 8", "8", False),
        ("0 6 9", None, False),
        ("", None, False),
    ],
)
def test_an_outcome_holds_the_extracted_answer_and_whether_it_is_right(
    text: str, answer: str | None, right: bool
) -> None:
    found = outcome(text)
    assert (found.answer, found.right, found.num_steps, found.gold) == (answer, right, 3, "9")


@pytest.mark.parametrize(
    ("text", "num_dropped", "matches"),
    [
        ("0\n6\n9\n### 9", 0, True),
        ("6 9 ### 9", 1, True),
        ("0 6 9 ### 9", 1, False),
        ("0 6 8 ### 9", 0, False),
        ("0 6 9", 0, False),
    ],
)
def test_a_chain_matches_only_the_steps_that_the_plan_leaves(text: str, num_dropped: int, matches: bool) -> None:
    assert chain_matches(outcome(text), Example("q", ["0", "6", "9"], "9"), Layout(num_dropped, 0)) is matches


def test_metrics_are_shares_and_means_and_no_chain_is_compared_where_none_is_visible(
    tiny_gpt2: PreTrainedModel,
) -> None:
    examples = [Example("q", ["0", "6", "9"], "9")]
    outcomes = [outcome("0 6 9 ### 9"), outcome("### 1"), outcome("0 0", truncated=True), outcome("0 6 9 ### 9")]
    evaluator = make_evaluator(tiny_gpt2, num_latents=3)
    found = summarise(outcomes, examples, evaluator)
    assert found["accuracy"] == 0.5
    assert found["num_examples"] == 4
    assert found["generated_tokens"] == 3.0
    assert found["thoughts"] == 3.0
    assert found["truncated_share"] == 0.25
    assert found["no_answer_share"] == 0.25
    assert found["cot_match"] == 0.5
    evaluator.layout = Layout(ALL_STEPS, 3)
    assert summarise(outcomes, examples, evaluator)["cot_match"] is None


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ((0.0, 0.0, 1.0), "no generated text holds an answer"),
        ((0.0, 0.0, 0.5), "no answer is right, neither in test nor in valid"),
        ((0.0, 0.1, 0.5), None),
        ((0.9, 0.9, 0.0), None),
    ],
)
def test_results_that_speak_of_the_set_up_are_doubted(shares: tuple[float, float, float], message: str | None) -> None:
    warnings = warnings_about_results(dict(zip(("accuracy", "valid_accuracy", "no_answer_share"), shares, strict=True)))
    assert len(warnings) == (message is not None)
    assert all(message is not None and message in warning for warning in warnings)
