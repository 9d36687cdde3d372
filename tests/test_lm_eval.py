"""A reasoner as a model of lm-evaluation-harness: its figures are those of `Reasoner.score`."""

import importlib
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coconut import Example, Reasoner
from coconut.checkpoints.folder import save_checkpoint
from coconut.data.tokenizer import build_word_tokenizer
from coconut.lm_eval import ThinkingLM
from tiny_models import build_tiny_model

QUESTIONS = [" + ".join(numbers) + " ?" for numbers in itertools.product("123456", repeat=3)]


@pytest.fixture
def model(tmp_path: Path) -> ThinkingLM:
    tokenizer = build_word_tokenizer([*QUESTIONS, "### 6"])
    plain = build_tiny_model("gpt2", seed=1, vocab_size=len(tokenizer), tie_word_embeddings=False)
    save_checkpoint(tmp_path / "plain", plain, tokenizer, None)
    reasoner = Reasoner.from_pretrained(tmp_path / "plain", c_thought=1, max_latent_stage=2, markers=True)
    reasoner.save_pretrained(tmp_path / "checkpoint")
    return ThinkingLM(tmp_path / "checkpoint")


def asked(question: str, **options: Any) -> SimpleNamespace:
    """Return a request as the harness writes them."""
    return SimpleNamespace(args=(question, options))


def examples_of(model: ThinkingLM) -> list[Example]:
    """Return the questions with golds of which a part is what the model answers."""
    solutions = model.reasoner.solve(QUESTIONS, max_new_tokens=16)
    answers = [solution.answer if number % 3 else None for number, solution in enumerate(solutions)]
    return [Example(text, [], answer or "none") for text, answer in zip(QUESTIONS, answers, strict=True)]


def test_texts_are_those_of_solve_cut_where_the_task_says(model: ThinkingLM) -> None:
    texts = [solution.text for solution in model.reasoner.solve(QUESTIONS, max_new_tokens=16)]
    short = model.reasoner.solve(QUESTIONS[:1], max_new_tokens=2)[0].text
    requests = [asked(question, max_gen_toks=16) for question in QUESTIONS]
    assert model.generate_until([asked(QUESTIONS[0], max_gen_toks=2), *requests]) == [short, *texts]
    mark = next(text for text in texts if text).split()[-1]
    cut = model.generate_until([asked(question, max_gen_toks=16, until=[mark]) for question in QUESTIONS])
    assert cut == [text.partition(mark)[0] for text in texts] != texts


def test_its_accuracy_is_that_of_score(model: ThinkingLM) -> None:
    examples = examples_of(model)
    wanted = model.reasoner.score(examples, max_new_tokens=16)
    assert 0 < wanted < 1
    task = model.task("unread.jsonl", max_new_tokens=16)
    texts = model.generate_until([asked(one.question, **task["generation_kwargs"]) for one in examples])
    judged = [
        task["process_results"]({"answer": example.answer}, [text])
        for example, text in zip(examples, texts, strict=True)
    ]
    assert sum(one["accuracy"] for one in judged) / len(judged) == wanted


def test_the_harness_itself_finds_the_same_accuracy(model: ThinkingLM, tmp_path: Path) -> None:
    harness = pytest.importorskip("lm_eval")
    examples = examples_of(model)
    rows = ({"question": one.question, "steps": one.steps, "answer": one.answer} for one in examples)
    (tmp_path / "test.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    importlib.import_module("lm_eval.evaluator")
    found = harness.simple_evaluate(model, tasks=[model.task(tmp_path / "test.jsonl", max_new_tokens=16)])
    assert found["results"]["thoughts"]["accuracy,none"] == model.reasoner.score(examples, max_new_tokens=16)


def test_what_it_cannot_answer_as_it_was_trained_is_refused(model: ThinkingLM) -> None:
    with pytest.raises(ValueError, match="wanted one with output_type: generate_until"):
        model.loglikelihood([])
    with pytest.raises(ValueError, match="do_sample: found true"):
        model.generate_until([asked("1 + 2 ?", do_sample=True)])
